"""A row: one conversation with what its rewards need, and where it was read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rekatrain.data.chat import Message, answers_only


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation.

    messages: the turns, checked by `check_messages`; a last assistant turn is the reference response
    rejected: of a preference row, the same conversation with a worse last turn; checked too
    columns:  what reward functions are given by name (`answer`, ...), JSON values
    where:    "train.jsonl:17", for messages about this row
    """

    messages: list[Message]
    rejected: list[Message] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def prompt(self) -> list[Message]:
        """The turns that a completion answers: all but a last assistant turn, earlier ones without their reasoning."""
        is_answered = self.messages[-1]["role"] == "assistant"
        return answers_only(self.messages[:-1] if is_answered else self.messages)
