"""Rows that are read and encoded while stage sft trains: `streaming: true`, for data that does not fit on the disk.

`datasets` mixes the sources by their weights and shuffles the rows within a buffer. A resumed run reads the rows of the
earlier steps again, without training on them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import EncodedRow
from rekatrain.data.errors import InputError
from rekatrain.data.mixture import Section, located, source_keywords
from rekatrain.data.sources import open_rows
from rekatrain.data.stream import log_report
from rekatrain.data.training_rows import RowEncoder

if TYPE_CHECKING:
    import datasets

# Rows among which the next one is drawn.
BUFFER_ROWS = 1000
# Rows that are read before a run starts: their mistakes are reported at once.
NUM_FIRST = 100


def is_streaming(section: Section | Sequence[Section], name: str = "dataset") -> bool:
    """Return True if the rows of a section are streamed; raise InputError if only some of its sources are."""
    flags = [bool(keywords.get("streaming")) for _, keywords in source_keywords(name, section)]
    if any(flags) and not all(flags):
        raise InputError(f"{name}: streaming is true for some of the sources: set it for each, or for none")
    return any(flags)


def stream_mixture(
    section: Section | Sequence[Section],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat: Mapping[str, Any],
    *,
    seed: int,
    name: str = "dataset",
) -> "tuple[datasets.IterableDataset, list[EncodedRow], list[object]]":
    """Return the rows of a section as a stream, its first rows, and the contents of its sources for a fingerprint."""
    from datasets import Features, IterableDataset, List, Value, concatenate_datasets, interleave_datasets

    order = section.get("order", "shuffled") if isinstance(section, Mapping) else "shuffled"
    if isinstance(order, Mapping):
        raise InputError(f"{name}.order is by {order['by']!r}, which needs all rows at once: remove streaming")
    features = Features({column: List(Value("int32")) for column in ("input_ids", "labels")})
    streams = []
    contents: list[object] = []
    weights: list[float | None] = []
    for prefix, keywords in source_keywords(name, section):
        contents.append([keywords, located(prefix, name, open_rows, keywords).contents()])
        weights.append(keywords.get("weight"))
        options = {"prefix": prefix, "name": name, "keywords": keywords}
        encoding = {"tokenizer": tokenizer, "max_length": max_length, "chat": dict(chat)}
        streams.append(IterableDataset.from_generator(_rows, features=features, gen_kwargs=options | encoding))
    given = [weight for weight in weights if weight is not None]
    if given and len(weights) > 1:
        if len(given) < len(weights):
            raise InputError(f"{name}: a source has no weight, and another one has: give each a weight, or none")
        shares = [weight / sum(given) for weight in given]
        whole = interleave_datasets(streams, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    else:
        whole = concatenate_datasets(streams) if len(streams) > 1 else streams[0]
    first = [EncodedRow(input_ids=row["input_ids"], labels=row["labels"]) for row in islice(whole, NUM_FIRST)]
    if order == "shuffled":
        whole = whole.shuffle(seed=seed, buffer_size=BUFFER_ROWS)
    return whole, first, contents


def _rows(
    prefix: str,
    name: str,
    keywords: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat: Mapping[str, Any],
) -> Iterator[dict[str, list[int]]]:
    """Yield the rows of one pass over a source, and log the counts at its end."""
    stream, encoder = located(prefix, name, open_rows, keywords), RowEncoder(tokenizer, max_length, **chat)
    for made in encoder.encode(stream):
        for row in made:
            yield {"input_ids": row.input_ids, "labels": row.labels}
    log_report(stream.report())
    log_report(encoder.report())
