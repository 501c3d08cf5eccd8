"""vLLM plugin for models that use the Reka chat format (vLLM 0.30; it imports only vLLM).

    vllm serve MODEL --reasoning-parser-plugin serving/reka_reasoning_parser.py --reasoning-parser reka

It does two things that vLLM does not do for this format:

- It splits ` <reasoning>\\nthought\\n</reasoning>\\n\\nanswer` into `reasoning` and `content`, streamed or not. A tag
  is text of several tokens, and the stream may cut it anywhere; vLLM's own parsers need tags that are single tokens.
- It stops every chat request at the text `<sep>`, whether or not the client sends it: vLLM has no default stop strings.
  (`/v1/completions` uses no parser: there the client must send `stop`.)
"""

from collections.abc import Iterable, Sequence

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParser, ReasoningParserManager

STOP = "<sep>"
OPEN, CLOSE = "<reasoning>", "</reasoning>"
GENERATION_PROMPT = f"{STOP} assistant:"


class Splitter:
    """Splits one turn, fed in chunks of any size; holds back text that may still become a tag or be trailing space."""

    def __init__(self, *, is_reasoning: bool = False) -> None:
        self._part = "reasoning" if is_reasoning else "start"
        self._held = ""
        self._has_begun = False

    def feed(self, text: str) -> tuple[str, str]:
        """Add `text`; return the reasoning and the content that are now certain."""
        self._held += text
        reasoning = ""
        if self._part == "start":
            start = self._held.lstrip()
            if OPEN.startswith(start) and start != OPEN:  # nothing yet, or the first letters of the tag
                return "", ""
            if start.startswith(OPEN):
                self._part, self._held = "reasoning", start.removeprefix(OPEN)
            else:
                self._part = "content"
        if self._part == "reasoning":
            thought, closed, rest = self._held.partition(CLOSE)
            if not closed:
                return self._release(keep=_partial_tag(self._held)), ""
            self._held = thought
            reasoning = self._release(keep=0)
            self._part, self._held, self._has_begun = "content", rest, False
        return reasoning, self._release(keep=0)

    def finish(self) -> tuple[str, str]:
        """End the turn; return the held text, which did not become a tag, as reasoning and content."""
        held, self._held = self._held.rstrip(), ""
        held = held if self._has_begun else held.lstrip()
        return (held, "") if self._part == "reasoning" else ("", held)

    def _release(self, *, keep: int) -> str:
        """Release the held text except its last `keep` characters, without white space around the whole part."""
        ready = self._held[: len(self._held) - keep].rstrip()
        if not ready.strip():
            return ""
        self._held = self._held[len(ready) :]
        if not self._has_begun:
            self._has_begun, ready = True, ready.lstrip()
        return ready


def split(text: str, *, is_reasoning: bool = False) -> tuple[str | None, str | None]:
    """Return the reasoning and the content of a whole turn, None if empty. An unclosed block is all reasoning."""
    splitter = Splitter(is_reasoning=is_reasoning)
    parts = [splitter.feed(text), splitter.finish()]
    reasoning, content = ("".join(part) for part in zip(*parts, strict=True))
    return reasoning or None, content or None


@ReasoningParserManager.register_module("reka")
class RekaReasoningParser(ReasoningParser):
    """The parser of one choice of a request. (vLLM makes another for its grammar engine, which feeds it no text.)"""

    # The parser keeps the state: vLLM then passes only deltas, and calls finish_streaming at the end.
    engine_based_streaming = True

    def __init__(self, tokenizer, *args, **kwargs) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._splitter = Splitter()

    @property
    def reasoning_start_str(self) -> str:
        return OPEN

    @property
    def reasoning_end_str(self) -> str:
        return CLOSE

    def adjust_request(self, request):
        """Add `<sep>` to the request's stops."""
        stops = [request.stop] if isinstance(request.stop, str) else list(request.stop or [])
        if STOP not in stops:
            request.stop = [*stops, STOP]
        return request

    def adjust_initial_state_from_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        """Start inside the reasoning block if the prompt ends in one, as a prefill does."""
        turn = self._last_turn(prompt_token_ids)
        self._splitter = Splitter(is_reasoning=OPEN in turn and CLOSE not in turn)

    def extract_reasoning(self, model_output: str, request) -> tuple[str | None, str | None]:
        messages = getattr(request, "messages", None) or [{}]
        last = messages[-1] if isinstance(messages[-1], dict) else messages[-1].model_dump()
        prefill = last.get("content") if last.get("role") == "assistant" else None
        is_open = isinstance(prefill, str) and OPEN in prefill and CLOSE not in prefill
        return split(model_output, is_reasoning=is_open)

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        return _delta(*self._splitter.feed(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        return _delta(*self._splitter.finish())

    def has_engine_confirmed_reasoning_end(self) -> bool:
        return False  # the splitter is needed to the end of the turn: it strips the white space around the answer

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Return True if the last turn of prompt and output has reached its answer; a grammar then applies."""
        turn = self._last_turn(input_ids)
        start = turn.lstrip()
        return CLOSE in turn or not (start.startswith(OPEN) or OPEN.startswith(start))

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        return self.is_reasoning_end(input_ids)

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """Return the ids after the one that completes the closing tag; all ids if no block was opened."""
        if not self.is_reasoning_end(input_ids):
            return []
        return input_ids[self.count_reasoning_tokens(input_ids) :]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Count the ids through the one that completes the closing tag; all if it never comes, 0 if none was opened."""
        text = self._decode(token_ids)
        if not text.lstrip().startswith(OPEN):
            return 0
        if CLOSE not in text:
            return len(token_ids)
        low, high = 0, len(token_ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if CLOSE in self._decode(token_ids[:middle]) else (middle + 1, high)
        return low

    def _last_turn(self, token_ids: Sequence[int]) -> str:
        return self._decode(token_ids).rpartition(GENERATION_PROMPT)[2]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.model_tokenizer.decode(list(token_ids))


def _partial_tag(text: str) -> int:
    """Return the length of the longest end of `text` that begins a closing tag."""
    return next(length for length in range(len(CLOSE) - 1, -1, -1) if text.endswith(CLOSE[:length]))


def _delta(reasoning: str, content: str) -> DeltaMessage | None:
    return DeltaMessage(reasoning=reasoning or None, content=content or None) if reasoning or content else None
