"""Scorers of how a completion is written: its format, its length, its repetitions and its language."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from rekatrain.data.chat import REASONING_CLOSE, REASONING_OPEN, FinishReason, ParsedCompletion
from rekatrain.data.errors import InputError

SHAPES = ("overlong", "cosine")
WORD = re.compile(r"\w+")
# Mathematics and code say nothing about the language around them.
NOT_PROSE = re.compile(
    r"```.*?```|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+|`[^`\n]*`|https?://\S+", re.DOTALL
)
MIN_LETTERS = 20  # a shorter text has no language that can be told


def reasoning_format(completion: ParsedCompletion) -> float:
    """1.0 where a closed, non-empty reasoning block comes first and a non-empty answer follows, else 0.0.

    A further reasoning tag in the thought or the answer, or a completion that was cut off, scores 0.0.
    """
    texts = [completion.reasoning or "", completion.answer]
    has_stray_tag = any(tag in text for text in texts for tag in (REASONING_OPEN, REASONING_CLOSE))
    return float(all(texts) and not has_stray_tag and completion.finish_reason is not FinishReason.LENGTH)


class Length:
    """A function of the completion's tokens, reasoning included.

    overlong: 0 up to `max_length - buffer` tokens, falling to -1 at `max_length` (DAPO, arXiv 2503.14476, equation 13)
    cosine:   1 for no token, falling to 0 at `max_length` as half a cosine (arXiv 2502.03373); with `requires:
              math_answer`, short right answers earn most and wrong ones nothing
    """

    def __init__(self, *, max_length: int, shape: str = "overlong", buffer: int | None = None) -> None:
        if shape not in SHAPES:
            raise InputError(f"length: shape must be one of {', '.join(SHAPES)}, not {shape!r}")
        for key, value in (("max_length", max_length), ("buffer", buffer)):
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not is_number or value < 1):
                raise InputError(f"length: {key} must be a whole number of tokens above 0, not {value!r}")
        if (shape == "overlong") != (buffer is not None):
            raise InputError("length: buffer goes with shape overlong, which needs it, and with no other")
        if buffer is not None and buffer > max_length:
            raise InputError(f"length: buffer ({buffer}) must not exceed max_length ({max_length})")
        self._max_length, self._shape, self._buffer = max_length, shape, buffer

    def __call__(
        self, completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        return [self._value(len(ids)) for ids in completion_ids]

    def _value(self, length: int) -> float:
        if self._buffer is not None:
            return -min(max(length - (self._max_length - self._buffer), 0) / self._buffer, 1.0)
        return 0.5 * (1 + math.cos(math.pi * min(length / self._max_length, 1.0)))


def repetition(completion: ParsedCompletion, *, ngram: int = 4) -> float:
    """Minus the share of the completion's n-grams of words that were there before: 0 for none, near -1 for a loop.

    Thought and answer count together (arXiv 2502.03373, its repetition penalty). Fewer words than `ngram` give 0.
    """
    words = WORD.findall(f"{completion.reasoning or ''} {completion.answer}".casefold())
    grams = [tuple(words[at : at + ngram]) for at in range(len(words) - ngram + 1)]
    return -(1 - len(set(grams)) / len(grams)) if grams else 0.0


class Language:
    """1.0 where both the thought and the answer are in `language`, else 0.0; None where neither has enough words.

    language:         ISO 639-1 code
    max_other_script: share of letters that may be of another script than Latin (Greek ones are mathematics). For a
                      language that is not written in Latin letters, set it to 1.
    """

    def __init__(self, *, language: str = "en", max_other_script: float = 0.02) -> None:
        if not re.fullmatch("[a-z]{2}", str(language)):
            raise InputError(f"language: language must be a code of two letters such as en, not {language!r}")
        self._language, self._max_other_script = language, max_other_script

    def setup(self) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE)

    def __call__(self, completion: ParsedCompletion) -> float | None:
        judged = [self._is_in_language(text) for text in (completion.reasoning or "", completion.answer)]
        told = [verdict for verdict in judged if verdict is not None]
        return float(all(told)) if told else None

    def _is_in_language(self, text: str) -> bool | None:
        prose = NOT_PROSE.sub(" ", text)
        letters = [character for character in prose if character.isalpha()]
        other = sum(not unicodedata.name(letter, "").startswith(("LATIN", "GREEK")) for letter in letters)
        if other > self._max_other_script * len(letters):
            return False
        if len(letters) < MIN_LETTERS:
            return None
        words = " ".join(re.findall(r"[^\W\d_]+", prose))
        return bool(self._identifier.classify(words)[0] == self._language)
