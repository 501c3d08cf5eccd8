"""Forms of judging: the conversations that a judge gets about one answer, and the reading of its replies.

RubricForm:   a score on a scale, as one JSON object
PairwiseForm: the better of the answer and a reference, in both orders
TemplateForm: the user's own prompt and a pattern for the verdict, such as those of a generative reward model
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rekatrain.data.chat import Message
from rekatrain.data.errors import InputError
from rekatrain.data.reward_model_input import break_markup
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.judge_prompt import (
    pairwise_messages,
    pairwise_schema,
    read_score,
    read_winner,
    rubric_messages,
    rubric_schema,
    scale_score,
)
from rekatrain.rewards.models.judge_thoughts import without_thoughts

FIELD = re.compile(r"\{(question|answer|answer_a|answer_b|reference)\}")
# Names of the winner in published templates, such as [[A]] and [[C]] of MT-Bench (arXiv 2306.05685).
WINNER_NAMES = {"a": "A", "b": "B", "c": "tie", "tie": "tie", "1": "A", "2": "B"}


class Form(Protocol):
    """A form of judging."""

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The JSON schema of a reply, if it has one."""

    def conversations(self, question: str, answer: str, reference: str | None) -> list[list[Message]]:
        """Return the conversations about one answer."""

    def read(self, reply: str) -> Any:
        """Return the verdict of one reply; raise RewardError if there is none."""

    def combine(self, verdicts: Sequence[Any]) -> float:
        """Return the reward, from 0 to 1, from the verdicts of all conversations."""


class RubricForm:
    """A score from `low` to `high` on a rubric; with `thoughts`, free text may come before it."""

    def __init__(self, rubric: str, *, low: float, high: float, thoughts: bool) -> None:
        self._rubric, self._low, self._high, self._thoughts = rubric, low, high, thoughts
        self.schema = None if thoughts else rubric_schema(low, high)

    def conversations(self, question: str, answer: str, reference: str | None) -> list[list[Message]]:
        """Return one conversation."""
        scale = {"low": self._low, "high": self._high}
        return [
            rubric_messages(rubric=self._rubric, question=question, answer=answer, thoughts=self._thoughts, **scale)
        ]

    def read(self, reply: str) -> float:
        """Return the score, scaled to 0 to 1."""
        return read_score(without_thoughts(reply, is_free=self._thoughts), low=self._low, high=self._high)

    def combine(self, verdicts: Sequence[float]) -> float:
        """Return the only verdict."""
        return verdicts[0]


class PairwiseForm:
    """The better one of the answer and the reference, in both orders."""

    def __init__(self, rubric: str, *, thoughts: bool) -> None:
        self._rubric, self._thoughts = rubric, thoughts
        self.schema = None if thoughts else pairwise_schema()

    def conversations(self, question: str, answer: str, reference: str | None) -> list[list[Message]]:
        """Return two conversations: the answer is the first, then the second."""
        assert reference is not None
        return [
            pairwise_messages(rubric=self._rubric, question=question, first=a, second=b, thoughts=self._thoughts)
            for a, b in ((answer, reference), (reference, answer))
        ]

    def read(self, reply: str) -> str:
        """Return A, B or tie."""
        return read_winner(without_thoughts(reply, is_free=self._thoughts))

    def combine(self, verdicts: Sequence[str]) -> float:
        """Return how often the answer wins, where a tie counts half."""
        return wins(verdicts)


class TemplateForm:
    """The user's prompt with the fields {question}, {answer} and {reference}, and a pattern whose group is the verdict.

    A template with {answer_a} and {answer_b} compares the answer with the reference, in both orders.
    """

    schema = None

    def __init__(
        self, template: str, verdict: str, *, scores: Mapping[str, float] | None, low: float, high: float
    ) -> None:
        fields = set(FIELD.findall(template))
        self.is_pairwise = {"answer_a", "answer_b"} <= fields
        if not self.is_pairwise and "answer" not in fields:
            raise InputError("template has no field {answer}, and not both {answer_a} and {answer_b}: add it")
        try:
            self._verdict = re.compile(verdict)
        except re.error as error:
            raise InputError(f"verdict {verdict!r} is not a regular expression: {error}") from error
        if self._verdict.groups != 1:
            raise InputError(f"verdict {verdict!r} has {self._verdict.groups} groups; put the verdict into one (...)")
        self.needs_reference = self.is_pairwise or "reference" in fields
        self._template, self._low, self._high = template, low, high
        self._scores = None if scores is None else {name.casefold(): score for name, score in scores.items()}

    def conversations(self, question: str, answer: str, reference: str | None) -> list[list[Message]]:
        """Return one conversation, or two for a comparison."""
        texts = {"question": question, "answer": answer, "reference": reference or ""}
        if not self.is_pairwise:
            return [self._render(texts)]
        pairs = ((answer, reference or ""), (reference or "", answer))
        return [self._render({**texts, "answer_a": a, "answer_b": b}) for a, b in pairs]

    def _render(self, texts: Mapping[str, str]) -> list[Message]:
        content = FIELD.sub(lambda field: break_markup(texts[field[1]]), self._template)
        return [{"role": "user", "content": content}]

    def read(self, reply: str) -> float | str:
        """Return the verdict of the last match of the pattern."""
        verdicts = self._verdict.findall(without_thoughts(reply))
        if not verdicts:
            raise RewardError(f"the judge's reply holds no verdict ({self._verdict.pattern}): {reply[-120:]!r}")
        text = verdicts[-1].strip()
        if self.is_pairwise:
            if text.casefold() not in WINNER_NAMES:
                raise RewardError(f"the judge's winner {text!r} is not one of {', '.join(WINNER_NAMES)}")
            return WINNER_NAMES[text.casefold()]
        if self._scores is not None:
            if text.casefold() not in self._scores:
                raise RewardError(f"the judge's verdict {text!r} is not one of {', '.join(self._scores)}")
            return self._scores[text.casefold()]
        try:
            score = float(text)
        except ValueError:
            raise RewardError(f"the judge's verdict {text!r} is no number") from None
        return scale_score(score, low=self._low, high=self._high)

    def combine(self, verdicts: Sequence[Any]) -> float:
        """Return the only verdict, or how often the answer wins."""
        return wins(verdicts) if self.is_pairwise else float(verdicts[0])


def wins(verdicts: Sequence[str]) -> float:
    """Return how often the answer wins that was A, then B: 1, 0.5 or 0 each.

    Judges prefer the first or the second answer as such; both orders together cancel it (arXiv 2306.05685).
    """
    as_first, as_second = verdicts
    return ({"A": 1.0, "tie": 0.5, "B": 0.0}[as_first] + {"B": 1.0, "tie": 0.5, "A": 0.0}[as_second]) / 2
