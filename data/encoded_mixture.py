"""A recipe's data set as encoded rows: its sources mixed and ordered as `load_mixture` does, without their texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rekatrain.data.encoded import EncodedRows, EncodedSource, encode_source, expand
from rekatrain.data.errors import InputError
from rekatrain.data.mixture import Section, check_sources, located, shares, sort_by, source_keywords
from rekatrain.data.sources import open_rows


@dataclass(frozen=True, kw_only=True)
class EncodedMixture:
    """The rows of a data set, mixed and in order, and those of each source by its name."""

    rows: EncodedRows
    by_source: dict[str, EncodedRows]


def encode_mixture(
    section: Section | Sequence[Section],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat: Mapping[str, Any],
    name: str = "dataset",
) -> EncodedMixture:
    """Return the encoded rows of all sources of a section, mixed by their weights.

    The weights are those of conversations, which may have several rows. Raises InputError as `load_mixture` and
    `RowEncoder` do.
    """
    from datasets import concatenate_datasets

    order = section.get("order") if isinstance(section, Mapping) else None
    by = order["by"] if isinstance(order, Mapping) else None

    def encode(**keywords: Any) -> EncodedSource:
        if keywords.get("streaming"):
            raise InputError(f"{name}.streaming is true, but these rows are read before the run starts: remove it")
        return encode_source(open_rows(**keywords), keywords, tokenizer, max_length, chat, by=by)

    encoded = [located(prefix, name, encode, keywords) for prefix, keywords in source_keywords(name, section)]
    check_sources(name, section, [one.origin for one in encoded])
    # A conversation without a row, such as one that was too long, has no part in the shares.
    kept = [np.flatnonzero(one.counts) for one in encoded]
    indices = shares(name, [one.origin for one in encoded], [len(some) for some in kept])
    whole = concatenate_datasets([one.rows.dataset for one in encoded]) if len(encoded) > 1 else encoded[0].rows.dataset
    starts = np.cumsum([0, *(len(one.counts) for one in encoded)])
    conversations = np.concatenate(
        [start + some[np.array(drawn)] for start, some, drawn in zip(starts[:-1], kept, indices, strict=True)]
    )
    if by is not None:
        keys = [key for one in encoded for key in one.keys]
        values = [keys[index] for index in conversations]
        conversations = np.array(sort_by(by, conversations.tolist(), values, str))
    if not np.array_equal(conversations, np.arange(starts[-1])):
        whole = whole.select(expand(np.concatenate([one.counts for one in encoded]), conversations))
    by_source = {one.origin.name: one.rows for one in encoded}
    return EncodedMixture(rows=EncodedRows(whole), by_source=by_source)
