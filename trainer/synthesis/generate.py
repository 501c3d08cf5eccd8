"""`rekatrain generate`: completions of a policy or a teacher, scored by the recipe's rewards, kept as SFT rows.

    rekatrain generate RECIPE

The recipe's section `generate:` (config.py) names the folder: `rows.jsonl` holds the rows, and beside it lie all
answers and scores. Another rule (`keep`) writes the rows anew from them, and asks nothing.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.synthesis.config import GenerateConfig, read_section
from rekatrain.trainer.synthesis.engine import Synthesis, model_name, synthesize
from rekatrain.trainer.synthesis.journal import ROWS
from rekatrain.trainer.synthesis.keep import Judged, choose, has_ended, is_right, without_duplicates
from rekatrain.trainer.synthesis.requests import Question
from rekatrain.trainer.synthesis.rows import answered_messages, make_row, write_rows

# Columns that each row gets beside those of its prompt's row.
ORIGIN_COLUMNS = ("generated_by", "generated_seed", "generated_index", "generated_from", "reward", "rewards")


def generate(recipe: Recipe) -> Path:
    """Write the rows and print the counts; return the file."""
    config = read_section("generate", recipe.generate, recipe.rewards, GenerateConfig)
    path = Path(config.out) / ROWS

    def write(synthesis: Synthesis) -> None:
        counts: Counter[str] = Counter()
        num_rows = write_rows(path, _rows(recipe, config, synthesis, counts))
        _report(path, synthesis, counts, num_rows)

    synthesize(recipe, config, write)
    return path


def _rows(
    recipe: Recipe, config: GenerateConfig, synthesis: Synthesis, counts: Counter[str]
) -> Iterator[dict[str, object]]:
    """Yield the rows that are kept, prompt by prompt, and count what happens to each completion."""
    model = model_name(recipe, config)
    for question in synthesis.questions:
        group = _group(question, config, synthesis, counts)
        different = without_duplicates(group)
        counts["duplicate"] += len(group) - len(different)
        kept = choose(different, config, synthesis.deciding)
        counts["not kept by the rule"] += len(different) - len(kept)
        counts["prompts with a row"] += bool(kept)
        row = question.prompt.row
        for index, answer, score in kept:
            origin = (model, recipe.seed, index, row.where, score.total, score.rewards)
            yield make_row(row, answered_messages(row, answer), dict(zip(ORIGIN_COLUMNS, origin, strict=True)))


def _group(question: Question, config: GenerateConfig, synthesis: Synthesis, counts: Counter[str]) -> list[Judged]:
    """Return the completions of a prompt that can be rows."""
    group: list[Judged] = []
    journal = synthesis.journal
    for key in question.keys(config.num_generations):
        if key not in journal.answers:
            continue
        answer, score = journal.answer(key), journal.score(key)
        counts["completions"] += 1
        counts["right"] += is_right(score, synthesis.deciding)
        if not has_ended(answer):
            counts["cut off"] += 1
            continue
        try:
            answered_messages(question.prompt.row, answer)
        except InputError:
            counts["without an answer or malformed"] += 1
            continue
        group.append((key[1], answer, score))
    return group


def _report(path: Path, synthesis: Synthesis, counts: Counter[str], num_rows: int) -> None:
    num_prompts = len(synthesis.questions)
    dropped = [
        f"{counts[name]} {name}"
        for name in ("cut off", "without an answer or malformed", "duplicate", "not kept by the rule")
        if counts[name]
    ]
    right = f", {counts['right']} right" if synthesis.deciding else ""
    print(
        f"{path}: {num_rows} rows of {counts['completions']} completions{right}; {counts['prompts with a row']} of "
        f"{num_prompts} prompts have a row" + (f"; left out: {', '.join(dropped)}" if dropped else "")
    )
    if synthesis.num_duplicate_prompts:
        print(f"{synthesis.num_duplicate_prompts} rows repeat the prompt of an earlier row, and were left out")
    if synthesis.num_failed:
        print(f"{synthesis.num_failed} requests failed: start the command again to send them once more")
