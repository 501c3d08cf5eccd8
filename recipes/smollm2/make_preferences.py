"""Write 1,100 preferences for the more polite of two answers, split by prompt, as JSONL.

    python recipes/smollm2/make_preferences.py runs/politeness

The pairs are those of "Build a Large Language Model (From Scratch)" (Apache-2.0, answers by Llama-3.1-70B).
"""

import argparse
import hashlib
import json
import random
import urllib.request
from pathlib import Path

URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57/"
    "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json"
)
SHA256 = "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e"
FRACTION_HELD_OUT = 0.2


def main() -> None:
    """Download the pairs, and write train.jsonl and held_out.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the two files")
    parser.add_argument(
        "--source", default=URL, help="URL of the JSON file, such as file:///tmp/pairs.json (default: GitHub)"
    )
    options = parser.parse_args()
    with urllib.request.urlopen(options.source) as response:
        text = response.read()
    if hashlib.sha256(text).hexdigest() != SHA256:
        parser.error(f"{options.source} is not the expected file: its sha256 is {hashlib.sha256(text).hexdigest()}")
    rows = [row for row in json.loads(text) if row["chosen"] != row["rejected"]]  # six pairs prefer neither
    prompts = sorted({(row["instruction"], row["input"]) for row in rows})
    held_out = set(random.Random(0).sample(prompts, round(len(prompts) * FRACTION_HELD_OUT)))
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, is_held_out in (("train", False), ("held_out", True)):
        part = [row for row in rows if ((row["instruction"], row["input"]) in held_out) == is_held_out]
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (options.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{options.folder / name}.jsonl: {len(part)} pairs")


if __name__ == "__main__":
    main()
