"""Parse the YAML of a recipe or of an override into plain values, within limits of size, depth and aliases.

A few hundred bytes of aliases stand for gigabytes ("billion laughs"), and an alias inside its anchor for a tree
without an end; both would be copied later. So the parser's events are counted first, which makes no objects.
"""

from datetime import date
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, Event, NodeEvent

from rekatrain.data.errors import InputError
from rekatrain.data.options import shorten

MAX_CHARACTERS = 200_000
MAX_VALUES = 20_000
MAX_DEPTH = 50
MAX_MESSAGE = 400  # characters


def parse_yaml(text: str, where: str) -> Any:  # any value that JSON has, too
    """Return the value of a YAML document; `where` names the text in messages.

    Raises InputError for invalid YAML, a document beyond the limits, an alias of a value that holds it, and values that
    JSON does not have: dates, bytes, sets, keys that are no text.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{where} has {len(text):,} characters; a recipe has at most {MAX_CHARACTERS:,}")
    try:
        _check_size(text, where)
        value = YAML(typ="safe", pure=True).load(text)
    # Beside its own errors, ruamel lets out those of `int`, `float`, `date`, `chr`, and of a look-up of true or false.
    except (YAMLError, ValueError, LookupError, TypeError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{where} is not valid YAML: {reason[:MAX_MESSAGE]}") from error
    return _plain(value, where)


def _check_size(text: str, where: str) -> None:
    """Raise InputError if the document nests deeper, or its aliases stand for more values, than a recipe has."""
    sizes: dict[str, int] = {}  # of anchors
    open_anchors: list[tuple[str | None, int]] = []  # anchors of the collections around this event; values before them
    num_values = 0
    event: Event
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, CollectionEndEvent):
            anchor, before = open_anchors.pop()
            if anchor is not None:
                sizes[anchor] = num_values - before
        elif isinstance(event, AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_anchors):
                raise InputError(f"{where}: the alias *{event.anchor} stands inside its anchor: remove it")
            num_values += sizes.get(event.anchor, 1)
        elif isinstance(event, NodeEvent):
            if isinstance(event, CollectionStartEvent):
                open_anchors.append((event.anchor, num_values))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
            num_values += 1
        if len(open_anchors) > MAX_DEPTH:
            raise InputError(f"{where} is nested more than {MAX_DEPTH} deep: a recipe has sections, keys and values")
        if num_values > MAX_VALUES:
            raise InputError(f"{where} holds more than {MAX_VALUES:,} values, its aliases written out: shorten it")


def _plain(value: Any, where: str) -> Any:  # what ruamel made
    """Return a copy without shared parts; raise InputError for a value that JSON does not have."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise InputError(f"{where}: the text {shorten(value)} holds half a character: write the whole one")
        return value
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    if type(value) is dict:
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{where}: the key {shorten(key)} is no text: write it in quotes")
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    kind = "a date" if isinstance(value, date) else "bytes" if isinstance(value, bytes) else "a set or a list of pairs"
    raise InputError(f"{where}: {shorten(value)} is read as {kind}, which a recipe does not have: write it in quotes")
