"""A client of a JSON endpoint over HTTP: bounded concurrency, a time limit, retries with back-off, no secret shown.

The key of an endpoint is read from the environment each time it is needed. It is never stored, so that neither the
recipe, a checkpoint nor an error can hold it, and it is masked in all text that a server sends back.
"""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx2
from annotated_types import Ge, Gt, Le
from pydantic import FiniteFloat
from tenacity import AsyncRetrying, retry_if_exception_type

from rekatrain.data.errors import InputError
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.outage import Request, ServerAway, Servers, TransientError

# Worth another attempt: overload, or a failure of a proxy or of the server itself.
TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504, 529}
# A proxy's answers for a server that is not there.
AWAY_STATUS = {502, 503, 504}
PROBE_SECONDS = 5.0
MAX_REPLY, CHUNK = 64 << 20, 1 << 16  # bytes
SHOWN_CHARACTERS = 200
MASK = "***"

Json = dict[str, Any]  # Any: a JSON value, not yet checked
Post = Callable[[str, Json], Awaitable[Json | RewardError]]
Count = Annotated[int, Ge(1)]
Retries = Annotated[int, Ge(0)]
Seconds = Annotated[FiniteFloat, Gt(0)]
Minutes = Annotated[FiniteFloat, Ge(0), Le(10_000)]


class Endpoint:
    """Posts JSON to one server, or to several in turn; `num_requests` and `num_retries` count since the last reset."""

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        api_key_env: str | None,
        concurrency: Count,
        request_timeout: Seconds,
        max_retries: Retries,
        outage_timeout: Minutes = 0.0,
    ) -> None:
        """Check the URLs and that the key is set; nothing is sent.

        url:             http or https, without a user, a password or a query: those could hold a secret; or a list of
                         equal servers, which take turns; another one takes over where one is away
        api_key_env:     name of the environment variable with the bearer token
        concurrency:     requests in flight
        request_timeout: seconds for one attempt, from its start to its whole answer
        max_retries:     further attempts after a transient failure: no connection, no answer in time, 429, 5xx
        outage_timeout:  minutes for which requests wait and ask again if no server is there, beyond the retries; then
                         ServerAway is raised
        """
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise InputError("the list of URLs is empty; write at least one, such as http://host:port/v1")
        for one in urls:
            _check_url(one)
        if api_key_env is not None:
            _read_key(api_key_env)
        self._servers = Servers([one.rstrip("/") for one in urls], outage_seconds=60 * outage_timeout)
        self.url = ", ".join(self._servers.urls)
        self.num_requests = self.num_retries = 0
        self._api_key_env, self._concurrency = api_key_env, concurrency
        self._request_timeout = request_timeout
        self._max_retries = max(max_retries, len(urls) - 1)

    async def post_all(self, path: str, bodies: Sequence[Json]) -> list[Json | RewardError]:
        """Return the servers' JSON objects in the order of `bodies`; an error for a request that failed.

        Raises ServerAway if no server answers for `outage_timeout` minutes.
        """
        async with self.connect() as post:
            return list(await asyncio.gather(*[post(path, body) for body in bodies]))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Post]:
        """Yield a function that posts a body to a path and returns a server's JSON object, or the request's error."""
        key = _read_key(self._api_key_env) if self._api_key_env else None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=self._concurrency)
        in_flight = asyncio.Semaphore(self._concurrency)
        async with httpx2.AsyncClient(headers=headers, timeout=self._request_timeout, limits=limits) as client:

            async def post(path: str, body: Json) -> Json | RewardError:
                async with in_flight:
                    try:
                        return await self._post_with_retries(client, path, body, key)
                    except RewardError as error:
                        return type(error)(_mask(str(error), key))
                    except ServerAway:
                        raise
                    except Exception as error:  # one that no one has foreseen: the others of the batch count
                        shown = f"the request to {self.url}{path} failed: {type(error).__name__}: {error}"
                        return RewardError(_mask(shown, key))

            yield post

    async def _post_with_retries(self, client: httpx2.AsyncClient, path: str, body: Json, key: str | None) -> Json:
        request = Request(self._servers, self._max_retries)
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(TransientError),
            wait=request.seconds_to_wait,
            stop=request.is_given_up,
            reraise=True,
        )
        async for attempt in attempts:
            with attempt:
                self.num_requests += 1
                self.num_retries += attempt.retry_state.attempt_number > 1
                url = self._servers.choose()
                try:
                    answer = await self._post(client, f"{url}{path}", body, key)
                except TransientError as error:
                    self._servers.failed(url, error)
                    is_last = attempt.retry_state.attempt_number > self._max_retries
                    may_wait = is_last and error.is_away and self._servers.outage_seconds > 0
                    if may_wait and await _is_there(client, url):
                        self._servers.answered(url)  # it is this request that it does not answer
                    raise
                except RewardError:
                    self._servers.answered(url)
                    raise
                self._servers.answered(url)
                return answer
        raise AssertionError("reraise leaves no other way out")

    async def _post(self, client: httpx2.AsyncClient, url: str, body: Json, key: str | None) -> Json:
        """Return the server's object, in which the key is masked; text of the server is masked before it is cut."""
        try:
            # httpx's own limits are per read: a server that sends one byte at a time would never reach them.
            async with asyncio.timeout(self._request_timeout):
                async with client.stream("POST", url, json=body) as response:
                    content = await _read(response, url)
        except TimeoutError:
            raise TransientError(f"{url} gave no answer within {self._request_timeout:g} s", is_away=True) from None
        except httpx2.TransportError as error:
            message = f"{url} cannot be reached: {type(error).__name__} {error}".rstrip()
            raise TransientError(message, is_away=True) from None
        except httpx2.DecodingError as error:
            raise TransientError(f"{url} sent a body that cannot be decoded: {error}") from None
        text = _mask(content.decode(response.encoding or "utf-8", errors="replace"), key)
        if response.status_code != 200:
            message = f"{url} answered {response.status_code}: {shorten(text)}"
            if response.status_code not in TRANSIENT_STATUS:
                raise RejectedError(message)
            wait = _seconds(response.headers.get("retry-after"))
            raise TransientError(message, wait=wait, is_away=response.status_code in AWAY_STATUS)
        try:
            answer = json.loads(text)
            if key is not None:  # also where the server has escaped its letters
                answer = json.loads(_mask(json.dumps(answer, ensure_ascii=False), key))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise RewardError(f"{url} answered no JSON object: {shorten(text)}")
        return answer


async def _is_there(client: httpx2.AsyncClient, url: str) -> bool:
    """Return True if the server answers a GET, whatever it says."""
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            return (await client.get(url)).status_code not in AWAY_STATUS
    except (TimeoutError, httpx2.HTTPError):
        return False


async def _read(response: httpx2.Response, url: str) -> bytes:
    """Return the body; raise RewardError if it is too long: a small one may unpack to many gigabytes."""
    content = bytearray()
    async for chunk in response.aiter_bytes(CHUNK):
        content += chunk
        if len(content) > MAX_REPLY:
            raise RewardError(f"{url} sent more than {MAX_REPLY >> 20} MiB")
    return bytes(content)


class RejectedError(RewardError):
    """The server rejects this request, however often it is sent."""


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a Retry-After header; 0 for none and for a date, where the back-off decides."""
    return float(retry_after) if retry_after and re.fullmatch(r"\d{1,6}(\.\d+)?", retry_after) else 0.0


def _check_url(url: str) -> None:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise InputError("the URL cannot be parsed; write it as http://host:port/v1") from None
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise InputError(
            "the URL holds a user, a query or a fragment; secrets come from the environment, see api_key_env"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"the URL must begin with http:// or https:// and a host, not {url!r}")


def _read_key(name: str) -> str:
    key = os.environ.get(name, "").strip()
    if not key:
        raise InputError(f"the environment variable {name} (api_key_env) is not set; set it to the endpoint's key")
    return key


def _mask(text: str, key: str | None) -> str:
    if not key:
        return text
    return text.replace(key, MASK).replace(json.dumps(key, ensure_ascii=False)[1:-1], MASK)


def shorten(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return a server's text as one line of at most `limit` characters and an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}..."
