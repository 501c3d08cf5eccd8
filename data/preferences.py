"""Layouts of preference rows: of two answers to one prompt, which was preferred.

Each is a pure function from one object to a Row whose `messages` end with the preferred answer and whose `rejected` end
with the other one. So a preference file also serves SFT (the preferred answers) and RLOO (the prompts).
"""

import math
import re
from collections.abc import Callable

from rekatrain.data.chat import Message
from rekatrain.data.errors import InputError
from rekatrain.data.layouts import (
    Record,
    _assistant,
    _missing_or_mistyped,
    _optional_text,
    _others,
    _question,
    _text,
    _turns,
)
from rekatrain.data.rows import Row

SIDES = ("chosen", "rejected")
_HH_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def preference_row(record: Record) -> Row:
    """Row of `chosen` and `rejected`, each a text or messages, with `prompt`, `system` and `margin` as they need it.

    A text, or a single assistant message, answers `prompt`, which is a text or messages. Longer messages are whole
    conversations; a `prompt` beside them must be in them.
    """
    prompt = _prompt(record)
    return _row(record, "prompt", "system", **{side: _conversation(record, side, prompt) for side in SIDES})


def alpaca_preference_row(record: Record) -> Row:
    """Row of `instruction` and optional `input` and `system`, with `chosen` and `rejected` texts; `output` is dropped.

    `output` is what the two answers were written from, and neither of them need be equal to it.
    """
    parts = (_text(record, "instruction"), _optional_text(record, "input"))
    question = _question(record, "\n\n".join(part for part in parts if part))
    answered = {side: [*question, _assistant(_text(record, side), reasoning=None)] for side in SIDES}
    return _row(record, "instruction", "input", "system", "output", **answered)


def hh_row(record: Record) -> Row:
    r"""Row of `chosen` and `rejected` as Anthropic's HH-RLHF writes a dialogue.

    >>> hh_row({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}).messages
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    """
    return _row(record, **{side: _hh_dialogue(record, side) for side in SIDES})


PREFERENCE_LAYOUTS: dict[str, Callable[[Record], Row]] = {
    "preference": preference_row,
    "alpaca_preference": alpaca_preference_row,
    "hh": hh_row,
}


def _prompt(record: Record) -> list[Message] | str | None:
    """The messages before the answers; the text of one of them where the answers are whole conversations."""
    prompt = record.get("prompt")
    if prompt is None:
        return None
    if isinstance(prompt, list):
        return _messages(record, "prompt")
    return _text(record, "prompt")


def _conversation(record: Record, side: str, prompt: list[Message] | str | None) -> list[Message]:
    if isinstance(record.get(side), list):
        turns = _messages(record, side)
        if turns[0]["role"] != "assistant":
            is_in_it = (
                prompt is None
                or (isinstance(prompt, str) and any(turn["content"] == prompt for turn in turns))
                or turns[: len(prompt)] == prompt
            )
            if not is_in_it:
                raise InputError(f"{side} is a whole conversation that does not hold the prompt")
            return turns
    else:
        turns = [_assistant(_text(record, side), reasoning=None)]
    if prompt is None:
        raise InputError(
            f"{side} is an answer and there is no prompt: set columns to the prompt's key, or format to hh for "
            "dialogues in one text"
        )
    return [*(_question(record, prompt) if isinstance(prompt, str) else prompt), *turns]


def _messages(record: Record, key: str) -> list[Message]:
    turns = _turns(record, key, required=("role", "content"), optional=("reasoning_content",))
    return [{**turn} for turn in turns]  # type: ignore[typeddict-item]  # keys checked by _turns


def _hh_dialogue(record: Record, side: str) -> list[Message]:
    before, *parts = _HH_SPEAKER.split(_text(record, side))
    if before.strip() or not parts:
        raise InputError(f"{side} does not begin with a blank line and 'Human: '")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _HH_ROLES[speaker], "content": text.strip()} for speaker, text in turns]


def _row(record: Record, *used: str, chosen: list[Message], rejected: list[Message]) -> Row:
    for side, messages in zip(SIDES, (chosen, rejected), strict=True):
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise InputError(f"{side} does not end with an answer of the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise InputError("chosen and rejected differ before their last message: they answer different prompts")
    if chosen[-1] == rejected[-1]:
        raise InputError("chosen and rejected are the same, which prefers neither")
    margin = record.get("margin")
    if margin is not None:
        if isinstance(margin, bool) or not isinstance(margin, int | float):
            raise _missing_or_mistyped(record, "margin", "a number")
        if not (math.isfinite(margin) and margin >= 0):
            raise InputError(f"margin must be at least 0, not {margin}: it says by how much chosen is better")
    return Row(messages=chosen, rejected=rejected, columns=_others(record, *SIDES, *used))
