"""`transformers serve` answers as `generate` does, by the export's own start script.

VLLM_PYTHON=/path/to/vllm/bin/python python -m pytest -m vllm tests/vllm/test_transformers_serve.py

vLLM's environment has the packages of transformers[serving]: fastapi, uvicorn and openai.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rekatrain.data.chat import STOP
from rekatrain.trainer.cli import main
from tests.helpers.exports import ANSWER, QUESTION, ask, serve_by_transformers, train_run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no python that has vLLM"),
]
# What the model has learned, a question that it has not, a second round with a reasoning, and an open turn.
CONVERSATIONS = [
    QUESTION,
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}],
    [*QUESTION, {"role": "assistant", "content": "<reasoning>\nTwice 3.\n</reasoning>\n\n6"}, *QUESTION],
]


@pytest.fixture(scope="module")
def export(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged export; read only."""
    folder = tmp_path_factory.mktemp("transformers")
    main(["export", str(train_run(folder, tokenizer)), str(folder / "my export")])
    return folder / "my export"


@pytest.fixture(scope="module")
def client(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """The openai client of a server of the export."""
    with serve_by_transformers(export, tmp_path_factory.mktemp("server")) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def generate(export: Path, messages: list[dict[str, str]]) -> str:
    """Return the greedy answer by transformers' `generate`, with its stop."""
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=60, do_sample=False, stop_strings=[STOP], tokenizer=tokenizer)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]))


def test_transformers_serve_answers_as_generate(client: OpenAI, export: Path) -> None:
    answers = []
    for messages in CONVERSATIONS:
        choice = ask(client, messages, model=export.name, stop=[STOP]).choices[0]
        streamed = ask(client, messages, model=export.name, stop=[STOP], stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
        answers.append(choice.message.content)
        assert choice.message.content == text == generate(export, messages)
    assert answers[0] == ANSWER and len(set(answers)) > 1


def test_chat_asks_transformers_serve(
    client: OpenAI, export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, end = os.pipe()
    os.write(end, f"{QUESTION[0]['content']}\n".encode())
    os.close(end)
    with os.fdopen(pipe) as lines:
        monkeypatch.setattr("sys.stdin", lines)
        main(["chat", "--url", str(client.base_url).rstrip("/"), "--model", export.name])
    assert "Twice 3." in (shown := capsys.readouterr().out) and "6" in shown and STOP not in shown
