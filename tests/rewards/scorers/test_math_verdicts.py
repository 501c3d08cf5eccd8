"""math_answer's verdicts, kind by kind: tests/data/math_verdicts.tsv has a gold, a score and an answer per line."""

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from rekatrain.data.chat import parse_completion, render_completion
from rekatrain.rewards.scorers.math_answer import math_answer
from rekatrain.rewards.scorers.math_text import DOUBLED, HAS_ROWS, LAST_PUNCTUATION, NEXT_ROW, SPELLINGS, respell

VERDICTS = Path(__file__).parents[2] / "data" / "math_verdicts.tsv"


def read_verdicts() -> dict[str, list[dict[str, str]]]:
    kinds = defaultdict(list)
    with VERDICTS.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            kinds[row["kind"]].append(row)
    return kinds


KINDS = read_verdicts()


@pytest.mark.parametrize("kind", KINDS)
def test_math_answer_gives_the_verdicts_of_the_table(kind: str) -> None:
    rows = KINDS[kind]
    assert len(rows) >= 20 and {row["score"] for row in rows} == {"0", "1"}
    wrong = []
    for row in rows:
        completion = parse_completion(render_completion("Hm.", row["text"]))
        score = math_answer(completion, answer=row["gold"])
        if score != float(row["score"]):
            wrong.append((row["gold"], row["text"], f"{score}, not {row['score']}"))
    assert not wrong


def test_respell_skips_only_patterns_that_match_nothing() -> None:
    """Texts of the table, their spellings, and the commands of LaTeX in unusual places."""
    texts = {text for rows in KINDS.values() for row in rows for text in (row["gold"], row["text"])}
    texts |= {f"5{start}{end}3" for starts, _, _ in SPELLINGS for start in starts for end in ("", "{2}", " {,}", "5")}
    for text in texts:
        expected = text.replace("\\\\", NEXT_ROW) if HAS_ROWS.search(text) else DOUBLED.sub(r"\\", text)
        for _, pattern, replacement in SPELLINGS:
            expected = pattern.sub(replacement, expected)
        assert respell(text) == " ".join(LAST_PUNCTUATION.sub("", expected).split()).strip("*_ ")
