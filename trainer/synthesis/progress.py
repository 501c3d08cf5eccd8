"""Progress of a synthesis: counts, speed, the time left, tokens and their cost."""

import logging
import time
from dataclasses import dataclass

from rekatrain.trainer.synthesis.config import ServerConfig
from rekatrain.trainer.synthesis.journal import Answer

logger = logging.getLogger(__name__)

SECONDS_BETWEEN = 10.0
MILLION = 1e6


@dataclass(kw_only=True)
class Progress:
    """Counts of the completions that are written, including those of earlier starts.

    num_wanted: completions of all prompts
    num_before: completions that an earlier start wrote
    """

    num_wanted: int
    server: ServerConfig | None = None
    num_done: int = 0
    num_before: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        self._started = self._shown = time.monotonic()

    def count(self, answer: Answer, *, is_earlier: bool = False) -> None:
        """Count a completion."""
        self.num_done += 1
        self.num_before += is_earlier
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens

    @property
    def cost(self) -> float | None:
        """Price of all tokens; None where the recipe names no prices."""
        if self.server is None or self.server.prompt_price is None or self.server.completion_price is None:
            return None
        prompts = self.prompt_tokens * self.server.prompt_price
        return (prompts + self.completion_tokens * self.server.completion_price) / MILLION

    def describe(self) -> str:
        """Return one line with everything counted so far."""
        seconds = time.monotonic() - self._started
        num_new = self.num_done - self.num_before
        parts = [f"{self.num_done} of {self.num_wanted} completions"]
        if num_new and seconds:
            parts.append(f"{num_new / seconds:.1f} per second")
            if self.num_done < self.num_wanted:
                parts.append(f"{_duration((self.num_wanted - self.num_done) * seconds / num_new)} left")
        parts.append(f"{self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} completion tokens")
        if self.cost is not None:
            parts.append(f"cost {self.cost:.4g}")
        return "; ".join(parts)

    def show(self, *, is_last: bool = False) -> None:
        """Log the line, at most every ten seconds."""
        now = time.monotonic()
        if is_last or now - self._shown >= SECONDS_BETWEEN:
            self._shown = now
            logger.info("%s", self.describe())


def _duration(seconds: float) -> str:
    """Return a duration as text.

    >>> _duration(3725)
    '1 h 02 min'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
