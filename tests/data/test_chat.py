"""The chat format: against published vectors, against its template, and rendering against parsing against stopping."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from rekatrain.data import chat
from rekatrain.data.chat import (
    END_OF_TEXT,
    IGNORED_LABEL,
    FinishReason,
    Message,
    ParsedCompletion,
    assistant_turns,
    check_messages,
    encode_row,
    encode_text,
    neutralize_messages,
    parse_completion,
    render_completion,
    render_prompt,
)
from rekatrain.data.errors import InputError
from rekatrain.data.stop import StopSearch, decode_completion
from tests.conftest import GOLDEN

TEMPLATE = Path(chat.__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, thought: str | None = None) -> Message:
    message: Message = {"role": "assistant", "content": content}
    return message if thought is None else {**message, "reasoning_content": thought}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


# What goes wrong goes wrong around these: tags whole and in pieces, white space of several kinds, neighbours of `>`.
FRAGMENTS = [
    *(
        "<sep>",
        "< sep>",
        "<se",
        "p>",
        "<",
        ">",
        "sep",
        "<reasoning>",
        "</reasoning>",
        "<reason",
        "ing>",
        "</",
        "reasoning",
    ),
    *(END_OF_TEXT, "<|", " ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "a", "Hi", "42", "4.", "é", "日本", "🙂"),
]
NASTY_TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
TEXTS = NASTY_TEXTS | st.text(max_size=12)
# Texts that a trained turn can hold: no tag, no stop, no white space at the ends.
CLEAN_TEXTS = TEXTS.map(str.strip).filter(lambda text: not any(tag in text for tag in ("<sep>", "reasoning>")))
# A busy machine is not a fault of the code.
UNHURRIED = settings(deadline=None)
ROLES = st.sampled_from(["user", "human", "tool", "assistant", "system"])
CONVERSATIONS = st.lists(st.builds(lambda role, content: {"role": role, "content": content}, ROLES, TEXTS), min_size=1)


@pytest.fixture(scope="module")
def golden() -> list[dict]:
    return json.loads((GOLDEN / "reka_prompts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["tiny", "cl100k"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, then Reka's."""
    return request.getfixturevalue({"tiny": "tokenizer", "cl100k": "cl100k"}[request.param])


@pytest.fixture(scope="module")
def stop_search(any_tokenizer: PreTrainedTokenizerFast) -> StopSearch:
    return StopSearch(any_tokenizer)


# Prompts: published vectors and the template


def test_prompts_equal_the_published_vectors(golden):
    assert len(golden) == 14
    for case in golden:
        assert render_prompt(case["messages"], case["add_generation_prompt"]) == case["text"], case["name"]


def test_prompt_ids_equal_the_published_vectors(golden, cl100k):
    for case in golden:
        assert encode_text(render_prompt(case["messages"], case["add_generation_prompt"]), cl100k) == case["ids"]


PROMPTS = {
    "system folded": ([system("Be brief."), user("2+2?")], "human: Be brief. 2+2? <sep> assistant:"),
    "empty system": ([system(""), user("Hi")], "human:  Hi <sep> assistant:"),
    "later system": ([user("Hi"), system("No.")], "human: Hi <sep> system: No. <sep> assistant:"),
    "human": ([{"role": "human", "content": "Hi"}], "human: Hi <sep> assistant:"),
    "tool": ([user("Hi"), {"role": "tool", "content": "{}"}], "human: Hi <sep> tool: {} <sep> assistant:"),
    "earlier reasoning": (
        [user("Hi"), assistant(" <reasoning>\nA greeting.\n</reasoning>\n\nHello!"), user("Bye")],
        "human: Hi <sep> assistant:  \n\nHello! <sep> human: Bye <sep> assistant:",
    ),
    "reasoning apart": (
        [user("Hi"), assistant("Hello!", "A greeting."), user("Bye")],
        "human: Hi <sep> assistant: Hello! <sep> human: Bye <sep> assistant:",
    ),
    "prefill": ([user("Hi"), assistant("<reasoning>\nThe")], "human: Hi <sep> assistant: <reasoning>\nThe"),
    "white space": ([user(" Hi\n")], "human:  Hi\n <sep> assistant:"),
}


@pytest.mark.parametrize(("messages", "text"), PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_is_exactly_this_text(messages, text):
    assert render_prompt(messages) == text


def test_without_a_generation_prompt_only_the_turns_are_rendered():
    assert render_prompt([user("Hi")], add_generation_prompt=False) == "human: Hi"


@UNHURRIED
@given(messages=CONVERSATIONS, add_generation_prompt=st.booleans())
@example(messages=[assistant("</reasoning>a<reasoning>b</reasoning>c"), user("Hi")], add_generation_prompt=True)
@example(messages=[system("a"), assistant("b</reasoning>c")], add_generation_prompt=True)
def test_the_jinja_template_renders_what_render_prompt_does(tokenizer, messages, add_generation_prompt):
    assume(messages[0]["role"] != "system" or len(messages) > 1)
    from_template = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert from_template == render_prompt(messages, add_generation_prompt)


def test_a_conversation_of_only_a_system_message_is_an_error_in_both(tokenizer):
    wrong = "a conversation of only a system message has nothing to answer; add a user message"
    with pytest.raises(InputError, match=wrong):
        render_prompt([system("Be brief.")])
    with pytest.raises(TemplateError, match=wrong):
        tokenizer.apply_chat_template([system("Be brief.")], chat_template=TEMPLATE, tokenize=False)


def test_an_empty_conversation_is_an_error():
    with pytest.raises(InputError, match="a conversation needs at least one message"):
        render_prompt([])


# Completions: rendering and parsing


def test_a_completion_is_exactly_this_text():
    assert render_completion(None, "4") == " 4 <sep>"
    assert render_completion("Two.", "4") == " <reasoning>\nTwo.\n</reasoning>\n\n4 <sep>"


@UNHURRIED
@given(reasoning=st.none() | CLEAN_TEXTS, answer=CLEAN_TEXTS)
def test_a_rendered_completion_is_parsed_back(reasoning, answer):
    parsed = parse_completion(render_completion(reasoning, answer))
    assert parsed == ParsedCompletion(reasoning=reasoning, answer=answer, finish_reason=FinishReason.STOP)


PARSED = {
    "empty": ("", None, "", "length"),
    "only the stop": (" <sep>", None, "", "stop"),
    "cut off": (" 4", None, "4", "length"),
    "eos": (" 4<|endoftext|>", None, "4", "eos"),
    "stop and eos": (" 4 <sep><|endoftext|>", None, "4", "stop"),
    "text after the stop": (" 4 <sep> human: 5 <sep>", None, "4", "stop"),
    "stop without spaces": ("4<sep>5", None, "4", "stop"),
    "eos earlier in the text": (" <|endoftext|>4 <sep>", None, "<|endoftext|>4", "stop"),
    "reasoning": (" <reasoning>\nTwo.\n</reasoning>\n\n4 <sep>", "Two.", "4", "stop"),
    "reasoning without white space": ("<reasoning>Two.</reasoning>4<|endoftext|>", "Two.", "4", "eos"),
    "reasoning, no answer": (" <reasoning>Two.</reasoning> <sep>", "Two.", "", "stop"),
    "empty reasoning": (" <reasoning>\n</reasoning>\n\n4 <sep>", "", "4", "stop"),
    "unclosed": (" <reasoning>\nTwo and", "Two and", "", "length"),
    "unclosed and stopped": (" <reasoning>\nTwo and <sep> 4</reasoning>", "Two and", "", "stop"),
    "block after the answer": (" 4 <reasoning>a</reasoning> <sep>", None, "4 <reasoning>a</reasoning>", "stop"),
    "closed, never opened": (" Two.</reasoning>4 <sep>", None, "Two.</reasoning>4", "stop"),
    "closed twice": (" <reasoning>a</reasoning>b</reasoning>c <sep>", "a", "b</reasoning>c", "stop"),
    "opened twice": (" <reasoning>a<reasoning>b</reasoning>c <sep>", "a<reasoning>b", "c", "stop"),
}


@pytest.mark.parametrize(("text", "reasoning", "answer", "finish_reason"), PARSED.values(), ids=PARSED)
def test_a_completion_is_read_as(text, reasoning, answer, finish_reason):
    assert parse_completion(text) == ParsedCompletion(
        reasoning=reasoning, answer=answer, finish_reason=FinishReason(finish_reason)
    )


@UNHURRIED
@given(messages=CONVERSATIONS, reasoning=st.none() | CLEAN_TEXTS, answer=CLEAN_TEXTS, ends_in_user=TEXTS)
def test_ids_of_prompt_and_completion_are_the_ids_of_the_whole(
    any_tokenizer, messages, reasoning, answer, ends_in_user
):
    prompt, completion = render_prompt([*messages, user(ends_in_user)]), render_completion(reasoning, answer)
    apart = encode_text(prompt, any_tokenizer) + encode_text(completion, any_tokenizer)
    assert apart == encode_text(prompt + completion, any_tokenizer)


# Training rows


def test_a_reka_row_has_exactly_these_ids_and_labels(cl100k):
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
def test_only_the_last_turn_and_its_stop_are_trained(any_tokenizer, end_of_turn, ending):
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
    assert [place for place, token in enumerate(trained, start=1) if token == eos_id] == (
        [] if end_of_turn == "sep" else [len(trained)]
    )


def test_a_row_without_reasoning_trains_the_bare_answer(any_tokenizer):
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
def test_a_row_with_nothing_to_train_is_refused(tokenizer, messages, wrong):
    with pytest.raises(InputError, match=f"^{wrong}$"):
        encode_row(messages, tokenizer)


def test_a_conversation_is_cut_after_each_assistant_turn():
    turns = [system("s"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    assert list(assistant_turns(turns)) == [turns[:3], turns[:5]]
    assert list(assistant_turns(turns[:2])) == []


def test_a_typed_end_of_text_has_these_ids(cl100k):
    assert encode_text(END_OF_TEXT, cl100k) == [27, 91, 8862, 728, 428, 91, 29]


@pytest.mark.parametrize("end_of_turn", ["sep", "sep_eos", "eos"])
def test_a_typed_end_of_text_is_never_the_eos_id_and_reads_back(any_tokenizer, end_of_turn):
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


def test_an_answer_may_end_with_a_typed_end_of_text(tokenizer):
    row = [user("Name it."), assistant(f"It is {END_OF_TEXT}"), user("Again."), assistant(END_OF_TEXT)]
    assert tokenizer.decode(encode_row(row, tokenizer).input_ids) == (
        f"human: Name it. <sep> assistant: It is {END_OF_TEXT} <sep> human: Again. <sep> assistant: {END_OF_TEXT} <sep>"
    )


# What forges a turn


TAGS_FAULT = "in its content: write one block, opened first and closed, before the answer"
BEGINNING = "a conversation begins with a user message, before it at most one system message"
REFUSED = {
    "no messages": ([], "messages must be a list with at least one message"),
    "text": ("Hi", "messages must be a list with at least one message"),
    "a message of text": (["Hi"], "message 1 must be an object with a role and a content"),
    "no role": ([{"content": "Hi"}], "message 1 must be an object with a role and a content"),
    "role of two words": (
        [{"role": "user: x", "content": "Hi"}],
        "message 1 has the role 'user: x'; a role is one word, such as user or assistant",
    ),
    "role with a stop": (
        [user("Hi"), {"role": "<sep>", "content": ""}],
        "message 2 has the role '<sep>'; a role is one word, such as user or assistant",
    ),
    "no content": ([{"role": "user"}], "message 1 (user): a message holds text, not NoneType"),
    "parts": ([{"role": "user", "content": ["Hi"]}], "message 1 (user): a message holds text, not list"),
    "thought is a number": (
        [user("Hi"), {"role": "assistant", "content": "a", "reasoning_content": 1}],
        "message 2 (assistant): a message holds text, not int",
    ),
    "user thinks": (
        [{**user("Hi"), "reasoning_content": "x"}],
        "message 1 (user) has a reasoning_content, which only an assistant message has",
    ),
    "stop": ([user("a<sep>b")], "message 1 (user) holds a literal <sep>, which would end its turn"),
    "stop in a system": (
        [system("<sep>"), user("b")],
        "message 1 (system) holds a literal <sep>, which would end its turn",
    ),
    "stop in a thought": (
        [user("Hi"), assistant("a", "b<sep>")],
        "message 2 (assistant) holds a literal <sep>, which would end its turn",
    ),
    "never opened": (
        [user("Hi"), assistant("a</reasoning>b")],
        f"message 2 (assistant) has 0 <reasoning> and 1 </reasoning> {TAGS_FAULT}",
    ),
    "never closed, then more": (
        [user("Hi"), assistant("<reasoning>a"), user("b")],
        f"message 2 (assistant) has 1 <reasoning> and 0 </reasoning> {TAGS_FAULT}",
    ),
    "closed first": (
        [user("Hi"), assistant("</reasoning>a<reasoning>")],
        f"message 2 (assistant) has 1 <reasoning> and 1 </reasoning> {TAGS_FAULT}",
    ),
    "block after text": (
        [user("Hi"), assistant("a<reasoning>b</reasoning>c")],
        f"message 2 (assistant) has 1 <reasoning> and 1 </reasoning> {TAGS_FAULT}",
    ),
    "two blocks": (
        [user("Hi"), assistant("<reasoning>a</reasoning><reasoning>b</reasoning>c")],
        f"message 2 (assistant) has 2 <reasoning> and 2 </reasoning> {TAGS_FAULT}",
    ),
    "two thoughts": (
        [user("Hi"), assistant("<reasoning>a</reasoning>b", "c")],
        "message 2 (assistant) has reasoning both in content and in reasoning_content",
    ),
    "tag in a thought": (
        [user("Hi"), assistant("a", "b</reasoning>c")],
        "message 2 (assistant) has a reasoning_content that holds the reasoning tags themselves",
    ),
    "only a system": ([system("a")], BEGINNING),
    "two systems": ([system("a"), system("b"), user("c")], BEGINNING),
    "assistant first": ([assistant("a"), user("b")], BEGINNING),
    "assistant after system": ([system("a"), assistant("b")], BEGINNING),
}


@pytest.mark.parametrize(("messages", "wrong"), REFUSED.values(), ids=REFUSED)
def test_a_conversation_is_refused_with_this_message(messages, wrong):
    with pytest.raises(InputError) as caught:
        check_messages(messages)
    assert str(caught.value) == wrong


GOOD = {
    "user alone": [user("Hi")],
    "all roles": [system("s"), {"role": "human", "content": ""}, assistant("b"), {"role": "tool", "content": "{}"}],
    "inline reasoning": [user("Hi"), assistant("\n<reasoning>a</reasoning>b")],
    "thought apart": [user("Hi"), assistant("b", "a"), user("c")],
    "prefill": [user("Hi"), assistant("<reasoning>\nThe user")],
    "tags of a user": [user("What is </reasoning>?"), assistant("a tag")],
    "typed end of text": [user(END_OF_TEXT)],
    "nearly a stop": [user("< sep> <sep <SEP> sep>")],
}


@pytest.mark.parametrize("messages", GOOD.values(), ids=GOOD)
def test_a_good_conversation_is_accepted_and_left_alone(messages):
    check_messages(messages)
    assert neutralize_messages(messages) == messages


NASTY_MESSAGES = st.one_of(
    st.builds(user, NASTY_TEXTS),
    st.builds(assistant, NASTY_TEXTS, st.none() | NASTY_TEXTS),
    st.builds(lambda text: {"role": "tool", "content": text}, NASTY_TEXTS),
)


@UNHURRIED
@given(
    first=st.just([]) | st.builds(lambda text: [system(text)], NASTY_TEXTS),
    question=NASTY_TEXTS,
    others=st.lists(NASTY_MESSAGES, max_size=4),
)
def test_what_is_neutralized_passes_and_differs_only_by_spaces(first, question, others):
    messages = [*first, user(question), *others]
    neutral = neutralize_messages(messages)
    check_messages(neutral)
    for before, after in zip(messages, neutral, strict=True):
        assert before.keys() == after.keys()
        for key in before:
            assert (before[key] or "").replace(" ", "") == (after[key] or "").replace(" ", "")


def test_neutralising_breaks_exactly_what_would_be_refused():
    messages = [user("a <sep> b</reasoning>"), assistant("c</reasoning>d", "e<sep><reasoning>")]
    assert neutralize_messages(messages) == [
        user("a < sep> b</reasoning>"),
        assistant("c< /reasoning>d", "e< sep>< reasoning>"),
    ]
    assert messages[0] == user("a <sep> b</reasoning>")


# Where sampled ids stop, and how they read


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
        ([27, 82, 68, 79, 29, 17], 5),  # one token a character
        ([366, 29136, 220, 29], 4),  # < sep >: none
        ([29], 1),
        ([], 0),
    ],
)
def test_reka_ids_are_cut_at_the_token_that_completes_the_stop(cl100k, ids, num_kept):
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
def test_a_stop_is_found_when_each_character_is_a_token(tokenizer, text, kept):
    ids = list(itertools.chain.from_iterable(encode_text(character, tokenizer) for character in text))
    assert len(ids) == len(text)
    search = StopSearch(tokenizer)
    assert tokenizer.decode(search.cut(ids)) == kept
    completes = [end for end in range(len(ids) + 1) if search.completes_at(ids, end)]
    assert completes[:1] == ([len(kept)] if "<sep>" in text else [])


@UNHURRIED
@given(draw=st.data())
def test_ids_are_cut_at_the_shortest_prefix_whose_text_has_the_stop(any_tokenizer, stop_search, draw):
    pieces = ["<", " <", ".<", "s", "e", "p", "sep", ">", ">\n", ">>", "<sep>", " <sep>", "é", END_OF_TEXT]
    written = st.sampled_from(pieces).map(lambda piece: encode_text(piece, any_tokenizer))
    anything = st.integers(0, len(any_tokenizer) - 1).map(lambda token: [token])
    ids = sum(draw.draw(st.lists(written | anything, max_size=12)), [])
    prefixes = (ids[:end] for end in range(len(ids) + 1))
    shortest = next((prefix for prefix in prefixes if "<sep>" in any_tokenizer.decode(prefix)), ids)
    assert stop_search.cut(ids) == shortest


def test_a_final_eos_reads_as_end_of_text(any_tokenizer):
    ids, eos = encode_text(" 4 <sep>", any_tokenizer), any_tokenizer.eos_token_id
    assert decode_completion(ids, any_tokenizer) == " 4 <sep>"
    assert decode_completion([*ids, eos], any_tokenizer) == " 4 <sep><|endoftext|>"
    assert decode_completion([eos], any_tokenizer) == "<|endoftext|>"
    assert decode_completion([], any_tokenizer) == ""


def test_a_final_eos_of_another_name_reads_as_end_of_text_too(tokenizer):
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="!")
    ids = encode_text(" 4", other)
    assert parse_completion(decode_completion([*ids, other.eos_token_id], other)).finish_reason is FinishReason.EOS
    assert decode_completion([other.eos_token_id, *ids], other) == "! 4"


@UNHURRIED
@given(reasoning=st.none() | CLEAN_TEXTS, answer=CLEAN_TEXTS)
def test_a_completion_survives_encoding_stopping_and_decoding(any_tokenizer, stop_search, reasoning, answer):
    ids = encode_text(render_completion(reasoning, answer) + "\n\n", any_tokenizer)
    parsed = parse_completion(decode_completion(stop_search.cut(ids), any_tokenizer))
    assert parsed == ParsedCompletion(reasoning=reasoning, answer=answer, finish_reason=FinishReason.STOP)
