"""Write the SFT rows of the quickstart: worked sums, as JSONL of messages.

python recipes/smollm2/make_sft_rows.py runs/quickstart/sft.jsonl
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
    file = parser.parse_args().file
    recipe = YAML(typ="safe", pure=True).load(RLOO_RECIPE)
    held_out = {row.messages[0]["content"] for row in load_rows(**recipe["eval_dataset"]).rows}
    rows = [row for row in load_rows(**recipe["dataset"]).rows if row.messages[0]["content"] not in held_out]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        for row in rows[:NUM_ROWS]:
            user, assistant = row.messages
            expression = user["content"].removeprefix("Calculate ").removesuffix(".")
            thought = f"{expression} = {assistant['content']}"
            messages = [user, {**assistant, "reasoning_content": thought}]
            lines.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
