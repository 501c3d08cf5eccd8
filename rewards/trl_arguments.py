"""Arguments of a batch function as TRL's trainers pass them (RLOOTrainer and GRPOTrainer, `_calculate_rewards`).

TRL passes completions as messages where the data set's prompts are messages, and as text otherwise. Here every prompt
is a conversation, so the function decides: its key `conversational`, else the annotation of `completions`, else its
first call: a function that fails on text because it indexes messages gets messages from then on.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

from rekatrain.data.chat import END_OF_TEXT, STOP, parse_prompt
from rekatrain.data.errors import InputError
from rekatrain.rewards.outcome import MAX_NOTES, Outcome, check_metric, limit_notes, to_json

# Raised by a function that takes text for a list of messages: `completion[0]["content"]`, `message.get("content")`.
WRONG_FORM = (TypeError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True)
class Reports:
    """The metrics and the columns that one call of a function reports through `log_metric` and `log_extra`."""

    metrics: dict[str, list[float]] = field(default_factory=partial(defaultdict, list))
    extra: dict[str, list[Any]] = field(default_factory=partial(defaultdict, list))

    def log_metric(self, name: str, value: float) -> None:
        """Report a number for this batch; several calls with one name are averaged."""
        self.metrics[name].append(check_metric(name, value))

    def log_extra(self, column: str, values: list[Any]) -> None:
        """Report a column with one value per completion."""
        self.extra[column].extend(values)

    def add_to(self, name: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Add the reports to the outcomes of a batch: a metric to each, a column's values one by one."""
        for column, values in self.extra.items():
            if len(values) != len(outcomes):
                raise InputError(
                    f"reward {name}: log_extra({column!r}, ...) got {len(values)} values; expected "
                    f"{len(outcomes)}, one per completion"
                )
        metrics = {metric: fmean(values) for metric, values in self.metrics.items()}
        return [
            replace(outcome, metrics={**metrics, **outcome.metrics}, notes=self._notes(outcome.notes, index))
            for index, outcome in enumerate(outcomes)
        ]

    def _notes(self, notes: Any, index: int) -> Any:
        if not self.extra:
            return notes
        own = {column: to_json(values[index]) for column, values in self.extra.items()}
        if isinstance(notes, Mapping):
            return limit_notes({**notes, **own}, MAX_NOTES)
        return limit_notes(own if notes is None else {"notes": notes, **own}, MAX_NOTES)


def messages_of(arguments: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """Return the prompts and the completions of a batch's arguments as lists of messages."""
    return {
        "prompts": [parse_prompt(prompt) for prompt in arguments["prompts"]],
        "completions": [[as_message(text)] for text in arguments["completions"]],
    }


def as_message(completion: str) -> dict[str, str]:
    """Return a completion as a message: its text with the reasoning, without what ends the turn.

    >>> as_message(" <reasoning>\\nSum.\\n</reasoning>\\n\\n4 <sep>")["content"]
    '<reasoning>\\nSum.\\n</reasoning>\\n\\n4'
    """
    content = completion.partition(STOP)[0].removesuffix(END_OF_TEXT)
    return {"role": "assistant", "content": content.strip()}


def read_form(function: Callable[..., Any]) -> bool | None:
    """Return True for a function whose `completions` are annotated as messages, False for text, None if unknown."""
    called = function if inspect.isroutine(function) or isinstance(function, type) else getattr(function, "__call__")  # noqa: B004, B009
    parameter = inspect.signature(getattr(function, "func", called)).parameters.get("completions")
    if parameter is None or parameter.annotation is parameter.empty:
        return None
    annotation = str(parameter.annotation).replace("typing.", "").replace("collections.abc.", "")
    annotation = annotation.strip("'").lower()
    if any(word in annotation for word in ("dict", "mapping", "message", "list[list")):
        return True
    return False if annotation in ("list[str]", "sequence[str]", "iterable[str]") else None
