"""Encode conversations as SFT rows: the ids, and labels on every trained turn.

A conversation is one row with several labeled spans wherever its turns can share one context. They cannot where a turn
has reasoning: it is trained with it, and later turns are trained without it, as the chat template shows it to them.
"""

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import (
    IGNORED_LABEL,
    EncodedRow,
    EndOfTurn,
    answers_only,
    encode_texts,
    join_row,
    render_completion,
    render_prompt,
    row_texts,
    split_turn,
)
from rekatrain.data.errors import InputError
from rekatrain.data.families import bos_ids
from rekatrain.data.rows import LongRows, Row
from rekatrain.data.stream import log_report

TrainedTurns = Literal["all", "last"]
NUM_NAMED = 10  # rows that a message names
# Conversations whose texts are encoded together.
BATCH_ROWS = 256

# An encoding under way: it yields the texts that it needs, and receives their ids.
Encoding = Generator[list[str], list[list[int]], list[EncodedRow]]


def encode_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    end_of_turn: EndOfTurn = "sep",
    turns: TrainedTurns = "all",
) -> list[EncodedRow]:
    """Encode rows of at most `max_length` tokens, as `RowEncoder` does, all in memory."""
    encoder = RowEncoder(tokenizer, max_length, end_of_turn=end_of_turn, turns=turns)
    encoded = [row for made in encoder.encode(rows) for row in made]
    log_report(encoder.report())
    return encoded


class RowEncoder:
    """Encodes conversations as training rows, and counts those that are left out or cut.

    Rows that cannot be trained and rows that are too long are rejected, left out or cut, as their source says
    (`bad_rows`, `long_rows`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        end_of_turn: EndOfTurn = "sep",
        turns: TrainedTurns = "all",
    ) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._end_of_turn, self._turns = end_of_turn, turns
        self._bad: list[str] = []
        self._long: dict[LongRows, dict[str, int]] = {"refuse": {}, "skip": {}, "truncate": {}}
        self._num_rows, self._num_encoded = 0, 0
        self._num_unanswered, self._first_unanswered = 0, ""

    def encode(self, rows: Iterable[Row]) -> Iterator[list[EncodedRow]]:
        """Yield the training rows of each conversation: none where it is left out.

        Raises InputError, which names the rows, for a row that its source refuses, and at the end where none is left.
        """
        for batch in _read_ahead(_batches(rows)):
            made = encode_conversations(batch, self._tokenizer, end_of_turn=self._end_of_turn, turns=self._turns)
            for row, result in zip(batch, made, strict=True):
                self._num_rows += 1
                kept = self._without_bad(row, result)
                self._num_encoded += len(kept)
                if kept and row.tokens is None and row.messages[-1]["role"] != "assistant":
                    self._num_unanswered += 1
                    self._first_unanswered = self._first_unanswered or row.where
                yield kept
        self._check()

    def report(self) -> Iterator[tuple[int, str]]:
        """Yield a level of logging and a message for each kind of row that was left out or cut."""
        if self._bad:
            yield logging.WARNING, f"{len(self._bad)} rows that cannot be trained skipped; the first: {self._bad[0]}"
        if self._num_unanswered:
            yield (
                logging.WARNING,
                f"{self._num_unanswered} of {self._num_rows} rows end with a turn that no assistant answers, "
                f"which is left out; the first: {self._first_unanswered}",
            )
        for done, policy in (("skipped", "skip"), ("cut after the last trained turn that fits", "truncate")):
            if named := self._long[cast(LongRows, policy)]:
                counts = f"{len(named)} of {self._num_rows} rows"
                yield logging.WARNING, f"{counts} are {self._limit}; {done}: {_list_some(named)}"

    @property
    def _limit(self) -> str:
        return f"longer than {self._max_length} tokens (the smaller of sft.max_length and the model's context)"

    def _without_bad(self, row: Row, made: list[EncodedRow] | InputError) -> list[EncodedRow]:
        if isinstance(made, InputError):
            message = f"{row.where}: {made}"
            if row.source.bad_rows == "refuse":
                raise InputError(message) from made
            self._bad.append(message)
            return []
        kept: list[EncodedRow] = []
        for one in made:
            if len(one.input_ids) <= self._max_length:
                kept.append(one)
                continue
            # TRL would cut off the end of the row, and with it the stop: the model would learn not to stop.
            cut = cut_row(one, self._max_length) if row.source.long_rows == "truncate" else None
            kept += [cut] if cut else []
            policy = "skip" if row.source.long_rows == "truncate" and not cut else row.source.long_rows
            self._long[policy][row.where] = len(one.input_ids)
        return kept

    def _check(self) -> None:
        long = self._long
        too_long = long["refuse"] or (not self._num_encoded and (long["skip"] or long["truncate"]))
        if too_long:
            raise InputError(
                f"{len(too_long)} of {self._num_rows} rows are {self._limit}: {_list_some(too_long)}; raise "
                "sft.max_length, or set dataset.long_rows to skip or truncate"
            )
        if not self._num_encoded:
            raise InputError(f"no row can be trained; the first: {self._bad[0]}")


def encode_conversation(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, end_of_turn: EndOfTurn = "sep", turns: TrainedTurns = "all"
) -> list[EncodedRow]:
    """Return the rows that train the conversation's assistant turns, or the last one.

    Each trained turn has labels in exactly one row, on the ids and after the context that `encode_row` gives it. A turn
    shares a row with later ones only where it has no reasoning and ends with `<sep>`, as in their context.
    Raises InputError where there is no turn to train, or where one has no answer.
    """
    (made,) = encode_conversations([row], tokenizer, end_of_turn=end_of_turn, turns=turns)
    if isinstance(made, InputError):
        raise made
    return made


def encode_conversations(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, end_of_turn: EndOfTurn, turns: TrainedTurns
) -> list[list[EncodedRow] | InputError]:
    """Return for each conversation what `encode_conversation` returns or raises; their texts are encoded together."""
    results: dict[int, list[EncodedRow] | InputError] = {}
    running = {index: _conversation(row, tokenizer, end_of_turn, turns) for index, row in enumerate(rows)}
    ids: dict[int, list[list[int]]] = {}
    while running:
        wanted: dict[int, list[str]] = {}
        for index, encoding in running.items():
            try:
                wanted[index] = encoding.send(ids[index]) if index in ids else next(encoding)
            except StopIteration as done:
                results[index] = done.value
            except InputError as error:
                results[index] = error
        encoded = iter(encode_texts([text for texts in wanted.values() for text in texts], tokenizer))
        ids = {index: [next(encoded) for _ in texts] for index, texts in wanted.items()}
        running = {index: running[index] for index in wanted}
    return [results[index] for index in range(len(rows))]


def _conversation(
    row: Row, tokenizer: PreTrainedTokenizerBase, end_of_turn: EndOfTurn, turns: TrainedTurns
) -> Encoding:
    if row.tokens is not None:
        _check_ids(row.tokens, len(tokenizer))
        return [row.tokens]
    trains = row.trains or [True] * len(row.messages)
    trained = [index for index, message in enumerate(row.messages) if message["role"] == "assistant" and trains[index]]
    if not trained:
        raise InputError("no assistant message to train; stage sft needs one in every row")
    encoded: list[EncodedRow] = []
    shared: list[int] = []
    for index in trained if turns == "all" else trained[-1:]:
        reasoning, answer = split_turn(row.messages[index])
        if not answer:
            raise InputError("the assistant message to train has no answer")
        shared.append(index)
        if reasoning is not None or end_of_turn != "sep" or index == trained[-1]:
            encoded += yield from _turns(row, shared, tokenizer, end_of_turn)
            shared = []
    return encoded


def cut_row(row: EncodedRow, max_length: int) -> EncodedRow | None:
    """Return the row up to the end of the last labeled span that fits into `max_length` tokens, or None."""
    following = [*row.labels[1:], IGNORED_LABEL]
    ends = [
        position
        for position, (label, after) in enumerate(zip(row.labels, following, strict=True), start=1)
        if label != IGNORED_LABEL and after == IGNORED_LABEL and position <= max_length
    ]
    return EncodedRow(input_ids=row.input_ids[: ends[-1]], labels=row.labels[: ends[-1]]) if ends else None


def _turns(row: Row, indices: Sequence[int], tokenizer: PreTrainedTokenizerBase, end_of_turn: EndOfTurn) -> Encoding:
    """Encode one row with a span for each turn, or a row for each where the ids of the spans would differ."""
    *earlier, last = indices
    texts = list(row_texts(row.messages[: last + 1], end_of_turn))
    before = ""
    for index in earlier:
        prompt = render_prompt(answers_only(row.messages[:index]))
        completion = render_completion(None, split_turn(row.messages[index])[1])
        texts += [prompt.removeprefix(before), completion]
        before = prompt + completion
    prompt_ids, completion_ids, *parts = yield texts
    bos = list(bos_ids(tokenizer))
    encoded = join_row(bos + prompt_ids, completion_ids, tokenizer, end_of_turn)
    labels = list(encoded.labels)
    ids = list(bos)
    for between, span in zip(parts[::2], parts[1::2], strict=True):
        ids += between
        labels[len(ids) : len(ids) + len(span)] = span
        ids += span
    # The whole prompt is encoded as one text. A tokenizer that merges over the end of a turn gives it other ids.
    if encoded.input_ids[: len(ids)] == ids:
        return [replace(encoded, labels=labels)]
    apart = [row_texts(row.messages[: index + 1], end_of_turn) for index in earlier]
    parts = yield [text for pair in apart for text in pair]
    rows = zip(parts[::2], parts[1::2], strict=True)
    return [*(join_row(bos + prompt, completion, tokenizer, end_of_turn) for prompt, completion in rows), encoded]


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while batch := list(islice(remaining, BATCH_ROWS)):
        yield batch


def _read_ahead(batches: Iterator[list[Row]]) -> Iterator[list[Row]]:
    """Yield batches; a thread reads the next one while the tokenizer, which needs no interpreter, encodes this one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(next, batches, None)
        while batch := following.result():
            following = thread.submit(next, batches, None)
            yield batch


def _check_ids(row: EncodedRow, num_ids: int) -> None:
    wrong = next((token for token in row.input_ids if not 0 <= token < num_ids), None)
    if wrong is not None:
        raise InputError(f"input_ids holds {wrong}, and the tokenizer has the ids 0 to {num_ids - 1}")


def _list_some(lengths: Mapping[str, int]) -> str:
    """Return the origins and lengths of the first rows, and the number of the others."""
    named = [f"{where} ({length} tokens)" for where, length in lengths.items()]
    more = f" and {len(named) - NUM_NAMED} more" if len(named) > NUM_NAMED else ""
    return ", ".join(named[:NUM_NAMED]) + more
