"""A stand-in for the Python of an environment with vLLM: `-m vllm...` becomes a server that answers as stand_in.py.

Like vLLM it has a process for its engine, which would outlive it.
"""

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PROJECT = Path(__file__).parents[2]


def main(arguments: list[str]) -> None:
    """Serve `--model` on `--port`, or say that vLLM is here."""
    if arguments[0] == "-c":
        return
    options = dict(zip(arguments, arguments[1:], strict=False))
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", "VLLM::EngineCore"])
    sys.path.insert(0, str(PROJECT))
    import torch
    from transformers import AutoTokenizer

    from tests.vllm.stand_in import StandIn

    torch.set_num_threads(1)
    folder = Path(options["--model"])
    answer = StandIn(folder, AutoTokenizer.from_pretrained(folder), seed=3)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", 0))
            self._answer(json.loads(self.rfile.read(length)) if length else None)

        def _answer(self, body: object) -> None:
            status, content = answer(self.path, body)[:2]
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: object) -> None:
            pass

    print("ready", flush=True)
    ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
