"""A row of a data set: one conversation, the columns for its rewards, and its origin."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rekatrain.data.chat import EncodedRow, Message, answers_only
from rekatrain.data.errors import InputError

BadRows = Literal["refuse", "skip"]
LongRows = Literal["refuse", "skip", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data set of a row, as far as it matters after the row is read.

    name:      name in metrics and messages
    bad_rows:  "refuse" ends the run at a row that cannot be trained; "skip" leaves it out
    long_rows: the same for a row that is too long; "truncate" cuts it after the last trained turn that fits
    weight:    share of the rows in a mixture; None if the recipe names none
    rewards:   names of the rewards that judge its rows; None means all
    columns:   names of the columns that its rows have
    """

    name: str = ""
    bad_rows: BadRows = "refuse"
    long_rows: LongRows = "refuse"
    weight: float | None = None
    rewards: tuple[str, ...] | None = None
    columns: set[str] = field(default_factory=set, compare=False)

    def is_judged_by(self, reward: str) -> bool:
        """Return True if the reward judges the rows of this source."""
        return self.rewards is None or reward in self.rewards


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation of a data set.

    messages: the turns, checked by `check_messages`; a last assistant turn is the reference response
    trains:   for each message, True if SFT may train it; None: it may train each assistant turn
    rejected: in a preference row, the same conversation with a worse last turn, checked too
    tokens:   in a row of token ids, the ids and labels; it has no messages, and stage sft alone can use it
    columns:  JSON values that reward functions receive by name (`answer`, ...)
    source:   the data set that the row comes from
    where:    origin of the row, such as "train.jsonl:17", for error messages
    """

    messages: list[Message]
    trains: Sequence[bool] | None = None
    rejected: list[Message] | None = None
    tokens: EncodedRow | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    source: Source = Source()
    where: str = ""

    @property
    def prompt(self) -> list[Message]:
        """Turns before the completion: all but a last assistant turn, with the reasoning of earlier turns removed."""
        if not self.messages:
            raise InputError(f"{self.where}: a row of token ids has no prompt: only stage sft can use it")
        is_answered = self.messages[-1]["role"] == "assistant"
        return answers_only(self.messages[:-1] if is_answered else self.messages)
