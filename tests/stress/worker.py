"""Take several runs in each process of a launch: `python worker.py CASES DONE`; a finished run adds a line to DONE.

CASES is as for tests/end_to_end/launched.py; a case has also "tokens_per_chunk", the size of a chunk of the LM head, or
null for the engine's own.
"""

import json
import os
import sys
from pathlib import Path

from tests.end_to_end.launched import run

if __name__ == "__main__":
    from rekatrain.trainer.rloo import logprobs

    sys.path.append(os.getcwd())  # the reward, as `python -m rekatrain` finds it
    usual = logprobs.TOKENS_PER_CHUNK
    for case in json.loads(Path(sys.argv[1]).read_text()):
        logprobs.TOKENS_PER_CHUNK = case["tokens_per_chunk"] or usual
        run(case)
        if os.environ["RANK"] == "0":
            with Path(sys.argv[2]).open("a") as file:
                file.write("done\n")
