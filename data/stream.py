"""One pass over the rows of a source: records are laid out, checked and filtered, and those left out are counted."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.data.files import Located
from rekatrain.data.filters import keeps
from rekatrain.data.finish import FinishOptions, finish_row, unread_tags
from rekatrain.data.overlap import Overlap
from rekatrain.data.rows import Row, Source
from rekatrain.data.splits import Split

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RowStream:
    """The good rows of a source, one at a time. It is iterated once; then it holds the counts.

    title:     name of the source in messages
    records:   the records, each with its origin; they are read as the stream is iterated
    to_row:    lays a record out; raises InputError for a bad one
    origin:    the source of the rows; the names of their columns are added to it
    only, cut: filters of rows
    limit:     number of good rows after which the stream ends; None: none
    contents:  describes what is read, for a fingerprint: files with sizes and times, or a commit; None: unknown
    overlap:   compares the rows with those of other data sets, and leaves some out; None: nothing is compared
    skipped:   one message per bad row so far, such as "train.jsonl:17: prompt is empty"
    """

    title: str
    records: Iterable[Located]
    to_row: Callable[[Any], Row]  # Any: a record, not yet checked
    origin: Source
    finishing: FinishOptions
    only: Mapping[str, Any]
    cut: Split
    limit: int | None
    contents: Callable[[], object]
    overlap: Overlap | None = None
    skipped: list[str] = field(default_factory=list)
    num_rows: int = 0
    num_left_out: int = 0
    num_tagged: int = 0
    _first_tagged: tuple[str, Sequence[str]] | None = None

    def __iter__(self) -> Iterator[Row]:
        """Yield the good rows.

        Raises InputError for a bad row, unless the source skips them, and at the end if no row was good.
        """
        for where, record in self.records:
            try:
                row = finish_row(self.to_row(record), self.finishing)
            except InputError as error:
                message = f"{where}: {error}"
                if self.origin.bad_rows == "refuse":
                    raise InputError(message) from error
                self.skipped.append(message)
                continue
            if not keeps(row, self.only):
                self.num_left_out += 1
                continue
            if not self.cut.holds(row) or (self.overlap is not None and not self.overlap.keeps(row, where)):
                continue
            self.origin.columns.update(row.columns)
            tagged, tags = unread_tags([row])
            if tagged:
                self.num_tagged += 1
                self._first_tagged = self._first_tagged or (where, tags)
            self.num_rows += 1
            yield dataclasses.replace(row, source=self.origin, where=where)
            if self.num_rows == self.limit:
                break
        self._check_not_empty()

    def report(self) -> Iterator[tuple[int, str]]:
        """Yield a level of logging and a message for each kind of row that was left out, or that looks wrong."""
        if self.skipped:
            yield logging.WARNING, f"{self.title}: {len(self.skipped)} bad rows skipped; the first: {self.skipped[0]}"
        if self.num_left_out:
            kept = f"leaves out {self.num_left_out} rows, and keeps {self.num_rows}"
            yield logging.INFO, f"{self.title}: only {dict(self.only)} {kept}"
        if self.overlap is not None:
            yield logging.WARNING, f"{self.title}: {self.overlap.report()}"
        if self._first_tagged:
            where, tags = self._first_tagged
            quoted = ", ".join(f'"{tag}"' for tag in tags)
            yield (
                logging.WARNING,
                f"{self.title}: {self.num_tagged} of {self.num_rows} rows have {tags[0]} in an answer, first {where}; "
                f"it is trained as text of the answer. To read it as reasoning: reasoning_tags: [{quoted}]",
            )

    def _check_not_empty(self) -> None:
        if self.num_rows:
            return
        part = f" in the {self.cut.part} part of its split" if self.cut.fraction else ""
        if self.num_left_out:
            part += f" that only keeps: {dict(self.only)} leaves out {self.num_left_out}"
        if self.overlap is not None and self.overlap.num_compared:
            part += f" that overlap keeps: {self.overlap.report()}"
        first = f"; the first bad one: {self.skipped[0]}" if self.skipped else ""
        raise InputError(f"{self.title} has no good row{part}{first}")


def log_report(report: Iterable[tuple[int, str]]) -> None:
    """Log the messages of a pass over rows."""
    for level, message in report:
        logger.log(level, "%s", message)
