"""Prompts that other data sets hold too, exactly or nearly: a recipe's `overlap`.

    overlap: {with: {path: sft.jsonl}, similarity: 0.7, remove: true}

Prompts are compared by their words, whatever the case, the white space and the system message. Two are nearly equal if
the Jaccard similarity of their 5-grams of words is high enough. MinHash (datasketch) finds the candidates, and the
5-grams themselves decide.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from rekatrain.data.chat import Message
from rekatrain.data.errors import InputError
from rekatrain.data.options import check_keywords
from rekatrain.data.rows import Row

if TYPE_CHECKING:  # which has an Overlap
    from rekatrain.data.stream import RowStream

# Words per n-gram. A shorter prompt is one n-gram: it is nearly equal to no other.
NGRAM = 5
NUM_PERMUTATIONS = 128
# Bands and their rows: of pairs with a similarity of 0.7, 99.98 % become candidates; of 0.5, 87 %.
BANDS = (32, 4)
NUM_NAMED = 3  # pairs that a message names
# Words and single signs: 3+5 differs from 3-5.
_WORDS = re.compile(r"\w+|[^\w\s]")

# Keys of a section that change none of its prompts.
LEFT_OUT = ("order", "weight", "overlap")


@dataclass(frozen=True, kw_only=True)
class OverlapOptions:
    """The keys of `overlap` but for `with`, the data sets that are compared.

    similarity: of 5-grams, from which on two prompts are nearly equal; 1 finds equal prompts alone
    remove:     leave the rows out that overlap; false reports them only
    """

    similarity: Annotated[float, Ge(0.5), Le(1)] = 0.7
    remove: bool = False


@dataclass(kw_only=True)
class Overlap:
    """The prompts of other data sets, and the counts of the rows that have been compared with them.

    others: the rows of each of the other data sets
    """

    others: Sequence["RowStream"]
    options: OverlapOptions
    num_compared: int = 0
    num_equal: int = 0
    num_near: int = 0
    named: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._is_read = False
        self._words: dict[str, str] = {}  # the words of a prompt -> the row that has it
        self._grams: list[tuple[str, frozenset[str]]] = []

    def keeps(self, row: Row, where: str) -> bool:
        """Count a row; return False if it overlaps and is to be left out."""
        if not self._is_read:
            self._read()
        self.num_compared += 1
        words = _words(_texts(row, where)[-1])
        equal = self._words.get(" ".join(words))
        if equal is not None:
            self.num_equal += 1
            self._name(f"{where} is {equal}")
            return not self.options.remove
        similarity, other = self._most_similar(_ngrams(words))
        if similarity >= self.options.similarity:
            self.num_near += 1
            self._name(f"{where} is nearly {other} ({similarity:.2f})")
            return not self.options.remove
        return True

    def report(self) -> str:
        """Return the counts as one line."""
        num_found = self.num_equal + self.num_near
        done = "left out" if self.options.remove else "kept; overlap: {remove: true} leaves them out"
        counts = f" ({self.num_equal} exactly, {self.num_near} nearly), {done}: {'; '.join(self.named)}"
        found = counts if num_found else ""
        title = ", ".join(other.title for other in self.others)
        return f"{num_found} of {self.num_compared} prompts are in {title}{found}"

    def contents(self) -> list[object]:
        """Return what describes the other data sets, for a fingerprint."""
        return [other.contents() for other in self.others]

    def _name(self, pair: str) -> None:
        if len(self.named) < NUM_NAMED:
            self.named.append(pair)

    def _read(self) -> None:
        from datasketch import MinHashLSH

        self._is_read = True
        self._index = MinHashLSH(num_perm=NUM_PERMUTATIONS, params=BANDS)
        for other in self.others:
            for row in other:
                for text in _texts(row, row.where):
                    words = _words(text)
                    joined = " ".join(words)
                    if joined in self._words:
                        continue
                    self._words[joined] = row.where
                    grams = _ngrams(words)
                    if grams and self.options.similarity < 1:
                        self._index.insert(len(self._grams), _sketch(grams))
                        self._grams.append((row.where, grams))

    def _most_similar(self, grams: frozenset[str]) -> tuple[float, str]:
        """Return the highest similarity to a prompt of the others, and where that prompt is."""
        if not grams or not self._grams:
            return 0.0, ""
        found = [self._grams[index] for index in self._index.query(_sketch(grams))]
        return max(((len(grams & other) / len(grams | other), where) for where, other in found), default=(0.0, ""))


def make_overlap(overlap: Mapping[str, Any], opened: Callable[..., "RowStream"]) -> Overlap:
    """Return the comparison that a recipe's `overlap` describes; `opened` opens the rows of a section."""
    parts = check_overlap(overlap)
    kept = [{key: value for key, value in part.items() if key not in LEFT_OUT} for part in parts]
    options = OverlapOptions(**{key: value for key, value in overlap.items() if key != "with"})
    return Overlap(others=[opened(**part) for part in kept], options=options)


def check_overlap(overlap: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sections under `with`; raise InputError for a key or a value of `overlap` that is wrong."""
    sections = overlap.get("with")
    options = {key: value for key, value in overlap.items() if key != "with"}
    check_keywords("overlap", options, OverlapOptions)
    parts = [sections] if isinstance(sections, dict) else sections
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) and "path" in part for part in parts):
        raise InputError("overlap.with must be a data set, such as {path: sft.jsonl}, or a list of them")
    return parts


def _texts(row: Row, where: str) -> list[str]:
    """Return the conversation up to each turn of the user, without the system message; the last is the prompt."""
    if row.tokens is not None:
        raise InputError(f"{where}: a row of token ids has no prompt that overlap could compare")
    turns: list[Message] = [turn for turn in row.messages if turn["role"] != "system"]
    ends = [index for index, turn in enumerate(turns, start=1) if turn["role"] != "assistant"]
    return [" ".join(turn["content"] for turn in turns[:end]) for end in ends]


def _words(text: str) -> list[str]:
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


def _ngrams(words: Sequence[str]) -> frozenset[str]:
    """Return the n-grams of words; none of a text that has no more words than one n-gram."""
    return frozenset(_each_ngram(words)) if len(words) > NGRAM else frozenset()


def _each_ngram(words: Sequence[str]) -> Iterator[str]:
    for start in range(len(words) - NGRAM + 1):
        yield " ".join(words[start : start + NGRAM])


def _sketch(grams: frozenset[str]) -> Any:  # a MinHash: datasketch is imported where an overlap is wanted
    from datasketch import MinHash

    sketch = MinHash(num_perm=NUM_PERMUTATIONS, seed=1)
    sketch.update_batch([gram.encode() for gram in grams])
    return sketch
