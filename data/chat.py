"""The Reka chat format: render a conversation as text and ids, and parse a completion.

    human: What is 2+2? <sep> assistant: <reasoning>
    Two and two.
    </reasoning>

    4 <sep>

Neither `<sep>` nor the reasoning tags are tokens: they are text, and their ids depend on the characters around them. So
the loss mask is made where the ids are made, and sampled ids are never tokenized again (data/stop.py).
`tests/data/test_chat.py` compares the format with golden vectors of the published template.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from rekatrain.data.errors import InputError
from rekatrain.data.families import bos_ids

if TYPE_CHECKING:  # reward workers do not need it, and importing it takes over a second
    from transformers import PreTrainedTokenizerBase

STOP = "<sep>"
END_OF_TEXT = "<|endoftext|>"
REASONING_OPEN = "<reasoning>"
REASONING_CLOSE = "</reasoning>"
TURN_SEPARATOR = f" {STOP} "
GENERATION_PROMPT = "assistant:"
# The model card fixes the tags. The white space after the closing tag is not published, hence one constant.
AFTER_REASONING = "\n\n"
IGNORED_LABEL = -100
_INDENTATION = re.compile(r"(?:\A|[\r\n])([ \t]+)\Z")

EndOfTurn = Literal["sep", "sep_eos", "eos"]


class Message(TypedDict):
    """One turn. `reasoning_content` is the reasoning of an assistant where it is stored separately from the answer."""

    role: str
    content: str
    reasoning_content: NotRequired[str]


class FinishReason(StrEnum):
    """Reason why a completion ended: it wrote `<sep>`, it sampled the eos token, or it was truncated."""

    STOP = "stop"
    EOS = "eos"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """Ids of a prompt and its trained turn. Labels are the ids of that turn, and -100 before it (equal lengths)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class ParsedCompletion:
    """Parts of a completion; `reasoning` is None where it does not open with a reasoning block."""

    reasoning: str | None
    answer: str
    finish_reason: FinishReason


def render_prompt(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """Return the text of `messages` for the model, equal to the output of Reka's published chat template.

    Earlier assistant turns lose their reasoning. A conversation that ends with an assistant turn is left open, so that
    the model continues that turn. Text that forges a turn is not checked here; see `check_messages`.
    """
    if not messages:
        raise InputError("a conversation needs at least one message")
    first, *rest = messages
    if first["role"] == "system":
        if not rest:
            raise InputError("a conversation of only a system message has nothing to answer; add a user message")
        folded: Message = {"role": rest[0]["role"], "content": f"{first['content']} {rest[0]['content']}"}
        messages = [folded, *rest[1:]]
    turns = [f"{_label(message['role'])}: {_without_reasoning(message)}" for message in messages]
    if add_generation_prompt and messages[-1]["role"] != "assistant":
        turns.append(GENERATION_PROMPT)
    return TURN_SEPARATOR.join(turns)


def parse_prompt(text: str) -> list[Message]:
    """Return the messages of a rendered prompt: the inverse of `render_prompt`, as far as one exists.

    A first system message stays folded into the first turn, and the role `human` becomes `user`. Raises InputError for
    text that does not end with the generation prompt.
    """
    *turns, last = text.split(TURN_SEPARATOR)
    parsed = [turn.partition(": ") for turn in turns]
    if last != GENERATION_PROMPT or not all(role.isidentifier() and colon for role, colon, _ in parsed):
        raise InputError(f"not a prompt in the Reka format, which ends with {GENERATION_PROMPT!r}: {text[-80:]!r}")
    return [{"role": "user" if role == "human" else role, "content": content} for role, _, content in parsed]


def render_completion(reasoning: str | None, answer: str) -> str:
    """Return the text of a trained turn; inverse of `parse_completion`.

    It begins with the space after `assistant:` and ends with ` <sep>`.

    >>> render_completion("Two and two.", "4")
    ' <reasoning>\\nTwo and two.\\n</reasoning>\\n\\n4 <sep>'
    """
    return f"{_turn_body(reasoning, answer)} {STOP}"


def parse_completion(text: str) -> ParsedCompletion:
    """Split the text of a completion into reasoning, answer and finish reason; text after the first `<sep>` is ignored.

    A reasoning block that is not closed is all reasoning and no answer. Tags outside the opening block stay in the
    text, so that a reward can see them.
    """
    body, stop, _ = text.partition(STOP)
    finish_reason = FinishReason.STOP if stop else FinishReason.LENGTH
    if not stop and body.endswith(END_OF_TEXT):
        body, finish_reason = body.removesuffix(END_OF_TEXT), FinishReason.EOS
    reasoning, answer = _split_body(body)
    return ParsedCompletion(reasoning=reasoning, answer=answer, finish_reason=finish_reason)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise InputError for a conversation that is malformed, or whose text would forge a turn.

    The format has no escape: a literal `<sep>` ends a turn wherever it appears, and an assistant's `</reasoning>`
    without an opening tag makes the template keep the reasoning and repeat the answer.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages must be a list with at least one message")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} must be an object with a role and a content")
        role = message["role"]
        if not role.isidentifier():
            raise InputError(f"message {number} has the role {role!r}; a role is one word, such as user or assistant")
        if message.get("reasoning_content") is not None and role != "assistant":
            raise InputError(f"message {number} ({role}) has a reasoning_content, which only an assistant message has")
        for text in (message.get("content"), message.get("reasoning_content") or ""):
            if not isinstance(text, str):
                raise InputError(f"message {number} ({role}): a message holds text, not {type(text).__name__}")
            if STOP in text:
                raise InputError(f"message {number} ({role}) holds a literal {STOP}, which would end its turn")
        if role == "assistant" and (fault := _reasoning_fault(message, is_last=number == len(messages))):
            raise InputError(f"message {number} (assistant) {fault}")
    first_turn = messages[1:2] if messages[0]["role"] == "system" else messages[:1]
    if not first_turn or first_turn[0]["role"] in ("system", "assistant"):
        raise InputError("a conversation begins with a user message, before it at most one system message")


def neutralize_messages(messages: Sequence[Message]) -> list[Message]:
    """Return copies of `messages` with a space inside the text that `check_messages` would reject (`< sep>`)."""
    neutral: list[Message] = []
    for number, message in enumerate(messages, start=1):
        broken = STOP.replace("<", "< ")
        copied: Message = {**message, "content": message["content"].replace(STOP, broken)}
        if thought := message.get("reasoning_content"):
            copied["reasoning_content"] = _break_tags(thought.replace(STOP, broken))
        if copied["role"] == "assistant" and _reasoning_fault(copied, is_last=number == len(messages)):
            copied["content"] = _break_tags(copied["content"])
        neutral.append(copied)
    return neutral


def answers_only(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with only the answer of each assistant turn, as a client stores it for the next turn.

    The template drops the reasoning of a stored turn too, but keeps the white space around it.
    """
    return [
        {"role": "assistant", "content": split_turn(turn)[1]} if turn["role"] == "assistant" else turn
        for turn in messages
    ]


def split_turn(message: Message) -> tuple[str | None, str]:
    """Return reasoning and answer of a stored assistant turn, whose reasoning may be in either field.

    White space around the answer is removed, except an indentation of its first line: a tab, or two or more spaces.
    """
    # Not parse_completion: in a stored turn `<|endoftext|>` is text like any other.
    content = message["content"].rstrip()
    inline, answer = _split_body(content)
    indentation = _INDENTATION.search(content, 0, len(content) - len(answer)) if answer else None
    if indentation and indentation[1] != " ":  # one space is the one after `assistant:`, stored with the answer
        answer = indentation[1] + answer
    return (message.get("reasoning_content") or "").strip() or inline or None, answer


def encode_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids of plain text: the name of a special token becomes ordinary ids, and no special token is added."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_prompt(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids of a text from its start: a bos token, where the family has one (families.py), then the text's."""
    return [*bos_ids(tokenizer), *encode_text(text, tokenizer)]


def encode_texts(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the ids of each text, as `encode_text` does, encoded on all cores."""
    # transformers would also make a mask of each text, in Python: a quarter of the time.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def encode_row(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", end_of_turn: EndOfTurn = "sep"
) -> EncodedRow:
    """Encode a conversation that ends with the assistant turn to train; only that turn and its stop have labels.

    `end_of_turn`: the turn ends with ` <sep>`, with ` <sep>` and the eos token, or with the eos token alone.
    Raises InputError where there is no such turn, or where it has no answer.
    """
    prompt, completion = row_texts(messages, end_of_turn)
    return join_row(encode_prompt(prompt, tokenizer), encode_text(completion, tokenizer), tokenizer, end_of_turn)


def row_texts(messages: Sequence[Message], end_of_turn: EndOfTurn = "sep") -> tuple[str, str]:
    """Return the texts that `encode_row` encodes: the prompt, and the trained turn but for an eos token."""
    check_messages(messages)
    *history, last = messages
    if last["role"] != "assistant" or not history:
        raise InputError("a training row must end with an assistant message that answers something")
    reasoning, answer = split_turn(last)
    if not answer:
        raise InputError("the assistant message to train has no answer")
    completion = _turn_body(reasoning, answer) if end_of_turn == "eos" else render_completion(reasoning, answer)
    return render_prompt(answers_only(history)), completion


def join_row(
    prompt_ids: list[int], completion_ids: list[int], tokenizer: "PreTrainedTokenizerBase", end_of_turn: EndOfTurn
) -> EncodedRow:
    """Return the row of the ids of `row_texts`."""
    trained = completion_ids if end_of_turn == "sep" else [*completion_ids, tokenizer.eos_token_id]
    return EncodedRow(input_ids=prompt_ids + trained, labels=[IGNORED_LABEL] * len(prompt_ids) + trained)


def _label(role: str) -> str:
    return "human" if role == "user" else role


def _without_reasoning(message: Message) -> str:
    content = message["content"]
    if message["role"] != "assistant" or REASONING_CLOSE not in content:
        return content
    return content.split(REASONING_OPEN)[0] + content.split(REASONING_CLOSE)[-1]


def _turn_body(reasoning: str | None, answer: str) -> str:
    if reasoning is None:
        return f" {answer}"
    return f" {REASONING_OPEN}\n{reasoning}\n{REASONING_CLOSE}{AFTER_REASONING}{answer}"


def _split_body(text: str) -> tuple[str | None, str]:
    body = text.strip()
    if not body.startswith(REASONING_OPEN):
        return None, body
    reasoning, _, answer = body.removeprefix(REASONING_OPEN).partition(REASONING_CLOSE)
    return reasoning.strip(), answer.strip()


def _break_tags(text: str) -> str:
    return text.replace(REASONING_OPEN, "< reasoning>").replace(REASONING_CLOSE, "< /reasoning>")


def _reasoning_fault(message: Message, *, is_last: bool) -> str | None:
    """Return the fault of an assistant message's reasoning, or None; a last message may hold a block left open."""
    content, thought = message["content"], (message.get("reasoning_content") or "").strip()
    opened, closed = content.count(REASONING_OPEN), content.count(REASONING_CLOSE)
    if REASONING_OPEN in thought or REASONING_CLOSE in thought:
        return "has a reasoning_content that holds the reasoning tags themselves"
    if thought and (opened or closed):
        return "has reasoning both in content and in reasoning_content"
    if (opened, closed) == (0, 0) or (is_last and (opened, closed) == (1, 0)):
        return None
    if (opened, closed) == (1, 1) and content.lstrip().startswith(REASONING_OPEN):
        return None
    return (
        f"has {opened} {REASONING_OPEN} and {closed} {REASONING_CLOSE} in its content: "
        "write one block, opened first and closed, before the answer"
    )
