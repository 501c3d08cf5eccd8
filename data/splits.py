"""Held-out rows of a data set: a fixed part of its rows, chosen by a hash of the prompt."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rekatrain.data.chat import IGNORED_LABEL
from rekatrain.data.errors import InputError
from rekatrain.data.rows import Row

Part = Literal["train", "eval"]
SPLIT_KEYS = ("eval", "of", "part")
MAX_HASH = 1 << 64


@dataclass(frozen=True, kw_only=True)
class Split:
    """A recipe's `split`.

    of:       the split of a Hugging Face dataset; None means train
    fraction: the fraction of the prompts that is held out; None if nothing is cut
    part:     the part of the rows to load: "train", or "eval" for those held out
    """

    of: str | None = None
    fraction: float | None = None
    part: Part = "train"

    def holds(self, row: Row) -> bool:
        """Return True if the row is in this part. Rows with equal prompts are in the same part."""
        if self.fraction is None:
            return True
        return (_hash_prompt(row) < self.fraction * MAX_HASH) == (self.part == "eval")


def read_split(split: str | Mapping[str, Any] | None) -> Split:
    """Read the key `split` of a dataset section: a name, or `{eval: 0.02}`, and `of` for the split that is cut.

    Raises InputError for an unknown key and for a fraction outside of 0 to 1.
    """
    if not isinstance(split, Mapping):
        return Split(of=split)
    unknown = [key for key in split if key not in SPLIT_KEYS]
    if unknown:
        raise InputError(f"split has the unknown key {unknown[0]!r}; it may have {', '.join(SPLIT_KEYS)}")
    fraction, part = split.get("eval"), split.get("part", "train")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise InputError(f"split.eval must be a fraction between 0 and 1, such as 0.02, not {fraction!r}")
    if part not in get_args(Part):
        raise InputError(f"split.part must be train or eval, not {part!r}")
    if not isinstance(split.get("of"), str | None):
        raise InputError(f"split.of must be the name of a split, not {split['of']!r}")
    return Split(of=split.get("of"), fraction=float(fraction), part=part)


def _hash_prompt(row: Row) -> int:
    if row.tokens is not None:
        labels = row.tokens.labels
        start = next(index for index, label in enumerate(labels) if label != IGNORED_LABEL)
        prompt: object = row.tokens.input_ids[:start]
    else:
        prompt = [[turn["role"], turn["content"]] for turn in row.prompt]
    return int.from_bytes(hashlib.sha256(json.dumps(prompt).encode()).digest()[:8], "big")
