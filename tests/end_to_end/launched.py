"""Several runs of the program in one launch, whose start costs more than they do: `python launched.py CASES`.

CASES is a JSON list of cases: "environment", what a launch file would set, and one of
  "arguments": of the command line; with "set_aside", a checkpoint that is moved away afterwards, so that the next case
               can resume from the one before it
  "load":      a recipe whose policy is loaded only, to write into "report" what share of its weights each process holds
"""

import json
import os
import sys
from pathlib import Path


def run(case: dict) -> None:
    # Here and not above: reward workers import this file, and need none of it.
    import torch
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from trl.trainer.sft_config import SFTConfig

    from rekatrain.trainer.cli import main
    from rekatrain.trainer.models import load_policy
    from rekatrain.trainer.recipe.load import load_recipe
    from rekatrain.trainer.trl_run import make_config

    # Stage rloo ends the process group with its run; gloo makes no second one.
    torch.distributed.destroy_process_group = lambda *_: None
    unset_hf_deepspeed_config()  # a process of its own would start without
    AcceleratorState._reset_state()
    os.environ.update(case["environment"])
    if "load" in case:
        recipe = load_recipe(case["load"])
        config = make_config("sft", recipe.sft, recipe, SFTConfig)
        parameters = list(load_policy(recipe).parameters())
        held = sum(max(parameter.numel(), parameter.ds_tensor.numel()) for parameter in parameters)
        share = held / sum(parameter.ds_numel for parameter in parameters)
        Path(f"{case['report']}-{config.process_index}.json").write_text(json.dumps(share))
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
