"""`rekatrain filter`: keep the prompts whose pass rate lies in a range, and write them with it.

    rekatrain filter RECIPE

The recipe's section `filter:` (config.py) names the folder; its `rows.jsonl` has the column `pass_rate`, for
`order: {by: pass_rate}` and `only: {pass_rate: {min: 0.2}}`.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.synthesis.config import FilterConfig, read_section
from rekatrain.trainer.synthesis.engine import Synthesis, synthesize
from rekatrain.trainer.synthesis.journal import ROWS
from rekatrain.trainer.synthesis.keep import pass_rate
from rekatrain.trainer.synthesis.rows import make_row, whole_messages, write_rows


def filter_prompts(recipe: Recipe) -> Path:
    """Write the rows and print the counts; return the file."""
    config = read_section("filter", recipe.filter, recipe.rewards, FilterConfig)
    path = Path(config.out) / ROWS

    def write(synthesis: Synthesis) -> None:
        counts: Counter[str] = Counter()
        num_rows = write_rows(path, _rows(config, synthesis, counts))
        _report(path, config, synthesis, counts, num_rows)

    synthesize(recipe, config, write)
    return path


def _rows(config: FilterConfig, synthesis: Synthesis, counts: Counter[str]) -> Iterator[dict[str, object]]:
    low, high = config.bounds
    for question in synthesis.questions:
        keys = [key for key in question.keys(config.num_generations) if key in synthesis.journal.answers]
        rate, num_judged = pass_rate([synthesis.journal.score(key) for key in keys], synthesis.deciding)
        if rate is None:
            counts["not judged"] += 1
            continue
        counts["all right" if rate == 1 else "none right" if rate == 0 else "some right"] += 1
        if low <= rate <= high:
            row = question.prompt.row
            # Of an earlier filter, whose rates these replace.
            earlier = {name: value for name, value in row.columns.items() if name not in ("pass_rate", "num_judged")}
            yield make_row(
                replace(row, columns=earlier), whole_messages(row), {"pass_rate": rate, "num_judged": num_judged}
            )


def _report(path: Path, config: FilterConfig, synthesis: Synthesis, counts: Counter[str], num_rows: int) -> None:
    low, high = config.bounds
    print(
        f"{path}: {num_rows} of {len(synthesis.questions)} prompts have a pass rate from {low:g} to {high:g} "
        f"({config.num_generations} completions each); "
        + ", ".join(f"{counts[name]} {name}" for name in ("none right", "some right", "all right", "not judged"))
    )
    if synthesis.num_duplicate_prompts:
        print(f"{synthesis.num_duplicate_prompts} rows repeat the prompt of an earlier row, and were left out")
    if synthesis.num_failed:
        print(f"{synthesis.num_failed} requests failed: start the command again to send them once more")
