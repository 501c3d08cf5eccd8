"""Sampled ids: where `StopSearch` cuts them, and the text that `decode_completion` returns."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rekatrain.data.chat import (
    END_OF_TEXT,
    FinishReason,
    ParsedCompletion,
    encode_text,
    parse_completion,
    render_completion,
)
from rekatrain.data.stop import StopSearch, decode_completion
from tests.data.conversations import CLEAN_TEXTS, UNHURRIED


@pytest.fixture(scope="module")
def stop_search(any_tokenizer: PreTrainedTokenizerFast) -> StopSearch:
    return StopSearch(any_tokenizer)


@pytest.mark.parametrize(
    ("ids", "num_kept"),
    [
        ([220, 17, 366, 29136, 29, 18328], 5),  # 2 <sep> assistant
        ([16134, 29136, 29, 13], 3),  # .<sep>.
        ([71893, 29136, 29], 3),  # }<sep>
        ([27, 29136, 1363, 17], 3),  # <sep>\n\n2
        ([27, 29136, 397], 3),  # <sep>\n
        ([366, 29136, 14611, 17], 3),  # <sep>.
        ([366, 29136, 2511], 3),  # <sep>>
        ([366, 29136, 29, 366, 29136, 29], 3),  # the first of two
        ([27, 82, 68, 79, 29, 17], 5),  # one token per character
        ([366, 29136, 220, 29], 4),  # < sep >: none
        ([29], 1),
        ([], 0),
    ],
)
def test_stop_search_cuts_after_the_completing_token(
    cl100k: PreTrainedTokenizerFast, ids: list[int], num_kept: int
) -> None:
    assert StopSearch(cl100k).cut(ids) == ids[:num_kept]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" 4 <sep> human:", " 4 <sep>"),
        ("4.<sep>\n\n", "4.<sep>"),
        ("<sep><sep>", "<sep>"),
        ("a > b < sep>", "a > b < sep>"),
        ("", ""),
    ],
)
def test_stop_search_finds_a_stop_of_one_character_tokens(
    tokenizer: PreTrainedTokenizerFast, text: str, kept: str
) -> None:
    ids = list(itertools.chain.from_iterable(encode_text(character, tokenizer) for character in text))
    assert len(ids) == len(text)
    search = StopSearch(tokenizer)
    assert tokenizer.decode(search.cut(ids)) == kept
    completes = [end for end in range(len(ids) + 1) if search.completes_at(ids, end)]
    assert completes[:1] == ([len(kept)] if "<sep>" in text else [])


@UNHURRIED
@given(draw=st.data())
def test_stop_search_keeps_the_shortest_prefix_with_the_stop(
    any_tokenizer: PreTrainedTokenizerFast, stop_search: StopSearch, draw: st.DataObject
) -> None:
    fragments = ["<", " <", ".<", "s", "e", "p", "sep", ">", ">\n", ">>", "<sep>", " <sep>", "é", END_OF_TEXT]
    written = st.sampled_from(fragments).map(lambda fragment: encode_text(fragment, any_tokenizer))
    anything = st.integers(0, len(any_tokenizer) - 1).map(lambda token: [token])
    ids = sum(draw.draw(st.lists(written | anything, max_size=12)), [])
    prefixes = (ids[:end] for end in range(len(ids) + 1))
    shortest = next((prefix for prefix in prefixes if "<sep>" in any_tokenizer.decode(prefix)), ids)
    assert stop_search.cut(ids) == shortest


def test_decode_completion_writes_a_final_eos_as_end_of_text(any_tokenizer: PreTrainedTokenizerFast) -> None:
    ids, eos = encode_text(" 4 <sep>", any_tokenizer), any_tokenizer.eos_token_id
    assert decode_completion(ids, any_tokenizer) == " 4 <sep>"
    assert decode_completion([*ids, eos], any_tokenizer) == " 4 <sep><|endoftext|>"
    assert decode_completion([eos], any_tokenizer) == "<|endoftext|>"
    assert decode_completion([], any_tokenizer) == ""


def test_decode_completion_renames_an_eos_of_another_name(tokenizer: PreTrainedTokenizerFast) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="!")
    ids = encode_text(" 4", other)
    assert parse_completion(decode_completion([*ids, other.eos_token_id], other)).finish_reason is FinishReason.EOS
    assert decode_completion([other.eos_token_id, *ids], other) == "! 4"


@UNHURRIED
@given(reasoning=st.none() | CLEAN_TEXTS, answer=CLEAN_TEXTS)
def test_completion_survives_encoding_stopping_and_decoding(
    any_tokenizer: PreTrainedTokenizerFast, stop_search: StopSearch, reasoning: str | None, answer: str
) -> None:
    ids = encode_text(render_completion(reasoning, answer) + "\n\n", any_tokenizer)
    parsed = parse_completion(decode_completion(stop_search.cut(ids), any_tokenizer))
    assert parsed == ParsedCompletion(reasoning=reasoning, answer=answer, finish_reason=FinishReason.STOP)
