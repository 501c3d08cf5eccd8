"""A table of completions with their rewards for the terminal and for logs: 80 columns, plain text, a few lines each."""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 80
# What a terminal would carry out: a policy may write any bytes.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ROWS = 4
LINES = 4


def choose_group(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the first group of a step whose rewards differ, or else the first one."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["prompt_index"], []).append(record)
    differing = (group for group in groups.values() if len({record["reward"] for record in group}) > 1)
    return next(differing, next(iter(groups.values()), []))


def choose_rows(group: Sequence[Mapping[str, Any]], num_rows: int) -> list[Mapping[str, Any]]:
    """Return so many completions of a group, from the highest reward to the lowest at equal distances."""
    ordered = sorted(group, key=lambda record: -(record["reward"] if record["reward"] is not None else -float("inf")))
    if len(ordered) <= num_rows:
        return ordered
    return [ordered[round(index * (len(ordered) - 1) / (num_rows - 1))] for index in range(num_rows)]


def completions_table(
    group: Sequence[Mapping[str, Any]], *, title: str, num_rows: int = ROWS, num_lines: int | None = LINES
) -> str:
    """Return the table of a group's completions as text of at most 80 columns.

    group:     records of rollouts.jsonl (prompt, completion, rewards, reward, advantage, ...)
    num_lines: of each text; None: the whole text
    """
    table = Table(box=box.ASCII, width=WIDTH, show_lines=True, padding=(0, 1), pad_edge=False)
    table.add_column("completion", ratio=1, overflow="fold")
    table.add_column("rewards", overflow="fold", max_width=30)
    table.add_column("total", justify="right")
    for record in choose_rows(group, num_rows):
        rewards = [f"{name} {_number(value)}" for name, value in record["rewards"].items()]
        rewards += [f"{name} failed" for name in record["reward_errors"]]
        rewards += [] if record["advantage"] is None else [f"advantage {record['advantage']:+.3g}"]
        rewards.append(f"{record['finish_reason']}, {len(record['completion_ids'])} tokens")
        table.add_row(
            Text(_lines(record["completion"], num_lines, WIDTH - 42)),
            Text(clean("\n".join(rewards))),
            _number(record["reward"]),
        )
    first = group[0]
    gold = "" if first.get("gold") is None else f"  gold: {_lines(str(first['gold']), 1, WIDTH - 8)}\n"
    prompt = re.sub(r"\s*<sep>\s*assistant:\s*$", "", first["prompt"])
    heading = f"{clean(title)}\n  {_lines(prompt, 3 if num_lines else None, WIDTH - 2, from_end=True)}\n{gold}"
    output = Console(file=StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
    output.print(table)
    assert isinstance(output.file, StringIO)
    drawn = "\n".join(line.rstrip() for line in output.file.getvalue().splitlines())
    return f"{heading}{drawn}"


def clean(text: str) -> str:
    """Return a text without the characters that a terminal carries out; each is U+FFFD instead.

    >>> clean("red: \\x1b[31m")
    'red: \\ufffd[31m'
    """
    return CONTROL.sub("\ufffd", text).encode("utf-8", "replace").decode()


def _lines(text: str, limit: int | None, width: int, *, from_end: bool = False) -> str:
    """Return a text without empty lines, cut to so many lines of `width` characters."""
    lines = [line.rstrip() for line in clean(text).splitlines() if line.strip()]
    whole = "\n".join(lines) or "(empty)"
    if limit is None:
        return whole.replace("\n", "\n  ") if from_end else whole
    one = " / ".join(line.strip() for line in lines) or "(empty)"
    room = limit * width
    if len(one) <= room:
        return one
    return f"... {one[4 - room :]}" if from_end else f"{one[: room // 2 - 2]} ... {one[3 - room // 2 :]}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
