"""Encoded pairs of a reward model: both answers as trained turns, margins for all rows or none."""

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.data.chat import Message, encode_row, render_prompt
from rekatrain.data.errors import InputError
from rekatrain.data.rows import Row
from rekatrain.trainer.reward_model.pairs import encode_pairs, leave_out_trained

QUESTION: Message = {"role": "user", "content": "Say hello."}
GOOD: Message = {"role": "assistant", "content": "Hello!"}
BAD: Message = {"role": "assistant", "content": "No."}


def test_encode_pairs_encodes_answers_as_trained_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(messages=[QUESTION, GOOD], rejected=[QUESTION, BAD], columns={"margin": 1})
    (pair,) = encode_pairs([row], tokenizer)
    assert pair.chosen.input_ids == encode_row([QUESTION, GOOD], tokenizer).input_ids
    assert pair.rejected.input_ids == encode_row([QUESTION, BAD], tokenizer).input_ids
    assert (pair.margin, pair.prompt) == (1.0, render_prompt([QUESTION]))


def test_encode_pairs_compares_reasoning_only_on_request(tokenizer: PreTrainedTokenizerFast) -> None:
    thinking = {**GOOD, "reasoning_content": "They greet me."}
    (pair,) = encode_pairs([Row(messages=[QUESTION, thinking], rejected=[QUESTION, BAD])], tokenizer)
    assert pair.chosen.input_ids == encode_row([QUESTION, GOOD], tokenizer).input_ids
    same_answers = Row(messages=[QUESTION, thinking], rejected=[QUESTION, GOOD], where="rows:1")
    with pytest.raises(InputError, match="rows:1: the answers differ in their reasoning alone"):
        encode_pairs([same_answers], tokenizer)
    (pair,) = encode_pairs([same_answers], tokenizer, reasoning=True)
    assert pair.chosen.input_ids == encode_row([QUESTION, thinking], tokenizer).input_ids


def test_encode_pairs_needs_margins_in_all_rows_or_none(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        Row(messages=[QUESTION, GOOD], rejected=[QUESTION, BAD], columns={"margin": 1}, where="rows:1"),
        Row(messages=[QUESTION, GOOD], rejected=[QUESTION, BAD], columns={"margin": None}, where="rows:2"),
    ]
    with pytest.raises(InputError, match="rows:2 has no margin, but rows:1 has one"):
        encode_pairs(rows, tokenizer)
    assert encode_pairs(rows[1:], tokenizer)[0].margin is None


def test_leave_out_trained_removes_trained_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    other = {"role": "user", "content": "Wave."}
    rows = [Row(messages=[turn, GOOD], rejected=[turn, BAD]) for turn in (QUESTION, other)]
    seen, unseen = encode_pairs(rows, tokenizer)
    assert leave_out_trained([seen, unseen], [seen]) == [unseen]
    with pytest.raises(InputError, match="nothing held out"):
        leave_out_trained([seen], [seen, unseen])
