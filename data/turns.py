"""Read the turns of a conversation as people write them: names of roles and keys, text parts, loss masks, tool turns.

A key that would change the prompt or the loss is used, or the turn is rejected by its name.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rekatrain.data.chat import Message
from rekatrain.data.errors import InputError
from rekatrain.data.records import (
    Record,
    add_system,
    check_prompt_parts,
    field_error,
    prompt_messages,
    read_text,
    type_name,
)
from rekatrain.data.tool_text import ToolTurns, call_texts

# Usual spellings, in lower case -> our role. A `tool_call` is a turn of the assistant that calls a function.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "gpt-4", "gpt4", "bot", "chatbot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "tool_call"),
}
OUR_ROLES = ("system", "user", "assistant", "tool", "tool_call")
PLAIN_ROLES = ("system", "user", "assistant")
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MASK_KEYS = ("weight", "train", "loss", "loss_mask")
CALL_KEYS = ("tool_calls", "function_call")
TOOL_KEYS = ("name", "tool_call_id")
OUR_TURN_KEYS = (*ROLE_KEYS, *CONTENT_KEYS, *REASONING_KEYS, *MASK_KEYS, *CALL_KEYS, *TOOL_KEYS)
PART_KEYS = {"text": ("text", "value", "content"), "reasoning": ("reasoning", "thinking", "text", "value", "content")}
PART_TYPES = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("reasoning", "thinking"), "reasoning"),
    "tool_call": "tool_call",
}


@dataclass(frozen=True, kw_only=True)
class TurnOptions:
    """Options of a recipe for turns.

    roles:      a role in the file -> ours (system, user, assistant, tool, tool_call); it goes before ROLES
    turn_keys:  a key of the turns in the file -> ours, or None to leave it out
    tool_turns: "refuse" rejects calls and results of tools; "literal" writes them as text
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    turn_keys: Mapping[str, str | None] = field(default_factory=dict)
    tool_turns: ToolTurns = "refuse"


DEFAULT = TurnOptions()


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Messages, and for each one True if SFT may train it; `trains` is None where no turn has a mask."""

    messages: list[Message]
    trains: list[bool] | None = None


def read_turns(record: Record, key: str, options: TurnOptions = DEFAULT) -> Turns:
    """Return the turns under `key`: a list of objects, its JSON text, an object of lists, or a single object.

    Raises InputError, with the number of the turn, for an unknown role or key and for content that is not text.
    """
    turns = _as_list(record, key)
    read = [_read_turn(number, turn, options) for number, turn in enumerate(turns, start=1)]
    masks = [mask for _, mask in read]
    return Turns(
        messages=[message for message, _ in read],
        trains=None if all(mask is None for mask in masks) else [mask is not False for mask in masks],
    )


def read_messages(record: Record, key: str, options: TurnOptions = DEFAULT) -> list[Message]:
    """Return the turns under `key` where a loss mask has no meaning; raise InputError if there is one."""
    turns = read_turns(record, key, options)
    if turns.trains is not None:
        raise InputError(f"{key} has a turn with a loss mask, which only rows of conversations can have: remove it")
    return turns.messages


def read_prompt(record: Record, options: TurnOptions = DEFAULT) -> tuple[list[Message], list[bool]]:
    """Return the messages of `prompt`, which is text or turns, and a False for each: none of them is trained."""
    if holds_turns(record.get("prompt")):
        messages = add_system(record, read_turns(record, "prompt", options).messages)
        if record.get("history"):
            raise InputError("the row has 'history', and a prompt that holds earlier turns: remove one of them")
    else:
        check_prompt_parts(record, "input", "context")
        messages = prompt_messages(record, read_text(record, "prompt"))
    return messages, [False] * len(messages)


def holds_turns(value: object) -> bool:
    """Return True if a value is turns, in any form that `read_turns` takes, and not a text or a list of texts."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        parsed = None
        with suppress(ValueError):
            parsed = json.loads(value)
        turns = parsed if isinstance(parsed, list) else []
        return bool(turns) and all(isinstance(turn, dict) and any(key in turn for key in ROLE_KEYS) for turn in turns)
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _as_list(record: Record, key: str) -> Sequence[object]:
    turns = record.get(key)
    if isinstance(turns, str):
        with suppress(ValueError):  # it is reported as text, below
            turns = json.loads(turns)
    if isinstance(turns, dict) and any(isinstance(turns.get(name), str) for name in ROLE_KEYS):
        turns = [turns]  # a single message
    if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
        lengths = {name: len(column) for name, column in turns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{key} is an object of lists of different lengths: {lengths}")
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list) or not turns:
        raise field_error(record, key, "a list with at least one message")
    return turns


def _read_turn(number: int, turn: object, options: TurnOptions) -> tuple[Message, bool | None]:
    """Return the message, and True or False where the turn has a loss mask."""
    if not isinstance(turn, dict):
        raise InputError(f"message {number} must be an object with role and content, not {type_name(turn)}")
    role, content = turn.get("role"), turn.get("content")
    if len(turn) == 2 and role in PLAIN_ROLES and isinstance(content, str) and options == DEFAULT:
        return {"role": role, "content": content}, None  # the usual turn, without the slow steps below
    # An export writes null or an empty list of tool calls, images, ... for a turn without one.
    named = [
        (options.turn_keys.get(name, name), value)
        for name, value in turn.items()
        if value is not None and (value not in ([], {}) or name in CONTENT_KEYS)
    ]
    present = {name: value for name, value in named if name is not None}
    if len(present) < sum(name is not None for name, _ in named):
        raise InputError(f"message {number} has two keys that turn_keys gives one name: {', '.join(turn)}")
    role_key, content_key = _only(number, present, ROLE_KEYS), _only(number, present, CONTENT_KEYS)
    raw = present.get(role_key or "role")
    if not isinstance(raw, str):
        raise InputError(f"message {number}: {role_key or 'role'} must be text, not {type_name(raw)}")
    role = options.roles.get(raw) or ROLES.get(raw.strip().lower())
    if role is None:
        known = ", ".join(dict.fromkeys([*options.roles, *ROLES]))
        raise InputError(
            f"message {number} is from {raw!r}, which is not one of {known}: name it in roles, such as "
            f"roles: {{{json.dumps(raw)}: assistant}}"
        )
    _check_keys(number, role, raw, present, options)

    mask_key, reasoning_key = _only(number, present, MASK_KEYS), _only(number, present, REASONING_KEYS)
    missing = "value" if role_key == "from" else "content"
    content = present.get(content_key or missing)
    calls = [text for key in CALL_KEYS if key in present for text in call_texts(number, present[key])]
    text, thoughts, part_calls = _read_content(number, content_key or missing, "" if calls else None, content, options)
    reasoning = present.get(reasoning_key) if reasoning_key else None
    if reasoning is not None and not isinstance(reasoning, str):
        raise InputError(f"message {number}: {reasoning_key} must be text, not {type_name(reasoning)}")
    if reasoning and thoughts:
        raise InputError(f"message {number} has reasoning both in {reasoning_key} and in a part of its {content_key}")
    message: Message = {
        "role": "assistant" if role == "tool_call" else role,
        "content": "\n".join([*([text] if text else []), *part_calls, *calls]) if calls or part_calls else text,
    }
    if reasoning is not None or thoughts:
        message["reasoning_content"] = reasoning or "\n".join(thoughts)
    return message, _read_mask(number, message["role"], mask_key, present[mask_key]) if mask_key else None


def _only(number: int, present: Mapping[str, object], keys: tuple[str, ...]) -> str | None:
    """Return the one of `keys` that a turn has, or None; raise InputError for two."""
    found = [key for key in keys if key in present]
    if len(found) > 1:
        raise InputError(f"message {number} has both {found[0]!r} and {found[1]!r}: remove one of them")
    return found[0] if found else None


def _check_keys(number: int, role: str, raw: str, present: Mapping[str, object], options: TurnOptions) -> None:
    is_assistant = role in ("assistant", "tool_call")
    is_tool = role == "tool" or role == "tool_call" or (is_assistant and any(key in present for key in CALL_KEYS))
    known = [*ROLE_KEYS, *CONTENT_KEYS, *MASK_KEYS, *REASONING_KEYS]
    known += [*(CALL_KEYS if is_assistant else ()), *(TOOL_KEYS if is_tool else ())]
    for key in present:
        if key not in known:
            raise InputError(
                f"message {number} ({raw}) has the unknown key {key!r}; it may have {', '.join(known)}; "
                f"to leave it out: turn_keys: {{{key}: null}}"
            )
    if is_tool and options.tool_turns == "refuse":
        found = next((key for key in CALL_KEYS if key in present), None)
        what = f"has {found!r}" if found and is_assistant else "is a tool turn"
        raise InputError(f"message {number} ({raw}) {what}: set tool_turns to literal to write it as text")


def _read_content(
    number: int, key: str, default: str | None, content: Any, options: TurnOptions
) -> tuple[str, list[str], list[str]]:
    """Return the text of a turn, the texts of its reasoning parts, and those of its tool calls."""
    content = default if content is None else content
    if isinstance(content, str):
        return content, [], []
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        raise InputError(f"message {number}: {key} must be text, not {type_name(content)}")
    texts: dict[str, list[str]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in content:
        given = part.get("type") or "text"
        kind = PART_TYPES.get(given) if isinstance(given, str) else None
        if kind is None:
            raise InputError(f"message {number} has a part of type {given!r}: the model reads text alone")
        if kind == "tool_call" and options.tool_turns == "refuse":
            raise InputError(f"message {number} has a tool_call part: set tool_turns to literal to write it as text")
        names = PART_KEYS.get(kind, PART_KEYS["text"])
        given_texts = [part[name] for name in names if part.get(name) is not None]
        if len(given_texts) > 1:
            raise InputError(f"message {number}: a part of {key} has two of {', '.join(names)}: remove one")
        text = given_texts[0] if given_texts else None
        if not isinstance(text, str):
            raise InputError(f"message {number}: a part of {key} must be text, not {type_name(text)}")
        texts[kind].append(text)
    # A line feed joins them, as vLLM joins the parts that a client sends.
    return "\n".join(texts["text"]), texts["reasoning"], texts["tool_call"]


def _read_mask(number: int, role: str, key: str, value: object) -> bool:
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise InputError(f"message {number}: {key} must be 0 or 1, not {value!r}; other weights cannot be trained")
    if value and role != "assistant":
        raise InputError(f"message {number} ({role}) has {key} {value!r}, but only turns of the assistant are trained")
    return bool(value)
