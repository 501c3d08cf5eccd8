"""Progress of a run, and the weight of a reward that depends on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run: `step` updates have been made, of `max_steps`."""

    step: int = 0
    max_steps: int = 0


@dataclass(frozen=True)
class Schedule:
    """A weight by the number of steps taken: linear between the points, constant before the first and after the last.

    points: (step, weight), in the order of the steps

    >>> Schedule.read([[0, 1.0], [100, 0.5]]).at(50)
    0.75
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def read(cls, weight: float | Sequence[Sequence[float]]) -> "Schedule":
        """Return the schedule of a recipe's `weight`: a number, or pairs of a step and a weight."""
        pairs = [(0, weight)] if isinstance(weight, int | float) else weight
        return cls(tuple((int(step), float(value)) for step, value in pairs))

    @property
    def is_increasing(self) -> bool:
        """True if the steps are in order, each once."""
        return all(first < second for (first, _), (second, _) in pairwise(self.points))

    @property
    def is_zero(self) -> bool:
        """True if the weight is 0 at every step."""
        return not any(weight for _, weight in self.points)

    @property
    def is_constant(self) -> bool:
        """True if the weight is the same at every step."""
        return len({weight for _, weight in self.points}) == 1

    def at(self, step: int) -> float:
        """Return the weight after `step` steps."""
        if step <= self.points[0][0]:
            return self.points[0][1]
        for (start, first), (end, last) in pairwise(self.points):
            if step < end:
                return first + (last - first) * (step - start) / (end - start)
        return self.points[-1][1]
