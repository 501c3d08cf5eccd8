"""Values as JSON, between the sandbox of a solution and that of its tests.

Plain values cross by value, and an object that occurs twice arrives as one. A subclass is sent as its base, except for
those of the standard library that are named here. Any other object is held, and the other side gets its number.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import itertools
import zoneinfo
from collections.abc import Callable, Iterator, Mapping
from typing import Any

tables: Any = importlib.import_module("jail_tables")  # beside this file, which is in no package inside the sandbox

SEQUENCES: dict[str, type] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
MAPPINGS = {"counter": collections.Counter, "ordered": collections.OrderedDict, "dict": dict}
VIEWS: dict[str, type] = {"keys": type({}.keys()), "values": type({}.values()), "items": type({}.items())}
DERIVED = (list, tuple, dict, set, frozenset, collections.deque)
CONTAINERS: dict[str, Any] = {**SEQUENCES, **VIEWS}
BUILTIN_TYPES = {value: name for name, value in vars(builtins).items() if isinstance(value, type)}
MAX_ITEMS = 100_000  # read from an iterator
Hold = Callable[[Any], Any]  # returns how the other side refers to an object


class Encoder:
    """Encodes values of one message. An iterator is read if `reads_iterators`, and held otherwise.

    known: handles of objects that the other side has, by their ids
    """

    def __init__(self, hold: Hold, *, reads_iterators: bool = False, known: Mapping[int, Any] | None = None) -> None:
        self.known = known or {}
        self.hold = hold
        self.reads_iterators = reads_iterators
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no other object gets the id of a seen one

    def encode(self, value: Any) -> Any:
        """Return a plain value as JSON; hold any other value and return its handle."""
        if value is None or isinstance(value, bool | str):
            return str.__str__(value) if isinstance(value, str) else value  # json.dumps escapes half a surrogate pair
        if hasattr(type(value), "_is_remote"):
            return {"handle": self.hold(value)}
        if id(value) in self.known:
            return {"handle": self.known[id(value)]}
        if id(value) in self.seen:
            return {"again": self.seen[id(value)]}
        if isinstance(value, int):
            return {"int": hex(int(value))}
        if isinstance(value, float):
            return {"float": float(value).hex()}
        if isinstance(value, slice):
            return {"slice": [self.encode(item) for item in (value.start, value.stop, value.step)]}
        tree = self._container(value)
        if tree is not None:
            self.seen[id(value)] = len(self.kept)
            self.kept.append(value)
            return {"derived": [tree, self.hold(value)]} if is_derived(value) else tree
        for encode in (_encode_simple, _encode_library):
            tree = encode(value)
            if tree is not None:
                return tree
        is_mock = type(value).__module__ == "unittest.mock"  # which has the methods of an iterator
        if self.reads_iterators and isinstance(value, Iterator) and not is_mock:
            return {"iterator": [self.encode(item) for item in itertools.islice(value, MAX_ITEMS)]}
        return {"handle": self.hold(value)}

    def _container(self, value: Any) -> Any:
        fields = getattr(type(value), "_fields", None)
        if isinstance(value, bytearray):
            return {"bytearray": bytes(value).hex()}
        for name, kind in MAPPINGS.items():
            if isinstance(value, kind):
                return {name: [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if isinstance(value, tuple) and fields is not None:
            return {"namedtuple": [type(value).__name__, list(fields), *map(self.encode, value)]}
        for name, sequence in CONTAINERS.items():
            if isinstance(value, sequence):
                return {name: [self.encode(item) for item in value]}
        return tables.encode(value, self.encode)


class Decoder:
    """Decodes values of one message: `seen` are the objects that may occur again."""

    def __init__(self, open_handle: Callable[[Any], Any]) -> None:
        self.open_handle = open_handle
        self.seen: list[Any] = []

    def decode(self, tree: Any) -> Any:
        """Return the value that was encoded; raise some exception for any other input."""
        if not isinstance(tree, dict):
            return tree
        ((kind, content),) = tree.items()
        if kind in SIMPLE:
            return SIMPLE[kind](content)
        if kind == "handle":
            return self.open_handle(content)
        if kind == "again":
            return self.seen[content]
        if kind == "iterator":
            return iter([self.decode(item) for item in content])
        if kind == "derived":
            plain, opened = self.decode(content[0]), self.open_handle(content[1])
            return opened if getattr(opened, "_is_open", False) else plain
        if kind == "slice":
            return slice(*map(self.decode, content))
        value = self._container(kind, content)
        self.seen.append(value)
        return value

    def _container(self, kind: str, content: Any) -> Any:
        if kind == "bytearray":
            return bytearray.fromhex(content)
        if kind in MAPPINGS:
            return MAPPINGS[kind]({self.decode(key): self.decode(item) for key, item in content})
        if kind == "namedtuple":
            return collections.namedtuple(content[0], content[1])(*map(self.decode, content[2:]))
        if kind not in CONTAINERS:
            return tables.decode(kind, content, self.decode)
        items = [self.decode(item) for item in content]
        if kind in VIEWS:
            pairs = {"keys": lambda: ((key, None) for key in items), "values": lambda: enumerate(items)}
            return getattr(dict(pairs.get(kind, lambda: items)()), kind)()
        return SEQUENCES[kind](items)


def encode(value: Any, hold: Hold, *, reads_iterators: bool = False, known: Mapping[int, Any] | None = None) -> Any:
    """Return one value as JSON."""
    return Encoder(hold, reads_iterators=reads_iterators, known=known).encode(value)


def decode(tree: Any, open_handle: Callable[[Any], Any]) -> Any:
    """Return the value that `encode` encoded; raise some exception for any other input."""
    return Decoder(open_handle).decode(tree)


def is_derived(value: Any) -> bool:
    """Return True for an object of a class of the solution that is also a list, a dict or such."""
    return type(value).__module__ == "solution" and isinstance(value, DERIVED) and not hasattr(type(value), "_fields")


def to_plain(value: Any) -> Any:
    """Return the contents of such an object."""
    base = next(kind for kind in DERIVED if isinstance(value, kind))
    return dict(dict.items(value)) if base is dict else base(base.__iter__(value))


def _encode_simple(value: Any) -> Any:
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, type) and value in BUILTIN_TYPES:
        return {"type": BUILTIN_TYPES[value]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    return None


def _encode_library(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return {"decimal": decimal.Decimal.__str__(value)}
    if isinstance(value, fractions.Fraction):
        return {"fraction": [value.numerator, value.denominator]}
    if isinstance(value, datetime.datetime):  # before date, its base
        zone = value.tzinfo
        if isinstance(zone, zoneinfo.ZoneInfo) and zone.key:
            return {"zoned": [datetime.datetime.isoformat(value.replace(tzinfo=None)), zone.key, value.fold]}
        is_plain = zone is None or type(zone) is datetime.timezone
        return {"datetime": datetime.datetime.isoformat(value)} if is_plain else None
    if isinstance(value, datetime.date):
        return {"date": datetime.date.isoformat(value)}
    if isinstance(value, datetime.time):
        return None if value.tzinfo is not None else {"time": datetime.time.isoformat(value)}
    if isinstance(value, datetime.timedelta):
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    kind = f"{type(value).__module__}.{type(value).__name__}"  # of modules that most code does not import
    if kind == "uuid.UUID":
        return {"uuid": value.hex}
    if kind in ("pathlib.PurePosixPath", "pathlib.PosixPath"):
        return {"path": [type(value).__name__, str(value)]}
    if kind == "array.array":
        return {"array": [value.typecode, value.tobytes().hex()]}
    return None


def _library(module: str, name: str) -> Any:
    return getattr(__import__(module), name)


SIMPLE: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "float": float.fromhex,
    "complex": lambda content: complex(*map(float.fromhex, content)),
    "bytes": bytes.fromhex,
    "type": lambda content: next(value for value, name in BUILTIN_TYPES.items() if name == content),
    "range": lambda content: range(*content),
    "decimal": decimal.Decimal,
    "fraction": lambda content: fractions.Fraction(*content),
    "datetime": datetime.datetime.fromisoformat,
    "zoned": lambda content: datetime.datetime.fromisoformat(content[0]).replace(
        tzinfo=zoneinfo.ZoneInfo(content[1]), fold=content[2]
    ),
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda content: datetime.timedelta(*content),
    "uuid": lambda content: _library("uuid", "UUID")(content),
    "path": lambda content: _library("pathlib", "PurePosixPath" if content[0] != "PosixPath" else "PosixPath")(
        content[1]
    ),
    "array": lambda content: _library("array", "array")(content[0], bytes.fromhex(content[1])),
}
