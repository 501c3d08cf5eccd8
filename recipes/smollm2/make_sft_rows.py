"""Write SFT rows of worked sums, as JSONL of messages: one line of reasoning for each addition.

python recipes/smollm2/make_sft_rows.py runs/quickstart/sft.jsonl
python recipes/smollm2/make_sft_rows.py runs/reasoning/sft.jsonl --recipe recipes/smollm2/reasoning-rloo.yaml
"""

import argparse
import json
from pathlib import Path

from ruamel.yaml import YAML

from rekatrain.data.sources import load_rows

# SFT takes rows of the same data set, so that the held-out rows of RLOO are held out from SFT too.
RLOO_RECIPE = Path(__file__).parent / "rloo.yaml"
NUM_ROWS = 512


def main() -> None:
    """Write worked sums that are not in the held-out rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSONL file to write")
    parser.add_argument("--recipe", type=Path, default=RLOO_RECIPE, help="recipe whose dataset has the sums")
    options = parser.parse_args()
    file: Path = options.file
    recipe = YAML(typ="safe", pure=True).load(options.recipe)
    held_out = {row.messages[0]["content"] for row in load_rows(**recipe["eval_dataset"]).rows}
    rows = [row for row in load_rows(**recipe["dataset"]).rows if row.messages[0]["content"] not in held_out]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        for row in rows[:NUM_ROWS]:
            user, assistant = row.messages
            thought = work_out(user["content"].removeprefix("Calculate ").removesuffix("."))
            messages = [user, {**assistant, "reasoning_content": thought}]
            lines.write(json.dumps({"messages": messages}) + "\n")


def work_out(expression: str) -> str:
    """Return the additions of a sum, from left to right.

    >>> work_out("7 + 25 + 10")
    '7 + 25 = 32\\n32 + 10 = 42'
    """
    total, *others = [int(term) for term in expression.split(" + ")]
    steps = []
    for term in others:
        steps.append(f"{total} + {term} = {total + term}")
        total += term
    return "\n".join(steps)


if __name__ == "__main__":
    main()
