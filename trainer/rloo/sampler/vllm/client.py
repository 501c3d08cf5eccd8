"""One vLLM server over HTTP: a request is answered, refused for good, or has met a server that is down for now."""

import asyncio
from types import TracebackType
from typing import Any

import httpx2

from rekatrain.data.errors import InputError

# Overload, a proxy's trouble or an engine that died: the same request may be answered later, or elsewhere.
PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
SHOWN_CHARACTERS = 300
# Seconds for what a server answers at once, busy or not.
GET_TIMEOUT = 60.0

Json = dict[str, Any]  # Any: a JSON value, not yet checked


class ServerDown(Exception):
    """No answer, and none to be expected at once."""


class ServerRefused(Exception):
    """The server's own refusal of a request."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerClient:
    """Talks to the server at `url`; used within `async with`."""

    def __init__(self, url: str, *, request_timeout: float) -> None:
        """`request_timeout`: seconds for one request, from its start to its whole answer."""
        self.url = check_url(url)
        self._timeout = request_timeout

    async def __aenter__(self) -> "ServerClient":
        # Nothing is queued here: the pool bounds what is in flight. httpx's own limits are for each read.
        self._http = httpx2.AsyncClient(timeout=None, limits=httpx2.Limits(max_connections=None))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> Json:
        """The JSON object at a path; empty where the answer is none."""
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: Json | None = None) -> Json:
        """The JSON object that a request is answered with; empty where the answer is none."""
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: Json | None) -> Json:
        where = f"the vLLM server {self.url}"
        timeout = self._timeout if method == "POST" else min(self._timeout, GET_TIMEOUT)
        try:
            async with asyncio.timeout(timeout):
                response = await self._http.request(method, f"{self.url}{path}", json=body)
        except TimeoutError:
            raise ServerDown(f"{where} gave no answer within {timeout:g} s") from None
        except httpx2.TransportError as error:
            raise ServerDown(f"{where} cannot be reached: {type(error).__name__} {error}".rstrip()) from None
        if response.status_code != 200:
            told = f"{where} answered {path} with {response.status_code}: {_shorten(response.text)}"
            # What vLLM's engine says of one request while it lives has no other status either.
            is_final = response.status_code == 500 and "method failed" in response.text
            if response.status_code in PASSING_STATUS and not is_final:
                raise ServerDown(told)
            raise ServerRefused(told, response.status_code)
        try:
            answer = response.json()
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}


def check_url(url: str) -> str:
    """The URL without a final slash; InputError unless it is a plain one of a server's root."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.path not in ("", "/"):
        raise InputError(f"rloo.vllm_server_base_url {url!r} must read http://HOST:PORT, without /v1 or a password")
    return url.rstrip("/")


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}..."
