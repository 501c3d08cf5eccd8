"""Write a model of the first layers of another one, as a small base for a reward model.

python recipes/smollm2/first_layers.py runs/quickstart/smollm2-135m runs/multi-task/first-layers --layers 6
"""

import argparse
from pathlib import Path

from rekatrain.trainer.terminal import set_up_terminal


def main() -> None:
    """Write the folder, unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, default=6, help="number of layers to keep (6)")
    options = parser.parse_args()
    if (options.folder / "tokenizer.json").exists():  # written last
        print(f"{options.folder} exists already")
        return
    set_up_terminal()  # before the libraries read what it sets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, num_hidden_layers=options.layers, dtype=torch.float32)
    model.save_pretrained(options.folder)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
