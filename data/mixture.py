"""A recipe's data set: one source, or several that are mixed, in an order.

    dataset:
      order: {by: difficulty}
      sources:
        - {path: gsm8k.jsonl, format: gsm8k, weight: 3, rewards: [math_answer]}
        - {path: chats/, source: chat, weight: 1, rewards: [judge]}

A list of sources is short for a section with `sources` alone, and a section without it is one source.
"""

import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from rekatrain.data.errors import InputError
from rekatrain.data.options import check_keywords, check_type, did_you_mean
from rekatrain.data.overlap import LEFT_OUT, check_overlap
from rekatrain.data.rows import Row, Source
from rekatrain.data.sources import load_rows

logger = logging.getLogger(__name__)

Section = Mapping[str, Any]
Result = TypeVar("Result")
Item = TypeVar("Item")

# By the values of a column: from the smallest to the largest.
Order = Literal["shuffled", "as_is"] | dict[Literal["by"], str]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The rows of a data set.

    rows:        each with all columns of the data set, None where its source has no such column
    sources:     the sources, in the order of the recipe
    is_shuffled: False if each pass over the rows goes in their order
    """

    rows: list[Row]
    sources: list[Source]
    is_shuffled: bool


def check_dataset(name: str, section: Section | Sequence[Section], rewards: Collection[str]) -> None:
    """Raise InputError for a key or a value of a dataset section that is wrong, with its dotted name.

    rewards: names of the recipe's rewards, which a source may name
    """
    if isinstance(section, Mapping) and "sources" in section:
        check_keywords(name, section, _sources_section)
        if not section["sources"]:
            raise InputError(f"{name}.sources is empty: name at least one source")
    parts = _parts(name, section)
    if not parts:
        raise InputError(f"{name} is an empty list: name at least one source")
    for prefix, part in parts:
        if prefix == name and "order" in part:
            check_type(f"{name}.order", part["order"], Order)
        is_whole = prefix == name  # the order of a list's sources is not that of one of them
        check_keywords(prefix, {key: value for key, value in part.items() if key != "order" or not is_whole}, load_rows)
        if part.get("overlap") is not None:
            for index, other in enumerate(check_overlap(part["overlap"])):
                kept = {key: value for key, value in other.items() if key not in LEFT_OUT}
                check_keywords(f"{prefix}.overlap.with.{index}", kept, load_rows)
        judges = part.get("rewards")
        if judges is not None and not judges:
            raise InputError(f"{prefix}.rewards is empty: name the rewards that judge the source, or remove the key")
        for reward in judges or ():
            if reward not in rewards:
                hint = did_you_mean(reward, rewards)
                raise InputError(f"{prefix}.rewards names {reward!r}, which is no reward of the recipe{hint}")


def is_shuffled(section: Section | Sequence[Section]) -> bool:
    """Return True unless the section's `order` is `as_is` or by a column."""
    return not isinstance(section, Mapping) or section.get("order", "shuffled") == "shuffled"


def held_out_section(section: Section | Sequence[Section]) -> list[dict[str, Any]] | None:
    """Return an eval_dataset of the rows that `split: {eval: ...}` holds out, or None if no source has one."""
    parts = [part for _, part in _parts("dataset", section) if isinstance(part.get("split"), Mapping)]
    held_out = []
    for part in parts:
        # Evaluation has no order, and reads each row once, before the run starts.
        kept = {key: value for key, value in part.items() if key not in ("order", "weight", "streaming")}
        held_out.append({**kept, "split": {**part["split"], "part": "eval"}})
    return held_out or None


def source_paths(section: Section | Sequence[Section]) -> list[str]:
    """Return the paths of all sources."""
    paths = [part["path"] for _, part in _parts("dataset", section)]
    return [one for path in paths for one in ([path] if isinstance(path, str) else path)]


def load_mixture(section: Section | Sequence[Section], name: str = "dataset") -> Mixture:
    """Load the rows of all sources of a section, mixed by their weights.

    Weights are shares of the rows: a pass has as many rows as the sources together, and each source gives its share of
    them. A source that has fewer rows repeats them, and of one that has more, a random part is used, the same in every
    run. Without weights each row is used once.
    Raises InputError as `load_rows` does, for two sources with one name, and for an order that the rows do not allow.
    """
    loaded = [located(prefix, name, load_rows, keywords).rows for prefix, keywords in source_keywords(name, section)]
    sources = [rows[0].source for rows in loaded]
    check_sources(name, section, sources)
    columns = sorted({column for source in sources for column in source.columns})
    indices = shares(name, sources, [len(rows) for rows in loaded])
    rows = [_with_columns(rows[index], columns) for rows, some in zip(loaded, indices, strict=True) for index in some]
    order = section.get("order", "shuffled") if isinstance(section, Mapping) else "shuffled"
    if isinstance(order, Mapping):
        rows = sort_by(order["by"], rows, [row.columns.get(order["by"]) for row in rows], lambda row: row.where)
    return Mixture(rows=rows, sources=sources, is_shuffled=order == "shuffled")


def source_keywords(name: str, section: Section | Sequence[Section]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the dotted name of each source, and the keywords of `open_rows` for its rows."""
    for prefix, part in _parts(name, section):
        keywords = {key: value for key, value in part.items() if key != "order"}
        if prefix != name:
            keywords.setdefault("source", default_name(part["path"]))
        yield prefix, keywords


def located(prefix: str, name: str, function: Callable[..., Result], keywords: Mapping[str, Any]) -> Result:
    """Call a function with a source's keywords; an InputError of one source of several names it."""
    try:
        return function(**keywords)
    except InputError as error:
        if prefix == name:
            raise
        raise InputError(f"{prefix}: {error}") from error


def check_sources(name: str, section: Section | Sequence[Section], sources: Sequence[Source]) -> None:
    """Raise InputError for two sources with one name, and for a weight of a single source."""
    twice = [one for one, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise InputError(f"{name} has two sources with the name {twice[0]!r}: give one another name by the key source")
    if isinstance(section, Mapping) and "sources" not in section and sources[0].weight is not None:
        raise InputError(f"{name}.weight is for one source of several: remove it")


def sort_by(column: str, items: Sequence[Item], values: Sequence[Any], where: Callable[[Item], str]) -> list[Item]:
    """Return items by the values of a column, from the smallest to the largest; equal ones keep their order."""
    missing = next((item for item, value in zip(items, values, strict=True) if value is None), None)
    if missing is not None:
        raise InputError(f"{where(missing)}: order is by {column!r}, and the row has no such column")
    try:
        order = sorted(range(len(items)), key=lambda index: values[index])
    except TypeError as error:
        raise InputError(f"order is by {column!r}, whose values cannot be compared: {error}") from error
    return [items[index] for index in order]


def default_name(path: str | list[str]) -> str:
    """Return the last part of a path without suffixes and wildcards.

    >>> default_name("rows/a.jsonl.gz"), default_name("chats/*.jsonl"), default_name("reasoning_gym:chain_sum")
    ('a', 'chats', 'chain_sum')
    """
    first = path if isinstance(path, str) else path[0]
    names = [part.partition(".")[0] for part in re.split(r"[/:]", first)]
    return next((name for name in reversed(names) if name.strip("*?[]")), first)


def _sources_section(sources: list[dict[str, Any]], *, order: Order = "shuffled") -> None:
    """Declare the keys of a section with several sources."""


def _parts(name: str, section: Section | Sequence[Section]) -> list[tuple[str, Section]]:
    """Return the dotted name and the keywords of each source."""
    if isinstance(section, Mapping):
        if "sources" not in section:
            return [(name, section)]
        return [(f"{name}.sources.{number}", part) for number, part in enumerate(section["sources"])]
    return [(f"{name}.{number}", part) for number, part in enumerate(section)]


def shares(name: str, sources: Sequence[Source], lengths: Sequence[int]) -> list[list[int] | range]:
    """Return for each source the indices of the rows that it gives to a pass, by the weights.

    lengths: number of rows of each source
    Raises InputError where only some of the sources have a weight.
    """
    weights = [source.weight for source in sources]
    given = [weight for weight in weights if weight is not None]
    if not given or len(sources) == 1:
        return [range(length) for length in lengths]
    if len(given) < len(weights):
        missing = sources[weights.index(None)].name
        raise InputError(f"{name}: source {missing} has no weight, and another one has: give each a weight, or none")
    num_rows = sum(lengths)
    mixed: list[list[int] | range] = []
    for number, (source, length, weight) in enumerate(zip(sources, lengths, given, strict=True)):
        num_given = max(1, round(num_rows * weight / sum(given)))
        passes, rest = divmod(num_given, length)
        some = sorted(random.Random(number).sample(range(length), rest))
        mixed.append([*range(length)] * passes + some)
        logger.info(
            "%s: %s gives %d of %d rows (%.2f passes over its %d)",
            name,
            source.name,
            num_given,
            num_rows,
            num_given / length,
            length,
        )
    return mixed


def _with_columns(row: Row, columns: Sequence[str]) -> Row:
    if len(row.columns) == len(columns):
        return row
    return replace(row, columns={column: row.columns.get(column) for column in columns})
