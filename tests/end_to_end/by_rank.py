"""Run the command line with other inputs on each rank: `accelerate launch ... by_rank.py CASES`.

CASES is a JSON list with an object per rank: "arguments"; "folder", the current one; "version", of rekatrain; "breaks",
to raise an unexpected exception in the first step.
"""

import json
import os
import sys
from typing import Any


def run(case: dict[str, Any]) -> None:
    """Run the command line of one rank."""
    import rekatrain
    from rekatrain.trainer import sft
    from rekatrain.trainer.cli import main

    os.chdir(case.get("folder", "."))
    rekatrain.__version__ = case.get("version", rekatrain.__version__)
    if case.get("breaks"):
        sft.run_trainer = lambda *_, **__: 1 / 0
    main(case["arguments"])


if __name__ == "__main__":
    run(json.loads(sys.argv[1])[int(os.environ["RANK"])])
