"""SFT rows of conversations: which turns are trained in which row, and that the loss is that of one row per turn."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rekatrain.data.chat import IGNORED_LABEL, EncodedRow, EndOfTurn, Message, encode_row
from rekatrain.data.errors import InputError
from rekatrain.data.rows import LongRows, Row, Source
from rekatrain.data.training_rows import cut_row, encode_conversation, encode_rows
from tests.conftest import tiny_llama
from tests.data.conversations import CLEAN_TEXTS, TEXTS, UNHURRIED, assistant, system, user


def trained_texts(rows: Sequence[EncodedRow], tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    """The texts of the labeled spans of each row."""
    texts = []
    for row in rows:
        spans: list[list[int]] = []
        for before, label in zip([IGNORED_LABEL, *row.labels], row.labels, strict=False):
            if label != IGNORED_LABEL:
                spans = [*spans, [label]] if before == IGNORED_LABEL else [*spans[:-1], [*spans[-1], label]]
        texts.append([tokenizer.decode(span) for span in spans])
    return texts


def test_plain_conversation_is_one_row_with_a_span_per_turn(any_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [system("s"), user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f")]
    (row,) = rows = encode_conversation(Row(messages=messages), any_tokenizer)
    assert trained_texts(rows, any_tokenizer) == [[" b <sep>", " d <sep>", " f <sep>"]]
    assert row.input_ids == encode_row(messages, any_tokenizer).input_ids
    assert all(label in (token, IGNORED_LABEL) for token, label in zip(row.input_ids, row.labels, strict=True))
    (last,) = encode_conversation(Row(messages=messages), any_tokenizer, turns="last")
    assert last == encode_row(messages, any_tokenizer)


def test_turn_with_reasoning_ends_its_row(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d", "r"), user("e"), assistant("f"), user("tail")]
    first, second = rows = encode_conversation(Row(messages=messages), tokenizer)
    reasoned = " <reasoning>\nr\n</reasoning>\n\nd <sep>"
    assert trained_texts(rows, tokenizer) == [[" b <sep>", reasoned], [" f <sep>"]]
    assert tokenizer.decode(second.input_ids) == (
        "human: a <sep> assistant: b <sep> human: c <sep> assistant: d <sep> human: e <sep> assistant: f <sep>"
    )
    assert first.input_ids == encode_row(messages[:4], tokenizer).input_ids


def test_masked_turns_are_context_only(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("")]
    row = Row(messages=messages, trains=[False, False, False, True, False, False])
    assert encode_conversation(row, tokenizer) == [encode_row(messages[:4], tokenizer)]


@pytest.mark.parametrize("end_of_turn", ["sep_eos", "eos"])
def test_other_ends_of_turns_need_a_row_per_turn(tokenizer: PreTrainedTokenizerFast, end_of_turn: EndOfTurn) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    rows = encode_conversation(Row(messages=messages), tokenizer, end_of_turn=end_of_turn)
    assert rows == [encode_row(messages[:end], tokenizer, end_of_turn) for end in (2, 4)]


QUESTIONS_AND_ANSWERS = st.lists(
    st.tuples(TEXTS.filter(lambda text: "<sep>" not in text), CLEAN_TEXTS.filter(bool), st.none() | CLEAN_TEXTS),
    min_size=1,
    max_size=4,
)


@UNHURRIED
@given(pairs=QUESTIONS_AND_ANSWERS)
def test_each_turn_is_trained_once_after_its_own_context(
    any_tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str, str | None]]
) -> None:
    messages: list[Message] = []
    for question, answer, thought in pairs:
        messages += [user(question), assistant(answer, thought)]
    apart = [encode_row(messages[:end], any_tokenizer) for end in range(2, len(messages) + 1, 2)]
    shared = encode_conversation(Row(messages=messages), any_tokenizer)
    assert len(shared) <= 1 + sum(bool(thought) for _, _, thought in pairs)
    trained = [(row, start, end) for row in shared for start, end in spans(row)]
    assert len(trained) == len(apart)
    for alone, (row, start, end) in zip(apart, trained, strict=True):
        assert row.input_ids[:end] == alone.input_ids and row.labels[start:end] == alone.labels[start:]
        assert alone.labels[:start] == [IGNORED_LABEL] * start


def spans(row: EncodedRow) -> list[tuple[int, int]]:
    """The start and end of each labeled span of a row."""
    is_label = [False, *(label != IGNORED_LABEL for label in row.labels), False]
    edges = [position for position in range(len(row.labels) + 1) if is_label[position] != is_label[position + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_shared_rows_have_the_loss_of_a_row_per_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [system("Be brief.")]
    for number in range(6):
        messages += [user(f"{number}+{number}?"), assistant(str(2 * number), "Add." if number == 3 else None)]
    model = tiny_llama(tokenizer, max_position_embeddings=1024).double()

    def token_losses(rows: Sequence[EncodedRow]) -> torch.Tensor:
        losses = []
        for row in rows:
            with torch.no_grad():
                logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
            losses.append(
                torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="none")[
                    torch.tensor(row.labels[1:]) != IGNORED_LABEL
                ]
            )
        return torch.cat(losses)

    shared = encode_conversation(Row(messages=messages), tokenizer)
    apart = [encode_row(messages[:end], tokenizer) for end in range(3, len(messages) + 1, 2)]
    assert (len(shared), len(apart)) == (2, 6)
    assert sum(len(row.input_ids) for row in shared) < 0.6 * sum(len(row.input_ids) for row in apart)
    torch.testing.assert_close(token_losses(shared), token_losses(apart), rtol=0, atol=1e-10)


def test_cut_row_ends_with_a_trained_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    (row,) = encode_conversation(Row(messages=messages), tokenizer)
    first = encode_row(messages[:2], tokenizer)
    for max_length in range(1, len(row.input_ids) + 2):
        expected = None if max_length < len(first.input_ids) else first if max_length < len(row.input_ids) else row
        assert cut_row(row, max_length) == expected


def rows_of(*conversations: list[Message], **source: Any) -> list[Row]:
    return [
        Row(messages=messages, source=Source(**source), where=f"a.jsonl:{number}")
        for number, messages in enumerate(conversations, start=1)
    ]


SHORT = [user("a"), assistant("b")]
LONG = [*SHORT, user("x" * 200), assistant("d")]


@pytest.mark.parametrize(("long_rows", "num_rows"), [("skip", 1), ("truncate", 2)])
def test_long_rows_are_skipped_or_cut_and_named(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, long_rows: LongRows, num_rows: int
) -> None:
    with caplog.at_level(logging.WARNING):
        encoded = encode_rows(rows_of(SHORT, LONG, long_rows=long_rows), tokenizer, 100)
    assert encoded == [encode_row(SHORT, tokenizer)] * num_rows
    (record,) = caplog.records
    assert "1 of 2 rows are longer than 100 tokens" in record.getMessage()
    assert "a.jsonl:2 (" in record.getMessage()


def test_turn_that_no_assistant_answers_is_reported(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        encoded = encode_rows(rows_of(SHORT, [*SHORT, user("c")], [*SHORT, user("d")]), tokenizer, 100)
    assert encoded == [encode_row(SHORT, tokenizer)] * 3
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 3 rows end with a turn that no assistant answers")
    assert record.getMessage().endswith("the first: a.jsonl:2")


def test_row_with_no_turn_that_fits_is_skipped_not_cut(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        encoded = encode_rows(rows_of(SHORT, [user("x" * 200), assistant("y")], long_rows="truncate"), tokenizer, 100)
    assert encoded == [encode_row(SHORT, tokenizer)]
    (record,) = caplog.records
    assert "skipped: a.jsonl:2 (" in record.getMessage()


def test_long_rows_are_refused_by_their_names(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"2 of 3 rows are longer than 100 .*: a.jsonl:2 \(\d+ tokens\), a.jsonl:3 \("):
        encode_rows(rows_of(SHORT, LONG, LONG), tokenizer, 100)
    with pytest.raises(InputError, match=r"12 of 12 rows .* a.jsonl:10 \(\d+ tokens\) and 2 more; raise"):
        encode_rows(rows_of(*[LONG] * 12, long_rows="skip"), tokenizer, 100)


@pytest.mark.parametrize("bad", [[user("a")], [user("a"), assistant(" ")], [*SHORT, user("a"), assistant("")]])
def test_bad_rows_skip_leaves_out_rows_without_a_turn_to_train(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, bad: list[Message]
) -> None:
    with caplog.at_level(logging.WARNING):
        assert encode_rows(rows_of(bad, SHORT, bad_rows="skip"), tokenizer, 100) == [encode_row(SHORT, tokenizer)]
    (record,) = caplog.records
    assert record.getMessage().startswith("1 rows that cannot be trained skipped; the first: a.jsonl:1: ")
    with pytest.raises(InputError, match="a.jsonl:1: "):
        encode_rows(rows_of(bad, SHORT), tokenizer, 100)
    with pytest.raises(InputError, match="no row can be trained; the first: a.jsonl:1: "):
        encode_rows(rows_of(bad, bad_rows="skip"), tokenizer, 100)
