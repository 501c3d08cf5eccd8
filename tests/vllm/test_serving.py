"""vLLM serves exports by their own start scripts and with their own plugin. Slow: two servers, a minute each.

VLLM_PYTHON=/path/to/vllm/bin/python python -m pytest -m vllm tests/vllm/test_serving.py
"""

import os
from collections.abc import Iterator

import pytest
from openai import OpenAI
from transformers import PreTrainedTokenizerFast

from rekatrain.data.chat import parse_completion, render_prompt
from rekatrain.trainer.cli import main
from tests.helpers.exports import ANSWER, QUESTION, ask, serve_by_vllm, train_run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no python that has vLLM"),
]


@pytest.fixture(scope="module", params=["merged", "adapter"])
def client(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenAI]:
    """The openai client of a vLLM that serves the export `rloo`."""
    folder = tmp_path_factory.mktemp("vllm")
    run = train_run(folder, tokenizer)
    main(["export", str(run), str(folder / "rloo"), "--as", request.param])
    with serve_by_vllm(folder / "rloo", folder) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_answer_is_split_and_stops_with_or_without_a_stop(client: OpenAI) -> None:
    expected = parse_completion(ANSWER)
    for stop in (None, ["<sep>"], "<sep>"):
        choice = ask(client, QUESTION, model="rloo", stop=stop).choices[0]
        assert (choice.message.reasoning, choice.message.content) == (expected.reasoning, expected.answer)
        assert choice.finish_reason == "stop" and choice.stop_reason == "<sep>"


def test_stream_is_the_answer_in_chunks(client: OpenAI) -> None:
    expected = parse_completion(ANSWER)
    deltas = [chunk.choices[0].delta for chunk in ask(client, QUESTION, model="rloo", stream=True)]
    reasoning = [delta.reasoning for delta in deltas if getattr(delta, "reasoning", None)]
    assert len(reasoning) > 2 and "".join(reasoning) == expected.reasoning
    assert "".join(delta.content or "" for delta in deltas) == expected.answer


def test_choices_are_the_same_streamed_or_not(client: OpenAI) -> None:
    options = {"model": "rloo", "n": 3, "temperature": 1.0, "seed": 3}
    whole = [(choice.message.reasoning, choice.message.content) for choice in ask(client, QUESTION, **options).choices]
    streamed = [["", ""] for _ in whole]
    for chunk in ask(client, QUESTION, stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index][0] += getattr(choice.delta, "reasoning", None) or ""
            streamed[choice.index][1] += choice.delta.content or ""
    assert [(reasoning or None, content or None) for reasoning, content in streamed] == whole
    assert len(set(whole)) > 1


def test_chat_renders_turns_as_we_do(client: OpenAI) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *QUESTION,
        {"role": "assistant", "content": "<reasoning>\nTwice 3.\n</reasoning>\n\n6"},
        *QUESTION,
    ]
    chat = ask(client, messages, model="rloo")
    text = client.completions.create(
        model="rloo", prompt=render_prompt(messages), max_tokens=60, temperature=0, stop="<sep>"
    )
    expected = parse_completion(text.choices[0].text)
    message = chat.choices[0].message
    assert ((message.reasoning or ""), (message.content or "")) == ((expected.reasoning or ""), expected.answer)
    assert chat.usage.prompt_tokens == text.usage.prompt_tokens


def test_prefilled_thought_continues(client: OpenAI) -> None:
    opened = [*QUESTION, {"role": "assistant", "content": "<reasoning>\nTwice"}]
    message = ask(client, opened, model="rloo").choices[0].message
    assert (message.reasoning, message.content) == ("3.", "6")


def test_completions_route_needs_the_clients_stop(client: OpenAI) -> None:
    settings = {"model": "rloo", "prompt": render_prompt(QUESTION), "max_tokens": 60, "temperature": 0}
    assert client.completions.create(**settings).choices[0].text.startswith(ANSWER)
    stopped = client.completions.create(**settings, stop="<sep>").choices[0]
    assert stopped.text + "<sep>" == ANSWER and stopped.finish_reason == "stop"
