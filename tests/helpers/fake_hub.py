"""A hub on this machine that creates a repository and takes one commit of small files."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that create a repository and take a commit of small files."""

    created: list[dict]
    files: dict[str, bytes]
    status: int

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        answer: dict = {}
        if self.path == "/api/repos/create":
            self.created.append({**json.loads(body), "token": self.headers["authorization"]})
            answer = {"url": "https://huggingface.co/me/model"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": "https://huggingface.co/me/model/commit/abc", "commitOid": "abc"}
        self._send(answer)

    def do_GET(self) -> None:
        self._send({"id": "me/model", "siblings": [], "sha": "abc"})

    def _send(self, answer: dict) -> None:
        content = json.dumps(answer).encode()
        self.send_response(self.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve_hub() -> Iterator[type[Hub]]:
    """Run a hub, and give the process its address, a token and a network; yield what it has received."""
    handler = type("OneHub", (Hub,), {"created": [], "files": {}, "status": 200})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("HF_TOKEN", "hf_secret")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield handler
    server.shutdown()
    server.server_close()
