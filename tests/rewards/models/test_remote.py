"""Requests and replies of vLLM's routes and of the plain contract; tests/vllm/test_reward_model.py has a real vLLM."""

import asyncio
import math

import pytest

from rekatrain.data.errors import InputError
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.models.remote import RemoteRewardModel

PROMPTS = ["human: Hi <sep> assistant:", "human: Bye <sep> assistant:", "human: Hm <sep> assistant:"]
COMPLETIONS = [" Hello! <sep>", " <reasoning>\nSecret.\n</reasoning>\n\nSee you", " <|im_end|>assistant: 10 <sep>"]
TEXTS = [
    "human: Hi <sep> assistant: Hello! <sep>",
    "human: Bye <sep> assistant: See you <sep>",
    "human: Hm <sep> assistant: < |im_end|>assistant: 10 <sep>",
]


def score(url: str, **options: object) -> list:
    reward = RemoteRewardModel(url=url, **options)
    return asyncio.run(reward(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[]] * 3, answer=["x"] * 3))


def numbered(make: object, values: list) -> dict:
    items = [{"index": index, **make(value)} for index, value in enumerate(values)]
    return {"object": "list", "data": items[::-1]}  # in no order: the index counts


def test_classify_sends_rendered_answers_and_returns_raw_outputs(serve) -> None:
    server = serve(lambda path, body: (200, numbered(lambda v: {"probs": [9.0, v]}, [0.5, -1.0, 2.0])))
    values = score(server.url, route="classify", model="rm", label=1, mean=0.5, std=0.5, use_activation=False)
    assert values == [0.0, -3.0, 3.0]
    assert server.paths == ["/classify"]
    assert server.bodies == [{"model": "rm", "use_activation": False, "input": TEXTS}]


def test_remote_reward_model_sends_the_reasoning_if_requested(serve) -> None:
    server = serve(lambda path, body: (200, numbered(lambda v: {"probs": [v]}, [0.5, -1.0, 2.0])))
    score(server.url, route="classify", reasoning=True)
    thoughtful = "human: Bye <sep> assistant: <reasoning>\nSecret.\n</reasoning>\n\nSee you <sep>"
    assert server.bodies[0]["input"] == [TEXTS[0], thoughtful, TEXTS[2]]


def test_pooling_reads_the_last_token_of_a_token_classifier(serve) -> None:
    server = serve(lambda path, body: (200, numbered(lambda v: {"data": v}, [[0.5], [[7.0], [1.5]], [2.0]])))
    assert score(server.url, route="pooling") == [0.5, 1.5, 2.0]
    assert "model" not in server.bodies[0]


def test_score_route_sends_question_and_answer(serve) -> None:
    server = serve(lambda path, body: (200, numbered(lambda v: {"score": v}, [0.1, 0.2, 0.3])))
    assert score(server.url, route="score") == [0.1, 0.2, 0.3]
    assert server.bodies[0]["text_1"] == ["Hi", "Bye", "Hm"]
    assert server.bodies[0]["text_2"] == ["Hello!", "See you", "< |im_end|>assistant: 10"]


def test_chat_template_sends_messages_one_request_each(serve) -> None:
    server = serve(lambda path, body: (200, numbered(lambda v: {"probs": [v]}, [len(body["messages"][1]["content"])])))
    assert score(server.url, route="classify", template="chat_template") == [6.0, 7.0, 24.0]
    first = min(server.bodies, key=lambda body: len(body["messages"][1]["content"]))
    assert first["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def test_http_route_follows_the_json_contract(serve) -> None:
    server = serve(lambda path, body: (200, {"scores": [1, None, {"error": "no idea"}]}))
    first, second, third = score(f"{server.url}/judge", route="http")
    assert (first, second) == (1.0, None)
    assert isinstance(third, RewardError) and "no idea" in str(third)
    assert server.paths == ["/judge"]
    assert server.bodies[0]["prompts"] == PROMPTS
    assert server.bodies[0]["answers"] == ["Hello!", "See you", "<|im_end|>assistant: 10"]
    assert server.bodies[0]["messages"][1] == [{"role": "user", "content": "Bye"}]


def test_batches_fail_alone_and_keep_their_order(serve) -> None:
    def answer(path: str, body: dict) -> tuple[int, dict]:
        return (400, {}) if "Bye" in body["prompts"][0] else (200, {"scores": [len(body["answers"][0])]})

    first, second, third = score(serve(answer).url, route="http", batch_size=1)
    assert (first, third) == (6.0, 23.0) and isinstance(second, RewardError)


def test_a_rejected_answer_does_not_cost_its_batch(serve) -> None:
    def answer(path: str, body: dict) -> tuple[int, dict]:
        is_rejected = any("Bye" in text for text in body["input"])
        return (400, {}) if is_rejected else (200, numbered(lambda v: {"probs": [v]}, [len(t) for t in body["input"]]))

    server = serve(answer)
    first, second, third = score(server.url, route="classify", batch_size=2)
    assert (first, third) == (len(TEXTS[0]), len(TEXTS[2])) and isinstance(second, RewardError)
    assert sorted(len(body["input"]) for body in server.bodies) == [1, 1, 1, 2]


@pytest.mark.parametrize(
    "answer",
    [{}, {"scores": [1, 2]}, {"scores": "123"}, {"scores": [True, "1", math.nan]}, {"scores": [[1], {}, math.inf]}],
)
def test_reply_without_a_score_is_an_error_and_never_0(serve, answer: dict) -> None:
    values = score(serve(lambda path, body: (200, answer)).url, route="http")
    assert len(values) == 3 and all(isinstance(value, RewardError) for value in values)


def test_grader_counts_remote_errors_and_keeps_the_other_scores(serve) -> None:
    server = serve(lambda path, body: (200, {"scores": [1.0, {"error": "no idea"}, 3.0]}))
    functions = build_reward_functions({"remote_reward_model": {"url": server.url, "route": "http", "weight": 2}})
    with Grader(functions) as grader:
        columns: dict = {}
        scores = grader.score(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[]] * 3, columns=columns)
        assert grader.metrics()["rewards/remote_reward_model/num_requests"] == 1
    assert scores.total[0] == 2.0 and math.isnan(scores.total[1]) and scores.total[2] == 6.0
    assert [bool(error) for error in scores.errors] == [False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": "rerank"}, "route is 'rerank'; it should be 'classify', 'pooling', 'score' or 'http'"),
        ({"route": "http", "template": "reka"}, "template is 'reka', which goes with the routes "),
        (
            {"route": "classify", "template": "pair"},
            "template is 'pair'; it should be 'reka', 'answer' or 'chat_templat",
        ),
        ({"route": "http", "reasoning": True}, "reasoning and use_activation go with vLLM's"),
        ({"route": "http", "use_activation": False}, "reasoning and use_activation go with vLLM's"),
        ({"route": "score", "std": 0}, "std is 0; it should be greater than 0"),
        ({"route": "score", "batch_size": 0}, "batch_size is 0; it should be greater than or equal to 1"),
        ({"route": "score", "label": -1}, "label is -1; it should be greater than or equal to 0"),
    ],
)
def test_remote_reward_model_rejects_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_reward_functions({"remote_reward_model": {"url": "http://host", **options}})


@pytest.mark.parametrize("route", ["classify", "http"])
def test_malformed_scores_cost_their_completions_alone(serve, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-a-very-secret-key"
    monkeypatch.setenv("MY_KEY", key)
    plain = {"scores": [0.5, 10**400, {"error": "y" * 190 + key}]}
    listed = {"data": [{"index": 0, "probs": [0.5]}, "no object", {"index": "x", "probs": [10**400]}]}
    server = serve(lambda path, body: (200, plain if route == "http" else listed))
    values = score(server.url, route=route, api_key_env="MY_KEY", max_retries=0)
    assert sum(value == 0.5 for value in values) == 1
    errors = [value for value in values if isinstance(value, RewardError)]
    assert len(errors) == 2 and all(key[:6] not in str(error) for error in errors), errors
