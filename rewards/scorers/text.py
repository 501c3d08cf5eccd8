"""Scorers of the form of a completion: its format, its length, its repetitions and its language."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import FiniteFloat

from rekatrain.data.chat import REASONING_CLOSE, REASONING_OPEN, FinishReason, ParsedCompletion
from rekatrain.data.errors import InputError

# The languages of py3langid that have a code of two letters; its model takes a second to load.
LANGUAGES = (
    "af am an ar as az ba be bg bn br bs ca cs cy da de dz el en eo es et eu fa fi fo fr fy ga gd gl gu ha he hi hr ht "
    "hu hy id ig is it ja jv ka kk km kn ko ku ky la lb lg ln lo lt lv mg mk ml mn mr ms mt my ne nl nn no oc om or pa "
    "pl ps pt qu ro ru rw sa se si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz vi vo wa xh yo zh zu"
)
WORD = re.compile(r"\w+")
# Mathematics and code say nothing about the language around them.
NOT_PROSE = re.compile(r"```|\$\$|\$[^$\n]*\$|\\\(|\\\[|\\[A-Za-z]+|`[^`\n]*`|https?://\S+")
CLOSING = {"```": "```", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
MIN_LETTERS = 20  # the language of a shorter text cannot be recognized


def reasoning_format(completion: ParsedCompletion) -> float:
    """Return 1.0 for a closed, non-empty reasoning block followed by a non-empty answer, else 0.0.

    A further reasoning tag in the reasoning or the answer, or a completion that was cut off, scores 0.0.
    """
    texts = [completion.reasoning or "", completion.answer]
    has_stray_tag = any(tag in text for text in texts for tag in (REASONING_OPEN, REASONING_CLOSE))
    return float(all(texts) and not has_stray_tag and completion.finish_reason is not FinishReason.LENGTH)


def overlong_penalty(length: int, *, max_length: int, buffer: int) -> float:
    """Return 0 up to `max_length - buffer` tokens, then a value that falls in a line to -1 at `max_length` tokens.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).

    >>> overlong_penalty(90, max_length=100, buffer=20)
    -0.5
    """
    return -min(max(length - (max_length - buffer), 0) / buffer, 1.0)


class Length:
    """A function of the number of tokens of a completion, reasoning included.

    overlong: see `overlong_penalty`
    cosine:   1 for no token, falling to 0 at `max_length` as half a cosine (arXiv 2502.03373); with `requires:
              math_answer`, short right answers score highest and wrong ones 0
    """

    def __init__(
        self,
        *,
        max_length: Annotated[int, Ge(1)],
        shape: Literal["overlong", "cosine"] = "overlong",
        buffer: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        if shape == "overlong" and buffer is None:
            raise InputError("buffer is missing: shape overlong needs the number of tokens over which it falls to -1")
        if shape != "overlong" and buffer is not None:
            raise InputError(f"buffer is {buffer}, but shape {shape} has none: take it out")
        if buffer is not None and buffer > max_length:
            raise InputError(f"buffer is {buffer}; it should be at most max_length ({max_length})")
        self._max_length, self._buffer = max_length, buffer

    def __call__(
        self, completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        return [self._value(len(ids)) for ids in completion_ids]

    def _value(self, length: int) -> float:
        if self._buffer is not None:
            return overlong_penalty(length, max_length=self._max_length, buffer=self._buffer)
        return 0.5 * (1 + math.cos(math.pi * min(length / self._max_length, 1.0)))


def repetition(completion: ParsedCompletion, *, ngram: Annotated[int, Ge(1)] = 4) -> float:
    """Return minus the fraction of the n-grams of words that occurred before: 0 for none, near -1 for a loop.

    Reasoning and answer count together (arXiv 2502.03373, its repetition penalty). Fewer words than `ngram` give 0.
    """
    words = WORD.findall(f"{completion.reasoning or ''} {completion.answer}".casefold())
    grams = [tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]
    return -(1 - len(set(grams)) / len(grams)) if grams else 0.0


def read_prose(text: str) -> str:
    """Return the text without its code, formulas and addresses."""
    kept, position, unclosed = [], 0, set()
    while match := NOT_PROSE.search(text, position):
        kept.append(text[position : match.start()])
        position = match.end()
        closing = CLOSING.get(match.group())
        if closing is not None and closing not in unclosed:
            end = text.find(closing, position)
            if end >= 0:
                position = end + len(closing)
            else:
                unclosed.add(closing)
    return " ".join([*kept, text[position:]])


class Language:
    """1.0 if both the reasoning and the answer are in `language`, else 0.0; None if neither has enough words.

    language:         ISO 639-1 code
    max_other_script: largest fraction of letters of another script than Latin (Greek ones are mathematics). For a
                      language that is not written in Latin letters, set it to 1.
    """

    def __init__(self, *, language: str = "en", max_other_script: Annotated[FiniteFloat, Ge(0), Le(1)] = 0.02) -> None:
        if language not in LANGUAGES.split():
            raise InputError(
                f"language is {language!r}; it should be one of the codes that py3langid knows: {LANGUAGES}"
            )
        self._language, self._max_other_script = language, max_other_script

    def setup(self) -> None:
        """Load the language identifier."""
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE)

    def __call__(self, completion: ParsedCompletion) -> float | None:
        verdicts = [self._is_in_language(text) for text in (completion.reasoning or "", completion.answer)]
        known = [verdict for verdict in verdicts if verdict is not None]
        return float(all(known)) if known else None

    def _is_in_language(self, text: str) -> bool | None:
        """Return None for a text that is too short to have a recognizable language."""
        prose = read_prose(text)
        letters = [character for character in prose if character.isalpha()]
        other = sum(not unicodedata.name(letter, "").startswith(("LATIN", "GREEK")) for letter in letters)
        if other > self._max_other_script * len(letters):
            return False
        if len(letters) < MIN_LETTERS:
            return None
        words = " ".join(re.findall(r"[^\W\d_]+", prose))
        return bool(self._identifier.classify(words)[0] == self._language)
