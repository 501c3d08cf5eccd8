"""Make several runs of the program in one launch: `python launched.py CASES`. The start costs more than the runs.

CASES is a JSON file with a list of cases. Each has "environment", variables that a launch file would set, and one of
  "arguments": the command line; with "set_aside" a checkpoint, which is moved away afterwards, so that the next case
               resumes from the one before it
  "load":      a recipe whose policy is loaded only; "report" is the file for the fraction of its weights that each
               process holds
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def run(case: dict[str, Any]) -> None:
    """Run one case in this process of the launch."""
    # Imported here because reward workers import this file and need none of it.
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from trl.trainer.sft_config import SFTConfig

    from rekatrain.trainer.cli import main
    from rekatrain.trainer.models.load import load_policy
    from rekatrain.trainer.recipe.load import load_recipe
    from rekatrain.trainer.trl_stages.run import make_config

    # Stage rloo destroys the process group at the end of its run; gloo cannot make a second one.
    torch.distributed.destroy_process_group = lambda *_: None
    unset_hf_deepspeed_config()  # a separate process would start without it
    os.environ.update(case["environment"])
    if "load" in case:
        recipe = load_recipe(case["load"])
        config = make_config("sft", recipe.sft, recipe, SFTConfig)
        parameters = list(load_policy(recipe).parameters())
        held = sum(max(parameter.numel(), parameter.ds_tensor.numel()) for parameter in parameters)
        fraction = held / sum(parameter.ds_numel for parameter in parameters)
        Path(f"{case['report']}-{config.process_index}.json").write_text(json.dumps(fraction))
        return
    main(case["arguments"])
    if "set_aside" in case:
        torch.distributed.barrier()
        if os.environ["RANK"] == "0":
            checkpoint = Path(case["set_aside"])
            checkpoint.rename(checkpoint.parents[1] / "set-aside")
        torch.distributed.barrier()


if __name__ == "__main__":
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run(case)
