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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rekatrain.data.errors import InputError
from rekatrain.data.options import check_keywords, check_type, did_you_mean
from rekatrain.data.rows import Row, Source
from rekatrain.data.sources import load_rows

logger = logging.getLogger(__name__)

Section = Mapping[str, Any]


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
        # Evaluation has no order, and reads each row once.
        kept = {key: value for key, value in part.items() if key not in ("order", "weight")}
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
    loaded: list[list[Row]] = []
    for prefix, part in _parts(name, section):
        keywords = {key: value for key, value in part.items() if key != "order"}
        if prefix != name:
            keywords.setdefault("source", default_name(part["path"]))
        try:
            loaded.append(load_rows(**keywords).rows)
        except InputError as error:
            if prefix == name:
                raise
            raise InputError(f"{prefix}: {error}") from error
    sources = [rows[0].source for rows in loaded]
    twice = [one for one, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise InputError(f"{name} has two sources with the name {twice[0]!r}: give one another name by the key source")
    if isinstance(section, Mapping) and "sources" not in section and sources[0].weight is not None:
        raise InputError(f"{name}.weight is for one source of several: remove it")

    columns = sorted({column for source in sources for column in source.columns})
    rows = [_with_columns(row, columns) for mixed in _mix(name, loaded) for row in mixed]
    order = section.get("order", "shuffled") if isinstance(section, Mapping) else "shuffled"
    if isinstance(order, Mapping):
        rows = _sort(rows, order["by"])
    return Mixture(rows=rows, sources=sources, is_shuffled=order == "shuffled")


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


def _mix(name: str, loaded: list[list[Row]]) -> list[list[Row]]:
    """Return the rows that each source gives to a pass."""
    weights = [rows[0].source.weight for rows in loaded]
    given = [weight for weight in weights if weight is not None]
    if not given or len(loaded) == 1:
        return loaded
    if len(given) < len(weights):
        missing = loaded[weights.index(None)][0].source.name
        raise InputError(f"{name}: source {missing} has no weight, and another one has: give each a weight, or none")
    num_rows = sum(len(rows) for rows in loaded)
    mixed = []
    for number, (rows, weight) in enumerate(zip(loaded, given, strict=True)):
        num_given = max(1, round(num_rows * weight / sum(given)))
        passes, rest = divmod(num_given, len(rows))
        some = sorted(random.Random(number).sample(range(len(rows)), rest))
        mixed.append(rows * passes + [rows[index] for index in some])
        logger.info(
            "%s: %s gives %d of %d rows (%.2f passes over its %d)",
            name,
            rows[0].source.name,
            num_given,
            num_rows,
            num_given / len(rows),
            len(rows),
        )
    return mixed


def _with_columns(row: Row, columns: Sequence[str]) -> Row:
    if len(row.columns) == len(columns):
        return row
    return replace(row, columns={column: row.columns.get(column) for column in columns})


def _sort(rows: list[Row], column: str) -> list[Row]:
    missing = next((row for row in rows if row.columns.get(column) is None), None)
    if missing is not None:
        raise InputError(f"{missing.where}: order is by {column!r}, and the row has no such column")
    try:
        return sorted(rows, key=lambda row: row.columns[column])
    except TypeError as error:
        raise InputError(f"order is by {column!r}, whose values cannot be compared: {error}") from error
