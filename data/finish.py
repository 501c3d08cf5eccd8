"""Finish the conversation of a row: reasoning tags, the data set's system message, and the checks of all layouts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rekatrain.data.chat import Message, check_messages, neutralize_messages, split_turn
from rekatrain.data.errors import InputError
from rekatrain.data.rows import Row

ForgedTurns = Literal["refuse", "neutralize"]

# Tags by which published traces mark reasoning, and the answer after it; the model's are `<reasoning>`.
KNOWN_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>"),
    ("[THINK]", "[/THINK]"),
)


@dataclass(frozen=True, kw_only=True)
class FinishOptions:
    """Options of a recipe for the conversations of a data set; `data/README.md` describes them."""

    system: str | None = None
    forged_turns: ForgedTurns = "refuse"
    reasoning_tags: Sequence[str] | None = None


def finish_row(row: Row, options: FinishOptions) -> Row:
    """Return the row with its reasoning read, its system message added and its text checked.

    Raises InputError for a conversation that the chat format cannot render, or that would forge a turn.
    """
    if row.tokens is not None:
        return row
    messages, rejected = _finish(row.messages, options), row.rejected and _finish(row.rejected, options)
    if messages is row.messages and rejected is row.rejected:
        return row
    num_added = len(messages) - len(row.messages)
    return replace(
        row,
        messages=messages,
        trains=row.trains and [*[False] * num_added, *row.trains],
        rejected=rejected,
    )


def unread_tags(rows: Iterable[Row]) -> tuple[list[Row], Sequence[str]]:
    """Return the rows whose answers begin with reasoning tags that are not the model's, and the tags of the first."""
    found = [(row, tags) for row in rows for message in row.messages if (tags := _tags_of(message))]
    return list({id(row): row for row, _ in found}.values()), found[0][1] if found else ()


def read_reasoning(message: Message, tags: Sequence[str]) -> Message:
    """Return an assistant's message with the text between the first two `tags` as its reasoning_content.

    A third and a fourth tag mark the answer, and are removed. Where the opening tag is missing, as in traces whose
    prompt ended with it, the reasoning begins with the text.

    >>> read_reasoning({"role": "assistant", "content": "<think>Two.</think> 4"}, ["<think>", "</think>"])
    {'role': 'assistant', 'content': '4', 'reasoning_content': 'Two.'}
    """
    opening, closing, *answer_tags = tags
    content = message["content"]
    num_opened, num_closed = content.count(opening), content.count(closing)
    if (num_opened, num_closed) == (0, 0):
        return {**message, "content": _without(answer_tags, content)} if answer_tags else message
    before, _, rest = content.partition(opening) if num_opened else ("", "", content)
    if num_opened > 1 or num_closed != 1 or before.strip() or closing not in rest:
        raise InputError(
            f"an assistant message has {num_opened} {opening} and {num_closed} {closing}: write one block, opened "
            "first and closed, before the answer"
        )
    if (message.get("reasoning_content") or "").strip():
        raise InputError(f"an assistant message has reasoning both in {opening} and in reasoning_content")
    thought, _, answer = rest.partition(closing)
    answer = _without(answer_tags, answer)
    read: Message = {"role": message["role"], "content": split_turn({"role": "assistant", "content": answer})[1]}
    return {**read, "reasoning_content": thought.strip()} if thought.strip() else read


def _finish(messages: list[Message], options: FinishOptions) -> list[Message]:
    if options.reasoning_tags:
        tags = options.reasoning_tags
        messages = [read_reasoning(turn, tags) if turn["role"] == "assistant" else turn for turn in messages]
    if options.system is not None and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": options.system}, *messages]
    if options.forged_turns == "neutralize":
        messages = neutralize_messages(messages)
    check_messages(messages)
    for number, message in enumerate(messages, start=1):
        # The first would be trained both to stop and to go on.
        if message["role"] == "assistant" == messages[number - 2]["role"]:
            raise InputError(f"message {number} (assistant) follows another one of the assistant: join the two")
        try:
            "".join([message["role"], message["content"], message.get("reasoning_content", "")]).encode()
        except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which no tokenizer accepts
            raise InputError(f"message {number} holds half a surrogate pair, which is not text: remove it") from error
    return messages


def _without(answer_tags: Sequence[str], answer: str) -> str:
    """Return the text between the two tags of an answer, if it has them."""
    if not answer_tags or not any(tag in answer for tag in answer_tags):
        return answer
    opening, closing = answer_tags
    stripped = answer.strip()
    is_block = stripped.startswith(opening) and stripped.endswith(closing)
    inner = stripped.removeprefix(opening).removesuffix(closing)
    if not is_block or opening in inner or closing in inner:
        raise InputError(f"an answer does not lie between one {opening} and one {closing}")
    return inner


def _tags_of(message: Message) -> Sequence[str] | None:
    if message["role"] != "assistant":
        return None
    text = message["content"]
    return next((tags for tags in KNOWN_TAGS if text.lstrip().startswith(tags[0]) or tags[1] in text), None)
