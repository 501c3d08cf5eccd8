"""The report of `rekatrain check-rewards`: tables, examples and hints, as text."""

from collections.abc import Sequence

from rekatrain.rewards.check.check import GoldTable, RewardCheck, WrongTable

NUM_EXAMPLES = 3
SHOWN = 60


def describe_check(check: RewardCheck) -> str:
    """Return the whole report."""
    parts = [f"{check.num_rows:,} rows\n", "Right answers: the reward of each row's gold", _gold_table(check.golds)]
    for name, reason in check.without_gold.items():
        parts.append(f"{name}: {reason}")
    failing = [(table, example) for table in check.golds for example in table.examples[:NUM_EXAMPLES]]
    if failing:
        parts.append("\nRight answers that do not earn 1.0")
        parts += [f"  {table.name}: {example}" for table, example in failing]
    if check.wrong:
        parts += ["\nWrong answers, made from golds: how many earn 1.0", _wrong_table(check.wrong)]
    if check.slowest:
        parts.append("\nSlowest answers")
        parts += [f"  {seconds:8.3f} s  {what}" for seconds, what in check.slowest]
    parts += [f"\nhint: {hint}" for hint in check.hints()]
    return "\n".join(parts)


def _gold_table(tables: Sequence[GoldTable]) -> str:
    header = ["source", "reward", "of", "rows", "1", "0", "other", "None", "errors", "mean", "ms each"]
    lines = [
        [
            table.source or "-",
            table.reward,
            table.kind,
            f"{table.num_rows:,}",
            *(_percent(count, table.num_rows) for count in table.counts()),
            "-" if table.mean is None else f"{table.mean:.3f}",
            f"{1000 * table.seconds / table.num_rows:.1f}",
        ]
        for table in tables
    ]
    return align([header, *lines])


def _wrong_table(tables: Sequence[WrongTable]) -> str:
    lines = [["source", "reward", "mutation", "made", "pass", "example that passes"]]
    for table in tables:
        example = table.examples[0] if table.examples else ""
        lines.append(
            [table.source or "-", table.reward, table.mutation, f"{table.num_made:,}", f"{table.num_passed:,}", example]
        )
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Return cells as a table: text to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    is_number = [
        all(line[column][:1].isdigit() or line[column] == "-" for line in lines[1:]) for column in range(len(widths))
    ]
    rows = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        )
        for line in lines
    ]
    return "\n".join(f"  {row}".rstrip() for row in rows)


def _percent(count: int, total: int) -> str:
    """Return a share as a percentage that is 0 or 100 only where it is exact."""
    percent = 100 * count / total
    if 0 < count < total:
        percent = min(max(percent, 0.1), 99.9)
    return f"{percent:.1f}%"
