"""Find the rows and sources that the rewards of a recipe can read, before a run."""

import logging
from collections.abc import Collection, Sequence

from rekatrain.data.errors import InputError
from rekatrain.data.rows import Row, Source
from rekatrain.rewards.compose import RewardFunction
from rekatrain.rewards.grader import check_columns

logger = logging.getLogger(__name__)


def keep_gradable(functions: Sequence[RewardFunction], rows: Sequence[Row]) -> list[bool]:
    """Return True for each row whose columns all rewards that judge it can read.

    A row that one of them cannot read is a bad row: raises InputError, or skips it where its source skips bad rows.
    """
    checks = [function for function in functions if function.check_row is not None]
    kept = []
    for row in rows:
        try:
            for function in checks:
                if function.check_row is not None and row.source.is_judged_by(function.name):
                    function.check_row(**{name: row.columns.get(name) for name in function.columns})
        except InputError as error:
            if row.source.bad_rows != "skip":
                raise InputError(f"{row.where}: {error}; fix the row, or set bad_rows: skip") from error
            logger.warning("%s is skipped: %s", row.where, error)
            kept.append(False)
        else:
            kept.append(True)
    if rows and not any(kept):
        raise InputError("no row is left whose columns the rewards can read")
    return kept


def check_source_columns(functions: Sequence[RewardFunction], sources: Collection[Source]) -> None:
    """Raise InputError if a reward judges no source, or needs a column that no source which it judges has."""
    for function in functions:
        judged = [source for source in sources if source.is_judged_by(function.name)]
        if not judged:
            raise InputError(
                f"reward {function.name} judges no source: name it in the rewards of one, or take it out of the recipe"
            )
        check_columns([function], {column for source in judged for column in source.columns})
