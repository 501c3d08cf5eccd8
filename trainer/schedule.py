"""Learning-rate schedules: transformers', with a warm-up that does not begin at 0.

Upstream's first update of a warm-up has a learning rate of 0: a whole step of rollouts, or a batch, moves no weight.
"""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler


def make_schedule(
    name: str, optimizer: Optimizer, *, warmup_steps: int, max_steps: int, options: dict[str, Any] | None = None
) -> LRScheduler:
    """Make the schedule `name` of `transformers.get_scheduler`, whose update n of a warm-up has n / (warmup_steps + 1).

    options: further keywords of the schedule, such as `num_cycles`
    """
    upstream = get_scheduler(name, optimizer, warmup_steps, max_steps, options)
    if not isinstance(upstream, LambdaLR) or name == "constant":
        return upstream

    def with_warmup(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: (step + 1) / (warmup_steps + 1) if step < warmup_steps else factor(step)

    return LambdaLR(optimizer, [with_warmup(factor) for factor in upstream.lr_lambdas])
