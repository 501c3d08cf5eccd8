"""A row of a data set: one conversation, the columns for its rewards, and its origin."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rekatrain.data.chat import Message, answers_only


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation of a data set.

    messages: the turns, checked by `check_messages`; a last assistant turn is the reference response
    rejected: in a preference row, the same conversation with a worse last turn, checked too
    columns:  JSON values that reward functions receive by name (`answer`, ...)
    where:    origin of the row, such as "train.jsonl:17", for error messages
    """

    messages: list[Message]
    rejected: list[Message] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def prompt(self) -> list[Message]:
        """Turns before the completion: all but a last assistant turn, with the reasoning of earlier turns removed."""
        is_answered = self.messages[-1]["role"] == "assistant"
        return answers_only(self.messages[:-1] if is_answered else self.messages)
