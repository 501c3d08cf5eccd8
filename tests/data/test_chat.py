"""The chat format: against golden vectors, against its Jinja template, and rendering against parsing."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from rekatrain.data import chat
from rekatrain.data.chat import (
    FinishReason,
    Message,
    ParsedCompletion,
    encode_text,
    parse_completion,
    parse_prompt,
    render_completion,
    render_prompt,
)
from rekatrain.data.errors import InputError
from tests.conftest import GOLDEN
from tests.data.conversations import CLEAN_TEXTS, CONVERSATIONS, TEXTS, UNHURRIED, assistant, system, user

TEMPLATE = Path(chat.__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def golden() -> list[dict[str, Any]]:
    """Cases of messages, add_generation_prompt, text and ids."""
    return json.loads((GOLDEN / "reka_prompts.json").read_text(encoding="utf-8"))


# Prompts


def test_render_prompt_equals_the_golden_vectors(golden: list[dict[str, Any]]) -> None:
    assert len(golden) == 14
    for case in golden:
        assert render_prompt(case["messages"], case["add_generation_prompt"]) == case["text"], case["name"]


def test_encode_text_equals_the_golden_vectors(golden: list[dict[str, Any]], cl100k: PreTrainedTokenizerFast) -> None:
    for case in golden:
        assert encode_text(render_prompt(case["messages"], case["add_generation_prompt"]), cl100k) == case["ids"]


PROMPTS = {
    "system folded": ([system("Be brief."), user("2+2?")], "human: Be brief. 2+2? <sep> assistant:"),
    "empty system": ([system(""), user("Hi")], "human:  Hi <sep> assistant:"),
    "later system": ([user("Hi"), system("No.")], "human: Hi <sep> system: No. <sep> assistant:"),
    "human": ([{"role": "human", "content": "Hi"}], "human: Hi <sep> assistant:"),
    "tool": ([user("Hi"), {"role": "tool", "content": "{}"}], "human: Hi <sep> tool: {} <sep> assistant:"),
    "earlier reasoning": (
        [user("Hi"), assistant(" <reasoning>\nA greeting.\n</reasoning>\n\nHello!"), user("Bye")],
        "human: Hi <sep> assistant:  \n\nHello! <sep> human: Bye <sep> assistant:",
    ),
    "reasoning apart": (
        [user("Hi"), assistant("Hello!", "A greeting."), user("Bye")],
        "human: Hi <sep> assistant: Hello! <sep> human: Bye <sep> assistant:",
    ),
    "prefill": ([user("Hi"), assistant("<reasoning>\nThe")], "human: Hi <sep> assistant: <reasoning>\nThe"),
    "white space": ([user(" Hi\n")], "human:  Hi\n <sep> assistant:"),
}


@pytest.mark.parametrize(("messages", "text"), PROMPTS.values(), ids=PROMPTS)
def test_render_prompt_writes_exactly(messages: list[Message], text: str) -> None:
    assert render_prompt(messages) == text


def test_render_prompt_can_omit_the_generation_prompt() -> None:
    assert render_prompt([user("Hi")], add_generation_prompt=False) == "human: Hi"


@UNHURRIED
@given(messages=CONVERSATIONS, add_generation_prompt=st.booleans())
@example(messages=[assistant("</reasoning>a<reasoning>b</reasoning>c"), user("Hi")], add_generation_prompt=True)
@example(messages=[system("a"), assistant("b</reasoning>c")], add_generation_prompt=True)
def test_chat_template_equals_render_prompt(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], add_generation_prompt: bool
) -> None:
    assume(messages[0]["role"] != "system" or len(messages) > 1)
    from_template = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert from_template == render_prompt(messages, add_generation_prompt)


def test_render_prompt_and_template_reject_a_system_message_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    wrong = "a conversation of only a system message has nothing to answer; add a user message"
    with pytest.raises(InputError, match=wrong):
        render_prompt([system("Be brief.")])
    with pytest.raises(TemplateError, match=wrong):
        tokenizer.apply_chat_template([system("Be brief.")], chat_template=TEMPLATE, tokenize=False)


def test_render_prompt_rejects_an_empty_conversation() -> None:
    with pytest.raises(InputError, match="a conversation needs at least one message"):
        render_prompt([])


def test_parse_prompt_inverts_render_prompt() -> None:
    messages = [user("Say hello."), assistant("Hi: there"), user("a: b\n\nc ")]
    assert parse_prompt(render_prompt(messages)) == messages
    assert parse_prompt(render_prompt([system("Be kind."), user("Say hello.")])) == [user("Be kind. Say hello.")]
    with pytest.raises(InputError, match="not a prompt"):
        parse_prompt("Say hello.")


# Completions


def test_render_completion_writes_exactly() -> None:
    assert render_completion(None, "4") == " 4 <sep>"
    assert render_completion("Two.", "4") == " <reasoning>\nTwo.\n</reasoning>\n\n4 <sep>"


@UNHURRIED
@given(reasoning=st.none() | CLEAN_TEXTS, answer=CLEAN_TEXTS)
def test_parse_completion_inverts_render_completion(reasoning: str | None, answer: str) -> None:
    parsed = parse_completion(render_completion(reasoning, answer))
    assert parsed == ParsedCompletion(reasoning=reasoning, answer=answer, finish_reason=FinishReason.STOP)


PARSED = {
    "empty": ("", None, "", "length"),
    "only the stop": (" <sep>", None, "", "stop"),
    "cut off": (" 4", None, "4", "length"),
    "eos": (" 4<|endoftext|>", None, "4", "eos"),
    "stop and eos": (" 4 <sep><|endoftext|>", None, "4", "stop"),
    "text after the stop": (" 4 <sep> human: 5 <sep>", None, "4", "stop"),
    "stop without spaces": ("4<sep>5", None, "4", "stop"),
    "eos earlier in the text": (" <|endoftext|>4 <sep>", None, "<|endoftext|>4", "stop"),
    "reasoning": (" <reasoning>\nTwo.\n</reasoning>\n\n4 <sep>", "Two.", "4", "stop"),
    "reasoning without white space": ("<reasoning>Two.</reasoning>4<|endoftext|>", "Two.", "4", "eos"),
    "reasoning, no answer": (" <reasoning>Two.</reasoning> <sep>", "Two.", "", "stop"),
    "empty reasoning": (" <reasoning>\n</reasoning>\n\n4 <sep>", "", "4", "stop"),
    "unclosed": (" <reasoning>\nTwo and", "Two and", "", "length"),
    "unclosed and stopped": (" <reasoning>\nTwo and <sep> 4</reasoning>", "Two and", "", "stop"),
    "block after the answer": (" 4 <reasoning>a</reasoning> <sep>", None, "4 <reasoning>a</reasoning>", "stop"),
    "closed, never opened": (" Two.</reasoning>4 <sep>", None, "Two.</reasoning>4", "stop"),
    "closed twice": (" <reasoning>a</reasoning>b</reasoning>c <sep>", "a", "b</reasoning>c", "stop"),
    "opened twice": (" <reasoning>a<reasoning>b</reasoning>c <sep>", "a<reasoning>b", "c", "stop"),
}


@pytest.mark.parametrize(("text", "reasoning", "answer", "finish_reason"), PARSED.values(), ids=PARSED)
def test_parse_completion_returns(text: str, reasoning: str | None, answer: str, finish_reason: str) -> None:
    assert parse_completion(text) == ParsedCompletion(
        reasoning=reasoning, answer=answer, finish_reason=FinishReason(finish_reason)
    )


@UNHURRIED
@given(messages=CONVERSATIONS, reasoning=st.none() | CLEAN_TEXTS, answer=CLEAN_TEXTS, last_question=TEXTS)
def test_encode_text_splits_between_prompt_and_completion(
    any_tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    reasoning: str | None,
    answer: str,
    last_question: str,
) -> None:
    prompt, completion = render_prompt([*messages, user(last_question)]), render_completion(reasoning, answer)
    separate = encode_text(prompt, any_tokenizer) + encode_text(completion, any_tokenizer)
    assert separate == encode_text(prompt + completion, any_tokenizer)
