"""Training rows: the exact ids and labels, and rows with nothing to train."""

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.data.chat import END_OF_TEXT, IGNORED_LABEL, EndOfTurn, Message, encode_row, encode_text
from rekatrain.data.errors import InputError
from tests.data.conversations import assistant, system, user


def test_encode_row_gives_exactly_these_ids_and_labels(cl100k: PreTrainedTokenizerFast) -> None:
    row = [user("Hi"), assistant("42", "Okay")]
    prompt = [26380, 25, 21694, 366, 29136, 29, 18328, 25]
    body = [366, 20489, 287, 397, 33413, 198, 524, 20489, 287, 1363, 2983]
    stop, eos = [366, 29136, 29], [100257]
    for end_of_turn, trained in {"sep": body + stop, "sep_eos": body + stop + eos, "eos": body + eos}.items():
        encoded = encode_row(row, cl100k, end_of_turn)
        assert encoded.input_ids == prompt + trained
        assert encoded.labels == [IGNORED_LABEL] * len(prompt) + trained
    assert encode_row(row, cl100k) == encode_row(row, cl100k, "sep")


@pytest.mark.parametrize(
    ("end_of_turn", "ending"), [("sep", " <sep>"), ("sep_eos", " <sep><|endoftext|>"), ("eos", "<|endoftext|>")]
)
def test_encode_row_labels_only_the_last_turn_and_its_stop(
    any_tokenizer: PreTrainedTokenizerFast, end_of_turn: EndOfTurn, ending: str
) -> None:
    row = [
        system("Be brief."),
        user("2+2?"),
        assistant("<reasoning>\nTwo and two.\n</reasoning>\n\n4"),
        user("3+3?"),
        assistant("6", "Three and three."),
        user("4+4?"),
        assistant(" <reasoning>Four and four.</reasoning>8\n"),
    ]
    first_turns = "human: Be brief. 2+2? <sep> assistant: 4 <sep> human: 3+3? <sep> assistant: 6 <sep> "
    prompt = first_turns + "human: 4+4? <sep> assistant:"
    encoded = encode_row(row, any_tokenizer, end_of_turn)
    trained = [label for label in encoded.labels if label != IGNORED_LABEL]
    num_prompt = len(encoded.labels) - len(trained)
    assert encoded.labels == [IGNORED_LABEL] * num_prompt + encoded.input_ids[num_prompt:]
    assert any_tokenizer.decode(encoded.input_ids[:num_prompt]) == prompt
    assert any_tokenizer.decode(trained) == " <reasoning>\nFour and four.\n</reasoning>\n\n8" + ending
    eos_id = any_tokenizer.eos_token_id
    assert [position for position, token in enumerate(trained, start=1) if token == eos_id] == (
        [] if end_of_turn == "sep" else [len(trained)]
    )


def test_encode_row_trains_a_bare_answer(any_tokenizer: PreTrainedTokenizerFast) -> None:
    for row in ([user("2+2?"), assistant("4")], [user("2+2?"), assistant(" 4\n", " ")]):
        encoded = encode_row(row, any_tokenizer)
        assert any_tokenizer.decode(encoded.input_ids) == "human: 2+2? <sep> assistant: 4 <sep>"


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ([user("Hi")], "a training row must end with an assistant message that answers something"),
        ([user("Hi"), assistant(" ")], "the assistant message to train has no answer"),
        ([user("Hi"), assistant("<reasoning>a</reasoning>")], "the assistant message to train has no answer"),
        ([user("Hi"), assistant("<reasoning>a")], "the assistant message to train has no answer"),
        ([user("a <sep> b"), assistant("c")], r"message 1 \(user\) holds a literal <sep>, which would end its turn"),
    ],
)
def test_encode_row_rejects_a_row_with_nothing_to_train(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], wrong: str
) -> None:
    with pytest.raises(InputError, match=f"^{wrong}$"):
        encode_row(messages, tokenizer)


def test_encode_text_gives_a_typed_end_of_text_ordinary_ids(cl100k: PreTrainedTokenizerFast) -> None:
    assert encode_text(END_OF_TEXT, cl100k) == [27, 91, 8862, 728, 428, 91, 29]


@pytest.mark.parametrize("end_of_turn", ["sep", "sep_eos", "eos"])
def test_encode_row_never_gives_typed_text_the_eos_id(
    any_tokenizer: PreTrainedTokenizerFast, end_of_turn: EndOfTurn
) -> None:
    typed = f"{END_OF_TEXT}a{END_OF_TEXT}{END_OF_TEXT}."
    row = [user(typed), assistant(typed), user(typed), assistant(typed, typed)]
    encoded = encode_row(row, any_tokenizer, end_of_turn)
    ids = encoded.input_ids if end_of_turn == "sep" else encoded.input_ids[:-1]
    assert any_tokenizer.eos_token_id not in ids
    stop = "" if end_of_turn == "eos" else " <sep>"
    assert any_tokenizer.decode(ids) == (
        f"human: {typed} <sep> assistant: {typed} <sep> human: {typed} <sep> "
        f"assistant: <reasoning>\n{typed}\n</reasoning>\n\n{typed}{stop}"
    )


def test_encode_row_keeps_a_typed_end_of_text_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    row = [user("Name it."), assistant(f"It is {END_OF_TEXT}"), user("Again."), assistant(END_OF_TEXT)]
    assert tokenizer.decode(encode_row(row, tokenizer).input_ids) == (
        f"human: Name it. <sep> assistant: It is {END_OF_TEXT} <sep> human: Again. <sep> assistant: {END_OF_TEXT} <sep>"
    )
