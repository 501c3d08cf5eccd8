"""Prompts that other data sets hold too: found exactly and nearly, reported, and removed where the recipe wants it."""

import logging
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.data.encoded_mixture import encode_mixture
from rekatrain.data.errors import InputError
from rekatrain.data.mixture import check_dataset, load_mixture
from rekatrain.data.sources import load_rows
from tests.conftest import write_jsonl

PROBLEM = (
    "A train leaves the station at nine and travels for three hours at sixty miles per hour before it stops for lunch; "
    "how far from the station is the place where its passengers eat?"
)
NEAR = PROBLEM.replace("nine", "ten")
FAR = "A train leaves the station and travels; how many passengers does it have in the end, if none leaves it?"


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT conversations, and prompts of which some are in them."""
    monkeypatch.chdir(tmp_path)
    system = {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": "180 miles."}
    more = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Home."}]
    write_jsonl(
        Path("sft.jsonl"),
        {"messages": [system, {"role": "user", "content": f"  {PROBLEM.upper()}\n"}, answer, *more]},
        {"messages": [{"role": "user", "content": "3 + 5 ="}, answer]},
    )
    texts = [PROBLEM, NEAR, FAR, "3 - 5 =", "3 + 5 =", "３ +  5 =", "3 + 6 =", "And then?"]
    write_jsonl(Path("rl.jsonl"), *({"prompt": text, "answer": "1"} for text in texts))


RL = {"path": "rl.jsonl", "format": "prompt_answer"}


def kept(**overlap: Any) -> list[int]:
    rows = load_rows(**RL, overlap={"with": {"path": "sft.jsonl"}, **overlap}).rows
    return [int(row.where.rpartition(":")[2]) for row in rows]


def test_overlap_is_reported_and_removed_by_choice(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert kept() == list(range(1, 9))
        assert kept(remove=True) == [3, 4, 7, 8]
        assert kept(remove=True, similarity=1) == [2, 3, 4, 7, 8]
    first, second, third = caplog.messages
    found = "rl.jsonl:1 is sft.jsonl:1; rl.jsonl:2 is nearly sft.jsonl:1 (0.7"
    assert first.startswith("rl.jsonl: 4 of 8 prompts are in sft.jsonl (3 exactly, 1 nearly), kept; overlap: {remove:")
    assert second.startswith(f"rl.jsonl: 4 of 8 prompts are in sft.jsonl (3 exactly, 1 nearly), left out: {found}")
    assert "(3 exactly, 0 nearly), left out" in third


def test_overlap_finds_each_pair_of_that_similarity() -> None:
    draw = random.Random(0)
    words = [str(number) for number in range(5000)]
    others = [draw.choices(words, k=60) for _ in range(300)]
    # one word of sixty changed: 5 of 56 n-grams differ, a similarity of 51 / 61; three words: 45 / 67
    near = [[*text[:30], "new", *text[31:]] for text in others]
    far = [["new", *text[1:20], "new", *text[21:40], "new", *text[41:]] for text in others]
    write_jsonl(Path("others.jsonl"), *({"prompt": " ".join(text)} for text in others))
    write_jsonl(Path("both.jsonl"), *({"prompt": " ".join(text)} for text in (*near, *far)))
    options = {"format": "prompt_answer"}
    overlap = {"with": [{"path": "others.jsonl", **options}], "remove": True}
    rows = load_rows("both.jsonl", **options, overlap=overlap).rows
    assert [row.where for row in rows] == [f"both.jsonl:{number}" for number in range(301, 601)]


def test_overlap_holds_for_encoded_rows_and_sees_changes(tokenizer: PreTrainedTokenizerFast) -> None:
    section = {"path": "sft.jsonl", "overlap": {"with": RL, "remove": True}}
    with pytest.raises(InputError, match="no good row that overlap keeps: 2 of 2 prompts are in rl.jsonl"):
        encode_mixture(section, tokenizer, 500, {})
    write_jsonl(Path("rl.jsonl"), {"prompt": "3 + 5 ="})
    assert len(encode_mixture(section, tokenizer, 500, {}).rows) == 1
    write_jsonl(Path("rl.jsonl"), {"prompt": "3 + 7 ="})
    assert len(encode_mixture(section, tokenizer, 500, {}).rows) == 2


def test_overlap_of_held_out_rows_is_a_key_of_their_section() -> None:
    section = [{**RL, "overlap": {"with": {"path": "sft.jsonl"}, "remove": True}}, {"path": "sft.jsonl"}]
    check_dataset("eval_dataset", section, [])
    assert len(load_mixture(section, "eval_dataset").rows) == 6


@pytest.mark.parametrize(
    ("overlap", "message"),
    [
        ({}, "overlap.with must be a data set"),
        ({"with": "sft.jsonl"}, "overlap.with must be a data set"),
        ({"with": {"path": "sft.jsonl"}, "similarity": 0.2}, "overlap.similarity is 0.2"),
        ({"with": {"path": "sft.jsonl"}, "removed": True}, "unknown key overlap.removed: did you mean overlap.remove?"),
        ({"with": {"path": "sft.jsonl", "formt": "gsm8k"}}, "unknown key dataset.overlap.with.0.formt"),
    ],
)
def test_overlap_rejects_wrong_sections(overlap: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        check_dataset("dataset", {**RL, "overlap": overlap}, [])
