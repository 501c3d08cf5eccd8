"""Messages and texts for tests of the chat format."""

from hypothesis import settings
from hypothesis import strategies as st

from rekatrain.data.chat import END_OF_TEXT, Message


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, thought: str | None = None) -> Message:
    message: Message = {"role": "assistant", "content": content}
    return message if thought is None else {**message, "reasoning_content": thought}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


# Text that breaks formats: tags whole and in parts, several kinds of white space, and characters that merge with `>`.
FRAGMENTS = [
    *(
        "<sep>",
        "< sep>",
        "<se",
        "p>",
        "<",
        ">",
        "sep",
        "<reasoning>",
        "</reasoning>",
        "<reason",
        "ing>",
        "</",
        "reasoning",
    ),
    *(END_OF_TEXT, "<|", " ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "a", "Hi", "42", "4.", "é", "日本", "🙂"),
]


NASTY_TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)


TEXTS = NASTY_TEXTS | st.text(max_size=12)


# Texts that a trained turn can hold: no tag, no stop, no white space at the ends.
CLEAN_TEXTS = TEXTS.map(str.strip).filter(lambda text: not any(tag in text for tag in ("<sep>", "reasoning>")))


# No deadline: a busy machine is not a fault of the code.
UNHURRIED = settings(deadline=None)


ROLES = st.sampled_from(["user", "human", "tool", "assistant", "system"])


CONVERSATIONS = st.lists(st.builds(lambda role, content: {"role": role, "content": content}, ROLES, TEXTS), min_size=1)
