"""HTTP client of one vLLM server: a request is answered, rejected for good, or fails because the server is down."""

import asyncio
import json
import ssl
from collections.abc import Callable
from functools import cache
from types import TracebackType

import httpx2

from rekatrain.data.errors import InputError
from rekatrain.rewards.models.endpoint import TRANSIENT_STATUS, Json, shorten

SHOWN_CHARACTERS = 300
# Seconds for requests that a server answers at once, even when it is busy.
GET_TIMEOUT = 60.0


class ServerDown(Exception):
    """The server gives no answer now; the same request may succeed later, or on another server."""


class RequestRejected(Exception):
    """The server rejects this request and would reject it again; `status` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerClient:
    """Sends requests to the server at `url`; used within `async with`."""

    def __init__(self, url: str, *, request_timeout: float) -> None:
        """Check the URL; nothing is sent.

        request_timeout: seconds for one request, from its start to the last byte of the response
        """
        self.url = check_url(url)
        self._timeout = request_timeout

    async def __aenter__(self) -> "ServerClient":
        # No queue here: the pool limits the requests in flight. httpx's own time limits are per read, so none is set.
        limits = httpx2.Limits(max_connections=None)
        self._http = httpx2.AsyncClient(timeout=None, limits=limits, verify=_ssl_context())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> Json:
        """Return the JSON object at a path; {} if the response is not a JSON object."""
        return await self._send("GET", path, None)

    async def post(self, path: str, body: Json | None = None) -> Json:
        """Post a body and return the JSON object of the response; {} if it is not a JSON object."""
        return await self._send("POST", path, body)

    async def stream(self, path: str, body: Json, on_event: Callable[[Json], None]) -> None:
        """Post a body and call `on_event` with each JSON object of the stream of server-sent events, as it arrives."""
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._http.stream("POST", f"{self.url}{path}", json={**body, "stream": True}) as response,
            ):
                if response.status_code != 200:
                    await response.aread()
                    self._raise_for_status(path, response)
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        on_event(json.loads(line.removeprefix("data: ")))
        except TimeoutError:
            raise ServerDown(f"the vLLM server {self.url} gave no whole answer within {self._timeout:g} s") from None
        except (httpx2.TransportError, json.JSONDecodeError) as error:
            raise ServerDown(f"the vLLM server {self.url} broke off: {type(error).__name__} {error}".rstrip()) from None

    async def _send(self, method: str, path: str, body: Json | None) -> Json:
        name = f"the vLLM server {self.url}"
        timeout = self._timeout if method == "POST" else min(self._timeout, GET_TIMEOUT)
        try:
            async with asyncio.timeout(timeout):
                response = await self._http.request(method, f"{self.url}{path}", json=body)
        except TimeoutError:
            raise ServerDown(f"{name} gave no answer within {timeout:g} s") from None
        except httpx2.TransportError as error:
            raise ServerDown(f"{name} cannot be reached: {type(error).__name__} {error}".rstrip()) from None
        self._raise_for_status(path, response)
        try:
            content = response.json()
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _raise_for_status(self, path: str, response: httpx2.Response) -> None:
        """Raise ServerDown or RequestRejected unless the status is 200."""
        if response.status_code == 200:
            return
        message = (
            f"the vLLM server {self.url} answered {path} with {response.status_code}: "
            f"{shorten(response.text, SHOWN_CHARACTERS)}"
        )
        # vLLM also answers 500 where its engine is fine and rejects one request: "Call to ... method failed".
        is_final = response.status_code == 500 and "method failed" in response.text
        if response.status_code in TRANSIENT_STATUS and not is_final:
            raise ServerDown(message)
        raise RequestRejected(message, response.status_code)


@cache  # it reads the certificates of the system, and a step may have a client for each of a hundred servers
def _ssl_context() -> ssl.SSLContext:
    return httpx2.create_ssl_context()


def check_url(url: str) -> str:
    """Return the URL without a final slash; raise InputError unless it is the plain root of a server."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.path not in ("", "/"):
        raise InputError(f"rloo.vllm_server_base_url {url!r} must read http://HOST:PORT, without /v1 or a password")
    return url.rstrip("/")
