"""The reward `instruction_following`: the 25 verifiable instructions of IFEval (arXiv 2311.07911).

Each is a check of the answer's text, as in the strict mode of the published checkers, with two differences: sentences
and words in capitals are found by the rules below instead of nltk's models, and the language by py3langid instead of
langdetect.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from rekatrain.data.chat import ParsedCompletion
from rekatrain.data.errors import InputError

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda count, threshold: count >= threshold,
    "less than": lambda count, threshold: count < threshold,
}
CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
WORD_WITH_MARKS = re.compile(r"[^\W_][\w'’.-]*")
SENTENCE_END = re.compile(r"(?<![.!?…。！？])[.!?…。！？]+[\"'”’)\]*_]*(?=\s|$)|[。！？]")
ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|cf|Inc|Ltd|Co|approx|fig|(?-i:[A-Z]))|[\n\x02]\s*\d+)\.$",
    re.IGNORECASE,
)
START_OF_TEXT = "\x02"
LONGEST_ABBREVIATION = 40  # characters before a mark, so that a long text costs time in proportion to its length
CLOSING_MARKS = "\"'”’)]*_"


class InstructionFollowing:
    """1.0 if the answer follows all instructions of its row, else 0.0; None if the row has none.

    The columns are IFEval's: `instruction_id_list` names the instructions, `kwargs` has an object of options for each.
    """

    def __init__(self, *, partial_credit: bool = False) -> None:
        """Set the option.

        partial_credit: score the fraction of instructions that are followed, instead of 1.0 for all of them
        """
        self._partial_credit = partial_credit

    def setup(self) -> None:
        """Load the language identifier."""
        _identifier()

    def __call__(
        self,
        completion: ParsedCompletion,
        *,
        instruction_id_list: Sequence[str] | None,
        kwargs: Sequence[Mapping[str, Any] | None] | None,
    ) -> float | None:
        if not instruction_id_list:
            return None
        options = kwargs or [{}] * len(instruction_id_list)
        if len(options) != len(instruction_id_list):
            raise InputError(
                f"the columns instruction_id_list and kwargs have {len(instruction_id_list)} and {len(options)} "
                "entries; each must have one per instruction"
            )
        followed = [
            bool(completion.answer) and is_followed(name, of_instruction or {}, completion.answer)
            for name, of_instruction in zip(instruction_id_list, options, strict=True)
        ]
        return sum(followed) / len(followed) if self._partial_credit else float(all(followed))


def is_followed(instruction: str, options: Mapping[str, Any], text: str) -> bool:
    """Return True if the text follows one instruction, named as in IFEval.

    Raises InputError if the instruction or one of its options is unknown.

    >>> is_followed("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "One, two, three.")
    True
    """
    if instruction not in CHECKS:
        raise InputError(f"there is no instruction {instruction!r}; IFEval has {', '.join(CHECKS)}")
    set_options = {key: value for key, value in options.items() if value is not None}
    try:
        return CHECKS[instruction](text, **set_options)
    except (KeyError, TypeError) as error:
        raise InputError(f"the instruction {instruction} cannot have the options {set_options}: {error}") from error


@cache
def _identifier() -> Any:  # py3langid is not typed
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def _language(text: str) -> str:
    return str(_identifier().classify(text)[0])


def _is_language(text: str, language: str) -> bool:
    return _language(text).partition("-")[0] == language.partition("-")[0]


def _has_count(count: int, relation: str, threshold: int) -> bool:
    return RELATIONS[relation](count, threshold)


def _occurrences(text: str, keyword: str) -> int:
    return len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE))


def _has_no_forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def count_sentences(text: str) -> int:
    """Count sentences by their end marks; the mark of an abbreviation, an initial or a list's number ends none."""
    count, start = 0, 0
    end_of_text = len(text.rstrip())
    for mark in SENTENCE_END.finditer(text):
        end = mark.end()
        stop = mark.start() + len(mark.group().rstrip(CLOSING_MARKS))
        before = text[max(start, stop - LONGEST_ABBREVIATION) : stop]
        if stop - start <= LONGEST_ABBREVIATION:
            before = START_OF_TEXT + before
        if not ABBREVIATION.search(before) or end == end_of_text:
            count, start = count + bool(text[start:end].strip()), end
    return count + bool(text[start:].strip())


def _capital_words(text: str) -> int:
    return sum(word.isupper() for word in WORD_WITH_MARKS.findall(text))


def _parts(text: str, divider: str) -> list[str] | None:
    """Return the parts between dividers, without an empty first or last one; None if another one is empty."""
    parts = [part.strip() for part in re.split(divider, text)]
    inner = parts[1:-1]
    return None if "" in inner else [part for part in parts if part]


def _has_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _parts(text, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == num_paragraphs


def _has_two_responses(text: str) -> bool:
    parts = _parts(text, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _nth_paragraph_starts(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = text.split("\n\n")
    num_written = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if num_written != num_paragraphs or nth_paragraph > num_written or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split("[.,?!'\"]", word)[0].lower() == first_word.lower()


def _num_highlights(text: str) -> int:
    single = re.findall(r"\*[^\n*]*\*", text)
    double = re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(section.strip("*").strip()) for section in (*single, *double))


def _num_bullets(text: str) -> int:
    return len(re.findall(r"^[^\S\n]*(?:\*[^*].*|-.*)$", text, re.MULTILINE))


def _num_placeholders(text: str) -> int:
    count = 0
    for line in text.split("\n"):
        start = line.find("[")
        while start >= 0 and (end := line.find("]", start + 1)) >= 0:
            count, start = count + 1, line.find("[", end + 1)
    return count


def _num_sections(text: str, splitter: str) -> int:
    return len(re.findall(rf"{re.escape(splitter.strip())}\s?\d+", text))


def _has_postscript(text: str, marker: str) -> bool:
    return bool(re.search(POSTSCRIPTS.get(marker, re.escape(marker.lower())), text.lower()))


def _is_json(text: str) -> bool:
    body = re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip()
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(text: str) -> bool:
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].strip("<>").strip():
            return True
    return False


def _is_quoted(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


def _ends_with(text: str, phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(phrase.strip().lower())


# Each is called with the text and, by name, with the options of IFEval's data.
CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(_occurrences(text, keyword) for keyword in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation: _has_count(
        _occurrences(text, keyword), relation, frequency
    ),
    "keywords:forbidden_words": _has_no_forbidden,
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _has_count(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": _is_language,
    "length_constraints:number_sentences": lambda text, num_sentences, relation: _has_count(
        count_sentences(text), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": _has_paragraphs,
    "length_constraints:number_words": lambda text, num_words, relation: _has_count(
        len(re.findall(r"\w+", text)), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_starts,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        _num_placeholders(text) >= num_placeholders
    ),
    "detectable_content:postscript": lambda text, postscript_marker: _has_postscript(text, postscript_marker),
    "detectable_format:number_bullet_lists": lambda text, num_bullets: _num_bullets(text) == num_bullets,
    "detectable_format:constrained_response": lambda text: any(choice in text for choice in CHOICES),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        _num_highlights(text) >= num_highlights
    ),
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        _num_sections(text, section_spliter) >= num_sections
    ),
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _has_title,
    "combination:two_responses": _has_two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda text, end_phrase: _ends_with(text, end_phrase),
    "startend:quotation": _is_quoted,
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation: _has_count(
        _capital_words(text), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda text: text.isupper() and _language(text.lower()) == "en",
    "change_case:english_lowercase": lambda text: text.islower() and _language(text) == "en",
    "punctuation:no_comma": lambda text: "," not in text,
}
