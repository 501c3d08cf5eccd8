"""vLLM's plugin without vLLM: it splits every stream of a turn as `parse_completion` splits its text."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rekatrain.data.chat import encode_text, parse_completion
from rekatrain.trainer.export.serving import PARSER, TEMPLATES

CHUNKS = ["<reasoning>", "</reasoning>", "<", "</", "rea", "soning>", " ", "\n", "a", "b c", "<reasoning", "1 < 2"]
DELTAS = st.lists(st.lists(st.sampled_from(CHUNKS), max_size=3).map("".join), max_size=8)


class ReasoningParser:
    """Stands in for vLLM's base class, which keeps the tokenizer. tests/vllm/test_serving.py uses the real one."""

    def __init__(self, tokenizer: object) -> None:
        self.model_tokenizer = tokenizer


@pytest.fixture(scope="module")
def plugin() -> ModuleType:
    """The plugin's file, with stand-ins for the three names that it imports from vLLM."""
    protocol, reasoning = ModuleType("protocol"), ModuleType("reasoning")
    protocol.DeltaMessage = SimpleNamespace  # type: ignore[attr-defined]
    reasoning.ReasoningParser = ReasoningParser  # type: ignore[attr-defined]
    reasoning.ReasoningParserManager = SimpleNamespace(register_module=lambda name: lambda cls: cls)  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("plugin", TEMPLATES / PARSER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm.entrypoints.generate.base.protocol", protocol)
        patch.setitem(sys.modules, "vllm.reasoning", reasoning)
        spec.loader.exec_module(module)
    return module


def stream(parser: object, deltas: list[str]) -> tuple[str, str]:
    messages = [parser.extract_reasoning_streaming("", "", delta, [], [], []) for delta in deltas]  # type: ignore[attr-defined]
    messages = [message for message in [*messages, parser.finish_streaming()] if message is not None]  # type: ignore[attr-defined]
    assert all(message.reasoning or message.content for message in messages)
    return "".join(m.reasoning or "" for m in messages), "".join(m.content or "" for m in messages)


@given(deltas=DELTAS)
def test_parser_splits_a_stream_as_its_whole_text(plugin: ModuleType, deltas: list[str]) -> None:
    parsed = parse_completion("".join(deltas))
    expected = (parsed.reasoning or "", parsed.answer)
    assert stream(plugin.RekaReasoningParser(None), deltas) == expected
    request = SimpleNamespace(messages=[{"role": "user", "content": "<reasoning>"}])
    whole = plugin.RekaReasoningParser(None).extract_reasoning("".join(deltas), request)
    assert whole == (expected[0] or None, expected[1] or None)


@pytest.mark.parametrize(
    ("deltas", "reasoning", "content"),
    [
        ([" <reas", "oning>\nTwo", " and two.\n</", "reasoning>\n\n4 "], "Two and two.", "4"),
        ([" Hello", ", 1 < 2 "], "", "Hello, 1 < 2"),
        ([" <reasoning>\nAnd so", " on </reas"], "And so on </reas", ""),
        ([" <reas", "on"], "", "<reason"),
        ([], "", ""),
    ],
    ids=["cut tags", "no reasoning", "unclosed", "no tag after all", "nothing"],
)
def test_parser_splits_streams_by_hand(plugin: ModuleType, deltas: list[str], reasoning: str, content: str) -> None:
    assert stream(plugin.RekaReasoningParser(None), deltas) == (reasoning, content)


def test_splitter_holds_nothing_certain_back(plugin: ModuleType) -> None:
    splitter = plugin.Splitter()
    assert [splitter.feed(text) for text in (" <reasoning>", "\nTwo", " and", "</reasoning>", "\n\n4", " or")] == [
        ("", ""),
        ("Two", ""),
        (" and", ""),
        ("", ""),
        ("", "4"),
        ("", " or"),
    ]


def test_parser_continues_a_prefilled_thought(plugin: ModuleType, tokenizer: PreTrainedTokenizerFast) -> None:
    parser = plugin.RekaReasoningParser(tokenizer)
    prompt = "human: <reasoning> <sep> assistant: <reasoning>\nThe user"
    parser.adjust_initial_state_from_prompt(encode_text(prompt, tokenizer))
    assert stream(parser, [" asks.</reasoning>", " Yes"]) == ("asks.", "Yes")
    request = SimpleNamespace(messages=[{"role": "assistant", "content": "<reasoning>\nThe user"}])
    assert parser.extract_reasoning(" asks.</reasoning> Yes", request) == ("asks.", "Yes")

    parser = plugin.RekaReasoningParser(tokenizer)
    parser.adjust_initial_state_from_prompt(encode_text("human: <reasoning> <sep> assistant:", tokenizer))
    assert stream(parser, [" Yes"]) == ("", "Yes")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [([], ["<sep>"]), (None, ["<sep>"]), ("\n", ["\n", "<sep>"]), (["<sep>"], ["<sep>"])],
)
def test_adjust_request_adds_sep_to_the_stops(plugin: ModuleType, stop: object, expected: list[str]) -> None:
    request = plugin.RekaReasoningParser(None).adjust_request(SimpleNamespace(stop=stop))
    assert ([request.stop] if isinstance(request.stop, str) else request.stop) == expected


def test_is_reasoning_end_begins_with_the_answer(plugin: ModuleType, tokenizer: PreTrainedTokenizerFast) -> None:
    parser = plugin.RekaReasoningParser(tokenizer)
    prompt = encode_text("human: Write </reasoning> <sep> assistant:", tokenizer)
    turn = encode_text(" <reasoning>\nTwo.\n</reasoning>\n\n4", tokenizer)
    ends = [end for end in range(len(turn) + 1) if parser.is_reasoning_end(prompt + turn[:end])]
    first = parser.count_reasoning_tokens(turn)
    assert ends == list(range(first, len(turn) + 1))
    assert tokenizer.decode(turn[:first]).rstrip().endswith("</reasoning>")
    assert parser.extract_content_ids(turn) == turn[first:]
    assert parser.is_reasoning_end(prompt + encode_text(" 4", tokenizer))
    assert parser.count_reasoning_tokens(encode_text(" 4", tokenizer)) == 0
