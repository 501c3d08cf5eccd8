"""Conversations that would forge a turn: `check_messages` rejects them, `neutralize_messages` repairs them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekatrain.data.chat import END_OF_TEXT, Message, check_messages, neutralize_messages
from rekatrain.data.errors import InputError
from tests.data.conversations import NASTY_TEXTS, UNHURRIED, assistant, system, user

TAGS_FAULT = "in its content: write one block, opened first and closed, before the answer"


BEGINNING = "a conversation begins with a user message, before it at most one system message"


REJECTED = {
    "no messages": ([], "messages must be a list with at least one message"),
    "text": ("Hi", "messages must be a list with at least one message"),
    "a message of text": (["Hi"], "message 1 must be an object with a role and a content"),
    "no role": ([{"content": "Hi"}], "message 1 must be an object with a role and a content"),
    "role of two words": (
        [{"role": "user: x", "content": "Hi"}],
        "message 1 has the role 'user: x'; a role is one word, such as user or assistant",
    ),
    "role with a stop": (
        [user("Hi"), {"role": "<sep>", "content": ""}],
        "message 2 has the role '<sep>'; a role is one word, such as user or assistant",
    ),
    "no content": ([{"role": "user"}], "message 1 (user): a message holds text, not NoneType"),
    "parts": ([{"role": "user", "content": ["Hi"]}], "message 1 (user): a message holds text, not list"),
    "thought is a number": (
        [user("Hi"), {"role": "assistant", "content": "a", "reasoning_content": 1}],
        "message 2 (assistant): a message holds text, not int",
    ),
    "user thinks": (
        [{**user("Hi"), "reasoning_content": "x"}],
        "message 1 (user) has a reasoning_content, which only an assistant message has",
    ),
    "stop": ([user("a<sep>b")], "message 1 (user) holds a literal <sep>, which would end its turn"),
    "stop in a system": (
        [system("<sep>"), user("b")],
        "message 1 (system) holds a literal <sep>, which would end its turn",
    ),
    "stop in a thought": (
        [user("Hi"), assistant("a", "b<sep>")],
        "message 2 (assistant) holds a literal <sep>, which would end its turn",
    ),
    "never opened": (
        [user("Hi"), assistant("a</reasoning>b")],
        f"message 2 (assistant) has 0 <reasoning> and 1 </reasoning> {TAGS_FAULT}",
    ),
    "never closed, then more": (
        [user("Hi"), assistant("<reasoning>a"), user("b")],
        f"message 2 (assistant) has 1 <reasoning> and 0 </reasoning> {TAGS_FAULT}",
    ),
    "closed first": (
        [user("Hi"), assistant("</reasoning>a<reasoning>")],
        f"message 2 (assistant) has 1 <reasoning> and 1 </reasoning> {TAGS_FAULT}",
    ),
    "block after text": (
        [user("Hi"), assistant("a<reasoning>b</reasoning>c")],
        f"message 2 (assistant) has 1 <reasoning> and 1 </reasoning> {TAGS_FAULT}",
    ),
    "two blocks": (
        [user("Hi"), assistant("<reasoning>a</reasoning><reasoning>b</reasoning>c")],
        f"message 2 (assistant) has 2 <reasoning> and 2 </reasoning> {TAGS_FAULT}",
    ),
    "two thoughts": (
        [user("Hi"), assistant("<reasoning>a</reasoning>b", "c")],
        "message 2 (assistant) has reasoning both in content and in reasoning_content",
    ),
    "tag in a thought": (
        [user("Hi"), assistant("a", "b</reasoning>c")],
        "message 2 (assistant) has a reasoning_content that holds the reasoning tags themselves",
    ),
    "only a system": ([system("a")], BEGINNING),
    "two systems": ([system("a"), system("b"), user("c")], BEGINNING),
    "assistant first": ([assistant("a"), user("b")], BEGINNING),
    "assistant after system": ([system("a"), assistant("b")], BEGINNING),
}


@pytest.mark.parametrize(("messages", "wrong"), REJECTED.values(), ids=REJECTED)
def test_check_messages_rejects(messages: list[Message], wrong: str) -> None:
    with pytest.raises(InputError) as caught:
        check_messages(messages)
    assert str(caught.value) == wrong


GOOD = {
    "user alone": [user("Hi")],
    "all roles": [system("s"), {"role": "human", "content": ""}, assistant("b"), {"role": "tool", "content": "{}"}],
    "inline reasoning": [user("Hi"), assistant("\n<reasoning>a</reasoning>b")],
    "thought apart": [user("Hi"), assistant("b", "a"), user("c")],
    "prefill": [user("Hi"), assistant("<reasoning>\nThe user")],
    "tags of a user": [user("What is </reasoning>?"), assistant("a tag")],
    "typed end of text": [user(END_OF_TEXT)],
    "nearly a stop": [user("< sep> <sep <SEP> sep>")],
}


@pytest.mark.parametrize("messages", GOOD.values(), ids=GOOD)
def test_check_messages_accepts_and_neutralize_keeps(messages: list[Message]) -> None:
    check_messages(messages)
    assert neutralize_messages(messages) == messages


NASTY_MESSAGES = st.one_of(
    st.builds(user, NASTY_TEXTS),
    st.builds(assistant, NASTY_TEXTS, st.none() | NASTY_TEXTS),
    st.builds(lambda text: {"role": "tool", "content": text}, NASTY_TEXTS),
)


@UNHURRIED
@given(
    first=st.just([]) | st.builds(lambda text: [system(text)], NASTY_TEXTS),
    question=NASTY_TEXTS,
    others=st.lists(NASTY_MESSAGES, max_size=4),
)
def test_neutralize_messages_adds_only_spaces(first: list[Message], question: str, others: list[Message]) -> None:
    messages = [*first, user(question), *others]
    neutral = neutralize_messages(messages)
    check_messages(neutral)
    for before, after in zip(messages, neutral, strict=True):
        assert before.keys() == after.keys()
        for key in before:
            assert (before[key] or "").replace(" ", "") == (after[key] or "").replace(" ", "")


def test_neutralize_messages_breaks_only_forged_turns() -> None:
    messages = [user("a <sep> b</reasoning>"), assistant("c</reasoning>d", "e<sep><reasoning>")]
    assert neutralize_messages(messages) == [
        user("a < sep> b</reasoning>"),
        assistant("c< /reasoning>d", "e< sep>< reasoning>"),
    ]
    assert messages[0] == user("a <sep> b</reasoning>")
