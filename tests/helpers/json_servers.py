"""Real HTTP servers of JSON on this machine, with a record of their requests."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class JsonServer:
    """A real HTTP server on this machine, and a record of its requests.

    answer: called with the path and the JSON body of a POST, or None for a GET; returns status, JSON or bytes or an
            iterator of bytes, which is a stream, and optional headers of the response
    paths, bodies, headers: one entry per request so far
    most_at_once:           highest number of requests in progress at one time
    """

    answer: Callable[[str, Any], tuple[int, Any] | tuple[int, Any, dict[str, str]]]
    paths: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""


class HTTPServer(ThreadingHTTPServer):
    """Holds many new connections: beyond 5, the default, a client that connects would try again a second later."""

    request_queue_size = 128


@contextmanager
def json_servers() -> Iterator[Callable[..., JsonServer]]:
    """Yield a function that starts a server, at a free port if none is named, which stops with the context."""
    started: list[HTTPServer] = []

    def start(answer: Callable[[str, Any], Any], *, host: str = "127.0.0.1", port: int = 0) -> JsonServer:
        record = JsonServer(answer)
        lock, open_now = threading.Lock(), [0]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length", 0))
                self._answer(json.loads(self.rfile.read(length)) if length else None)

            def _answer(self, body: Any) -> None:
                with lock:
                    record.paths.append(self.path)
                    record.bodies.append(body)
                    record.headers.append({name.lower(): value for name, value in self.headers.items()})
                    open_now[0] += 1
                    record.most_at_once = max(record.most_at_once, open_now[0])
                try:
                    status, content, *headers = record.answer(self.path, body)
                finally:
                    with lock:
                        open_now[0] -= 1
                whole = content if isinstance(content, bytes) else None
                if whole is None and not isinstance(content, Iterator):
                    whole = json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in (headers[0] if headers else {}).items():
                        self.send_header(name, value)
                    if whole is not None:
                        self.send_header("content-length", str(len(whole)))
                    self.end_headers()
                    for part in content if whole is None else [whole]:
                        self.wfile.write(part)
                except ConnectionError:
                    pass  # the client disconnected, as some tests do

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer((host, port), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        record.url = f"http://{host}:{server.server_port}"
        return record

    try:
        yield start
    finally:
        for server in started:
            server.shutdown()
            server.server_close()
