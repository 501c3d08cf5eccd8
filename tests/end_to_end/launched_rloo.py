"""Several RLOO runs in one launch, whose start costs more than they do: `python launched_rloo.py CASES`.

CASES is a JSON list of {"stage": of ZeRO, 0 for plain data parallelism, "arguments": of the command line}; a case with
"set_aside" then takes that checkpoint away from its run, so that the next case can resume from the one before it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trainer.cli import main


def run(cases: list[dict]) -> None:
    end_of_launch, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *_: None
    for case in cases:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = str(case["stage"] > 0).lower()
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(case["stage"])
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(case["stage"] == 3).lower()
        main(case["arguments"])
        AcceleratorState._reset_state()
        unset_hf_deepspeed_config()
        if "set_aside" in case:
            torch.distributed.barrier()
            if os.environ["RANK"] == "0":
                checkpoint = Path(case["set_aside"])
                checkpoint.rename(checkpoint.parents[1] / "set-aside")
            torch.distributed.barrier()
    end_of_launch()


if __name__ == "__main__":  # reward workers import this file
    run(json.loads(Path(sys.argv[1]).read_text()))
