"""Print the results of the quickstart: accuracies with intervals, and three answers of the exported folder.

    python recipes/smollm2/summary.py runs/quickstart

The answers come from `generate` of transformers, without code of this project: chat template and tokenizer are those of
the exported folder.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Print the table and the answers."""
    folder = Path(sys.argv[1])
    print(f"{'model':8} held-out accuracy, 95 % interval")
    for name in ("base", "sft", "rloo"):
        result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        interval = f"[{result['low']:.1%}, {result['high']:.1%}]"
        print(f"{name:8} {result['accuracy']:6.1%}  {interval}  of {result['num_graded']}")
    held_out = json.loads((folder / "rloo.json").read_text(encoding="utf-8"))["answers"][:3]

    export = folder / "rloo-export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    for answer in held_out:
        question = answer["prompt"].removeprefix("human: ").removesuffix(" <sep> assistant:")
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        # A turn ends with a text, not with a token: transformers needs the tokenizer to search for it.
        output = model.generate(
            **prompt, stop_strings=["<sep>"], tokenizer=tokenizer, max_new_tokens=64, do_sample=False
        )
        print(f"\n{tokenizer.decode(output[0])}")


if __name__ == "__main__":
    main()
