"""`python -m rekatrain` with a kill point: `python entry.py train recipe.yaml ...`."""

import json
import os
import sys

from tests.chaos.kill_points import POINT, KillPoint, install

if __name__ == "__main__":
    sys.path.append(os.getcwd())  # as `python -m rekatrain` does
    install(KillPoint(**json.loads(os.environ[POINT])))
    from rekatrain.trainer.cli import main

    main()
