"""`python -m rekatrain` with a kill point: `python entry.py train recipe.yaml ...`."""

import json
import os
import sys

sys.path.append(os.getcwd())  # as `python -m rekatrain` does

from kill_points import KillPoint, install  # noqa: E402  # after the path
from processes import POINT  # noqa: E402

if __name__ == "__main__":
    install(KillPoint(**json.loads(os.environ[POINT])))
    from rekatrain.trainer.cli import main

    main()
