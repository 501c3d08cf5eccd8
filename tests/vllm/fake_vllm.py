"""A stand-in for the Python of an environment with vLLM: `-m vllm...` becomes a server that answers as stand_in.py.

Like vLLM it has a process for its engine, which would outlive it.
"""

import subprocess
import sys
import threading
from pathlib import Path

PROJECT = Path(__file__).parents[2]


def write_stand_in(file: Path) -> str:
    """Write a program that stands in for vLLM's Python -> its path."""
    file.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} "$@"\n')
    file.chmod(0o755)
    return str(file)


def main(arguments: list[str]) -> None:
    """Serve `--model` on `--port`, or say that vLLM is here."""
    if arguments[0] == "-c":
        return
    options = dict(zip(arguments, arguments[1:], strict=False))
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", "VLLM::EngineCore"])
    sys.path.insert(0, str(PROJECT))
    import torch
    from transformers import AutoTokenizer

    from tests.helpers.json_servers import json_servers
    from tests.vllm.stand_in import StandIn

    torch.set_num_threads(1)
    folder = Path(options["--model"])
    answer = StandIn(folder, AutoTokenizer.from_pretrained(folder), seed=3)

    with json_servers() as serve:
        serve(answer, host=options["--host"], port=int(options["--port"]))
        print("ready", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
