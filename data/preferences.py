"""Layouts of preference data: two answers to one prompt, one of them preferred.

Each is a pure function from one record to a Row. Its `messages` end with the preferred answer, and its `rejected` end
with the other one. So a preference file also serves SFT (the preferred answers) and RLOO (the prompts).
"""

import math
import re
from collections.abc import Callable

from rekatrain.data.chat import Message, split_turn
from rekatrain.data.errors import InputError
from rekatrain.data.records import (
    PROMPT_KEYS,
    SYSTEM_KEYS,
    Record,
    add_system,
    assistant_message,
    field_error,
    instruction_messages,
    other_columns,
    prompt_messages,
    read_text,
)
from rekatrain.data.rows import Row
from rekatrain.data.turns import DEFAULT, TurnOptions, holds_turns, read_messages

SIDES = ("chosen", "rejected")
_HH_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def preference_row(record: Record, options: TurnOptions = DEFAULT) -> Row:
    """Row of `chosen` and `rejected`, each text or messages, with optional `prompt`, `system` and `margin`.

    Text, or a single assistant message, is an answer to `prompt`, which is text or messages. Longer messages are whole
    conversations, and must hold the `prompt` if there is one.
    """
    prompt = _prompt(record, options)
    sides = {side: _conversation(record, side, prompt, options) for side in SIDES}
    has_history = isinstance(prompt, str) and not any(holds_turns(record[side]) for side in SIDES)
    return _row(record, "prompt", *(PROMPT_KEYS if has_history else SYSTEM_KEYS), **sides)


def alpaca_preference_row(record: Record) -> Row:
    """Row of `instruction` and optional `input` and `system`, with `chosen` and `rejected` texts; `output` is dropped.

    The two answers were written from `output`, and neither of them need equal it.
    """
    prompt = instruction_messages(record)
    answered = {side: [*prompt, assistant_message(read_text(record, side))] for side in SIDES}
    return _row(record, "instruction", "input", "output", *PROMPT_KEYS, **answered)


def hh_row(record: Record) -> Row:
    r"""Row of `chosen` and `rejected` as Anthropic's HH-RLHF writes a dialogue.

    >>> hh_row({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}).messages
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    """
    return _row(record, **{side: _hh_dialogue(record, side) for side in SIDES})


PREFERENCE_TURN_LAYOUTS: dict[str, Callable[[Record, TurnOptions], Row]] = {"preference": preference_row}
PREFERENCE_LAYOUTS: dict[str, Callable[[Record], Row]] = {
    "alpaca_preference": alpaca_preference_row,
    "hh": hh_row,
}


def _prompt(record: Record, options: TurnOptions) -> list[Message] | str | None:
    """Return `prompt`: messages, text, or None where it is missing."""
    prompt = record.get("prompt")
    if prompt is None:
        return None
    if holds_turns(prompt):
        return read_messages(record, "prompt", options)
    return read_text(record, "prompt")


def _conversation(record: Record, side: str, prompt: list[Message] | str | None, options: TurnOptions) -> list[Message]:
    answer = record.get(side)
    if holds_turns(answer) or isinstance(answer, list):
        turns = read_messages(record, side, options)
        if turns[0]["role"] != "assistant":
            holds_prompt = (
                prompt is None
                or (isinstance(prompt, str) and any(turn["content"] == prompt for turn in turns))
                or turns[: len(prompt)] == prompt
            )
            if not holds_prompt:
                raise InputError(f"{side} is a whole conversation that does not hold the prompt: correct one of them")
            return add_system(record, turns)
    else:
        turns = [assistant_message(read_text(record, side))]
    if prompt is None:
        raise InputError(
            f"{side} is an answer and there is no prompt: set columns to the prompt's key, or format to hh for "
            "dialogues in one text"
        )
    before = prompt_messages(record, prompt) if isinstance(prompt, str) else add_system(record, prompt)
    return [*before, *turns]


def _hh_dialogue(record: Record, side: str) -> list[Message]:
    before, *parts = _HH_SPEAKER.split(read_text(record, side))
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
    if split_turn(chosen[-1]) == split_turn(rejected[-1]):
        raise InputError("chosen and rejected are the same, so neither is preferred: remove the row")
    margin = record.get("margin")
    if margin is not None:
        if isinstance(margin, bool) or not isinstance(margin, int | float):
            raise field_error(record, "margin", "a number")
        if not (math.isfinite(margin) and margin >= 0):
            raise InputError(f"margin must be at least 0, not {margin}: it says by how much chosen is better")
    return Row(messages=chosen, rejected=rejected, columns=other_columns(record, *SIDES, *used))
