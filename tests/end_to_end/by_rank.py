"""Run the command line with other inputs on each rank: `accelerate launch ... by_rank.py CASES`.

CASES is a JSON list with an object per rank: "arguments"; "folder", the current one; "version", of rekatrain; "breaks",
to raise an unexpected exception in the first step; "hears_late", to see the failure of another rank seconds after the
launcher's SIGTERM; "is_early", to get SIGTERM before the run listens for it.
"""

import json
import os
import signal
import sys
import time
from typing import Any


def run(case: dict[str, Any]) -> None:
    """Run the command line of one rank."""
    import rekatrain
    from rekatrain.trainer import sft
    from rekatrain.trainer.cli import main
    from rekatrain.trainer.processes import agreement, interruption, ranks

    os.chdir(case.get("folder", "."))
    rekatrain.__version__ = case.get("version", rekatrain.__version__)
    if case.get("breaks"):
        sft.run_trainer = lambda *_, **__: 1 / 0
    if case.get("hears_late"):
        ranks.POLL_SECONDS = 3.0
        interruption.end_if_a_rank_failed = lambda _: time.sleep(5)
    if case.get("is_early"):
        agree = agreement.agree_on_recipe
        agreement.agree_on_recipe = lambda *a, **k: (os.kill(os.getpid(), signal.SIGTERM), agree(*a, **k))
    main(case["arguments"])


if __name__ == "__main__":
    run(json.loads(sys.argv[1])[int(os.environ["RANK"])])
