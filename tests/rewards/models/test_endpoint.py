"""Endpoints, against a real server: what is retried, what is bounded, and that no secret is shown or kept."""

import asyncio
import gzip
import logging
import resource
import threading
import time
import zlib

import pytest

from rekatrain.data.errors import InputError
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models import endpoint, outage
from rekatrain.rewards.models.endpoint import Endpoint

KEY = "sk-a-very-secret-key"


def make(url: str, **options: object) -> Endpoint:
    settings = {"api_key_env": None, "concurrency": 4, "request_timeout": 5.0, "max_retries": 3} | options
    return Endpoint(url, **settings)


def post(server: Endpoint, *bodies: dict) -> list:
    return asyncio.run(server.post_all("/it", bodies))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "_BACK_OFF", lambda state: 0.0)


def test_post_all_keeps_the_order_of_the_requests(serve) -> None:
    def answer(path: str, body: dict) -> tuple[int, dict]:
        time.sleep(0.05 * (3 - body["n"]))
        return 200, {"n": body["n"]}

    server = serve(answer)
    assert post(make(server.url + "/"), *[{"n": n} for n in range(3)]) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert server.paths == ["/it"] * 3 and server.most_at_once > 1


def test_post_all_bounds_the_requests_in_flight(serve) -> None:
    server = serve(lambda path, body: time.sleep(0.02) or (200, {}))
    post(make(server.url, concurrency=3), *[{}] * 20)
    assert server.most_at_once == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_post_all_retries_a_transient_failure(serve, status: int) -> None:
    def answer(path: str, body: dict) -> tuple[int, dict]:
        return (status, {"why": "busy"}) if len(server.bodies) < 3 else (200, {"ok": True})

    server = serve(answer)
    client = make(server.url)
    assert post(client, {}) == [{"ok": True}]
    assert (client.num_requests, client.num_retries) == (3, 2)


def test_post_all_returns_an_error_for_a_failed_request_alone(serve) -> None:
    server = serve(lambda path, body: (500, {"why": "down"}) if body["n"] else (200, {"n": 0}))
    client = make(server.url)
    good, bad = post(client, {"n": 0}, {"n": 1})
    assert good == {"n": 0}
    assert isinstance(bad, RewardError) and '500: {"why": "down"}' in str(bad)
    assert client.num_requests == 1 + 4


def test_post_all_returns_an_error_if_nobody_listens() -> None:
    (error,) = post(make("http://127.0.0.1:9"), {})
    assert isinstance(error, RewardError) and "cannot be reached: ConnectError" in str(error)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_post_all_does_not_retry_a_rejected_request(serve, status: int) -> None:
    server = serve(lambda path, body: (status, {"why": "no"}))
    (error,) = post(make(server.url), {})
    assert isinstance(error, RewardError) and len(server.bodies) == 1


def test_post_all_waits_as_retry_after_says(serve) -> None:
    def answer(path: str, body: dict) -> tuple:
        times.append(time.monotonic())
        return (429, {}, {"Retry-After": "0.3"}) if len(times) == 1 else (200, {})

    times: list[float] = []
    post(make(serve(answer).url), {})
    assert 0.3 <= times[1] - times[0] < 2


def test_post_all_stops_waiting_at_the_time_limit(serve) -> None:
    release = threading.Event()
    server = serve(lambda path, body: release.wait(10) and (200, {}) or (200, {}))
    started = time.monotonic()
    (error,) = post(make(server.url, request_timeout=0.2, max_retries=1), {})
    release.set()
    assert isinstance(error, RewardError) and "no answer within 0.2 s" in str(error)
    assert time.monotonic() - started < 3 and len(server.bodies) == 2


@pytest.mark.parametrize("content", [b"not JSON", b"[1]", b'"text"', b""])
def test_post_all_returns_an_error_for_a_reply_without_an_object(serve, content: bytes) -> None:
    (error,) = post(make(serve(lambda path, body: (200, content)).url), {})
    assert isinstance(error, RewardError) and "no JSON object" in str(error)


def test_post_all_bad_body_costs_its_request_alone(serve) -> None:
    def answer(path: str, body: dict) -> tuple:
        bodies = {
            "gzip": (200, b"no gzip at all", {"content-encoding": "gzip"}),
            "nested": (200, b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
            "digits": (200, b'{"a": ' + b"9" * 10_000 + b"}"),
            "charset": (200, b'{"a": "\xff"}', {"content-type": "application/json; charset=no-such"}),
        }
        return bodies.get(body["kind"], (200, {"ok": True}))

    kinds = ["fine", "gzip", "nested", "digits", "fine"]
    results = post(make(serve(answer).url, max_retries=1), *[{"kind": kind} for kind in kinds])
    assert [results[0], results[4]] == [{"ok": True}] * 2
    assert all(isinstance(result, RewardError) for result in results[1:4])
    assert "cannot be decoded" in str(results[1]) and "no JSON object" in str(results[2])
    assert len(post(make(serve(answer).url, max_retries=0), {"kind": "charset"})) == 1


# Secrets


def test_api_key_is_sent_but_neither_kept_nor_shown(serve, monkeypatch, caplog) -> None:
    monkeypatch.setenv("MY_KEY", KEY)

    def answer(path: str, body: dict) -> tuple[int, dict]:  # a server that tells the key back
        return 401, {"error": f"wrong key {server.headers[-1]['authorization']}"}

    server = serve(answer)
    with caplog.at_level(logging.DEBUG):
        client = make(server.url, api_key_env="MY_KEY")
        (error,) = post(client, {})
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "wrong key Bearer ***" in str(error)
    assert KEY not in f"{error!r} {vars(client)} {caplog.text}"


def test_api_key_is_masked_before_text_is_cut_and_in_replies(serve, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    escaped = "".join(f"\\u{ord(character):04x}" for character in KEY)

    def answer(path: str, body: dict) -> tuple:
        if body["kind"] == "cut":  # the limit of shown characters is in the middle of the key
            return 400, b"x" * (endpoint.SHOWN_CHARACTERS - 8) + KEY.encode()
        if body["kind"] == "no object":
            return 200, b"[" + b"x" * (endpoint.SHOWN_CHARACTERS - 8) + KEY.encode()
        if body["kind"] == "escaped":
            return 200, f'{{"text": "{escaped}", "list": [{{"{escaped}": "Bearer {escaped}"}}]}}'.encode()
        return 200, {"text": f"key {KEY}"}

    client = make(serve(answer).url, api_key_env="MY_KEY")
    results = post(client, *[{"kind": kind} for kind in ("cut", "no object", "escaped", "plain")])
    assert all(KEY[:6] not in str(result) for result in results), results
    assert results[2] == {"text": "***", "list": [{"***": "Bearer ***"}]} and results[3] == {"text": "key ***"}


def test_api_key_that_is_not_set_is_reported_first(monkeypatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(InputError, match="environment variable MY_KEY"):
        make("http://127.0.0.1:9", api_key_env="MY_KEY")


@pytest.mark.parametrize("url", [f"http://user:{KEY}@host", f"http://host/v1?api-key={KEY}", f"http://host/#{KEY}"])
def test_url_with_a_secret_is_rejected(url: str) -> None:
    with pytest.raises(InputError, match="secrets come from the environment") as caught:
        make(url)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "", "http://[::1"])
def test_url_that_is_none_is_rejected(url: str) -> None:
    with pytest.raises(InputError, match="URL"):
        make(url)


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"request_timeout": 0}, {"max_retries": -1}])
def test_endpoint_limits_out_of_range_are_rejected(options: dict) -> None:
    (key,) = options
    judge = {"base_url": "http://host", "model": "judge", "rubric": "Be polite.", **options}
    with pytest.raises(InputError, match=f"rewards.judge.{key} is .*; it should be greater than"):
        build_reward_functions({"judge": judge})


def bombs() -> dict[str, tuple]:
    """Return replies that no client can use: status, body and headers by name."""
    packed = {"content-encoding": "gzip"}
    layers = zlib.compressobj(9, wbits=31)
    bomb = b"".join(layers.compress(b"0" * (1 << 20)) for _ in range(1 << 10)) + layers.flush()  # 1 GiB
    return {
        "gzip bomb": (200, bomb, packed),
        "cut gzip": (200, gzip.compress(b'{"n": 1}' * 1000)[:-20], packed),
        "no gzip": (200, b'{"n": 1}', packed),
        "unknown packing": (200, b"{}", {"content-encoding": "br, zstd"}),
        "deep": (200, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "deep list": (200, b"[" * 200_000),
        "cut": (200, b'{"choices": [{"message": {"content": "{\\"score\\": 1'),
        "cut character": (200, '{"n": "é'.encode()[:-1]),
        "list": (200, b"[1]"),
        "number": (200, b"7"),
        "huge number": (200, b'{"n": ' + b"9" * 5000 + b"}"),
        "empty": (200, b""),
        "page": (200, b"<html>Welcome</html>"),
        "utf-16": (200, '{"n": 1}'.encode("utf-16"), {"content-type": "application/json; charset=utf-7"}),
    }


@pytest.mark.parametrize("kind", bombs())
def test_reply_that_nobody_can_use_costs_its_request(serve, kind: str) -> None:
    answers = bombs()

    def answer(path: str, body: dict | None) -> tuple:
        return answers[body["kind"]] if body and body["kind"] in answers else (200, {"n": 1})

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = post(make(serve(answer).url, max_retries=0), {"kind": "good"}, {"kind": kind}, {"kind": "good"})
    assert results[0] == results[2] == {"n": 1}
    if kind not in ("unknown packing",):
        assert isinstance(results[1], RewardError), results[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10  # KiB
