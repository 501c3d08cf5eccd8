"""Rows kept by the values of their columns."""

import logging
from pathlib import Path
from typing import Any

import pytest

from rekatrain.data.errors import InputError
from rekatrain.data.sources import load_rows
from tests.conftest import write_jsonl

RECORDS = [
    {"prompt": "a", "lang": "en", "rate": 0.1},
    {"prompt": "b", "lang": "en", "rate": 0.5},
    {"prompt": "c", "lang": "de", "rate": 0.9},
    {"prompt": "d", "lang": None, "rate": "high"},
    {"prompt": "e"},
]


@pytest.mark.parametrize(
    ("only", "kept"),
    [
        ({"lang": "en"}, "ab"),
        ({"lang": ["en", "de"]}, "abc"),
        ({"rate": {"min": 0.5}}, "bc"),
        ({"rate": {"min": 0.1, "max": 0.5}}, "ab"),
        ({"lang": "en", "rate": {"max": 0.4}}, "a"),
        ({"rate": 0.9}, "c"),
    ],
)
def test_only_keeps_rows_with_these_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, only: dict[str, Any], kept: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *RECORDS)
    with caplog.at_level(logging.INFO):
        rows = load_rows(path, format="prompt_answer", only=only).rows
    assert "".join(row.messages[0]["content"] for row in rows) == kept
    assert f"leaves out {5 - len(kept)} rows, and keeps {len(kept)}" in caplog.text
    assert len(load_rows(path, format="prompt_answer", only=only, limit=1).rows) == 1


@pytest.mark.parametrize(
    ("only", "problem"),
    [
        ({"lang": []}, "only.lang is empty"),
        ({"lang": None}, "only.lang is empty"),
        ({"rate": {"from": 1}}, "only.rate must be a value, a list, or"),
        ({"rate": {"min": "a"}}, "only.rate must be a value, a list, or"),
        ({"rate": {}}, "only.rate must be a value, a list, or"),
        ({"lang": "fr"}, r"no good row that only keeps: {'lang': 'fr'} leaves out 5"),
    ],
)
def test_only_rejects_what_keeps_no_row(tmp_path: Path, only: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        load_rows(write_jsonl(tmp_path / "a.jsonl", *RECORDS), format="prompt_answer", only=only)
