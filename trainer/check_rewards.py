"""`rekatrain check-rewards`: the gold of every row against its own rewards, before a run. Loads no model.

rekatrain check-rewards RECIPE [key=value ...] [--num-rows N] [--num-wrong N]
"""

from collections.abc import Sequence

from rekatrain.data.errors import InputError
from rekatrain.data.mixture import load_mixture
from rekatrain.data.rows import Row
from rekatrain.rewards.check.check import RewardCheck, check_golds
from rekatrain.rewards.check.report import describe_check
from rekatrain.rewards.compose import RewardFunction, build_reward_functions
from rekatrain.rewards.gradable import check_source_columns, keep_gradable
from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.trainer.recipe.load import Recipe

NUM_SAMPLE = 64


def check_rewards(recipe: Recipe, *, num_rows: int | None = None, num_wrong: int = 200) -> RewardCheck:
    """Print the rewards of right and of wrong answers to the rows of `dataset`, and return them.

    num_rows:  rows to check, evenly spread over the data set; None: all of them
    num_wrong: rows of each source and reward to which wrong answers are made
    """
    if not recipe.rewards:
        raise InputError("the recipe has no rewards section: name the rewards to check there")
    functions = build_reward_functions(recipe.rewards)
    # A mixture may repeat rows.
    rows = list({(row.source.name, row.where): row for row in load_mixture(recipe.dataset).rows}.values())
    check_source_columns(functions, {row.source.name: row.source for row in rows}.values())
    gradable = keep_gradable(functions, rows)
    rows = [row for row, is_kept in zip(rows, gradable, strict=True) if is_kept]
    check = check_golds(
        functions, spread(rows, num_rows or len(rows)), ScoringConfig(**recipe.scoring), num_wrong=num_wrong
    )
    print(describe_check(check))
    return check


def describe_sample(functions: Sequence[RewardFunction], rows: Sequence[Row], scoring: ScoringConfig) -> str:
    """Return one line on the golds of a sample of the rows, for a dry run, and a hint for each reward that fails."""
    sample = spread(rows, NUM_SAMPLE)
    check = check_golds(functions, sample, scoring, num_wrong=0)
    parts = []
    for table in check.golds:
        ones, _, _, num_none, num_errors = table.counts()
        exceptions = [f"{count} {word}" for count, word in ((num_none, "None"), (num_errors, "errors")) if count]
        noted = f" ({', '.join(exceptions)})" if exceptions else ""
        name = table.name if table.kind == "gold" else f"{table.name} on responses"
        parts.append(f"{name} {ones} of {table.num_rows} are 1{noted}")
    parts += [f"{name}: {reason}" for name, reason in check.without_gold.items()]
    line = f"# golds of {len(sample)} of {len(rows)} rows: {'; '.join(parts)}"
    return "\n".join([line, *(f"# hint: {hint}" for hint in check.hints())])


def spread(rows: Sequence[Row], number: int) -> list[Row]:
    """Return at most `number` rows, evenly spread."""
    if number >= len(rows):
        return list(rows)
    return [rows[index * len(rows) // number] for index in range(number)]
