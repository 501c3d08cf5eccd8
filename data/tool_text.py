"""Write tools and calls of tools as text: the chat format of the model has neither."""

import json
from contextlib import suppress
from typing import Any, Literal

from rekatrain.data.errors import InputError
from rekatrain.data.records import Record

ToolTurns = Literal["refuse", "literal"]

TOOL_LISTS = ("tools", "functions")  # keys of a record
ARGUMENT_KEYS = ("arguments", "parameters", "input")  # of a call: OpenAI's, Llama's and Anthropic's
CALL_PARTS = (*ARGUMENT_KEYS, "function", "name", "id", "type", "index")


def tool_definitions(record: Record, tool_turns: ToolTurns) -> str | None:
    """Return `tools` or `functions` of a record as text for the system message; raise InputError if refused."""
    present = [(key, record[key]) for key in TOOL_LISTS if record.get(key) not in (None, "", [], {}, "[]")]
    if not present:
        return None
    if len(present) > 1:
        raise InputError("the row has both 'tools' and 'functions': remove one of them")
    key, tools = present[0]
    if tool_turns == "refuse":
        raise InputError(
            f"the row has {key!r}, which shape the prompt: set tool_turns to literal to write them into the system "
            f"message, or keep them as a column only: columns: {{tool_list: {key}}}"
        )
    return f"Tools: {tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)}"


def call_texts(number: int, calls: Any) -> list[str]:  # a JSON value, not yet checked
    """Return each call of `tool_calls` or `function_call` as one line of JSON: its name and arguments.

    Raises InputError for a call without a name, and for a key that the line would lose.
    """
    if isinstance(calls, str):
        with suppress(ValueError):  # it is reported as text, below
            calls = json.loads(calls)
    lines = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"message {number} has a tool call without a function name: {call!r}")
        given = [key for key in ARGUMENT_KEYS if function.get(key) is not None]
        lost = [key for one in (call, function) for key in one if one[key] is not None and key not in CALL_PARTS]
        if len(given) > 1 or lost:
            what = f"both {given[0]!r} and {given[1]!r}" if len(given) > 1 else f"the unknown key {lost[0]!r}"
            raise InputError(f"message {number} has a tool call with {what}: remove one that is not needed")
        arguments = function[given[0]] if given else None
        if isinstance(arguments, str):
            with suppress(ValueError):  # other text is written as it is
                arguments = json.loads(arguments)
        lines.append(json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False))
    return lines
