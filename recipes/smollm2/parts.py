"""Print the mean of each reward before and after a run, with 95 % intervals, of two files of `rekatrain evaluate`.

python recipes/smollm2/parts.py runs/multi-task/first.json runs/multi-task/last.json
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Print a row per reward."""
    first, last = (json.loads(Path(name).read_text(encoding="utf-8"))["rewards"] for name in sys.argv[1:3])
    print("| reward | answers | before | 95 % interval | after | 95 % interval |")
    print("|---|---|---|---|---|---|")
    for name, before in first.items():
        cells = [f"{part['mean']:.3f} | {part['low']:.3f} to {part['high']:.3f}" for part in (before, last[name])]
        print(f"| `{name}` | {before['num_graded']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
