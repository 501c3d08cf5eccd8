"""Learning-rate schedules of all stages: transformers' ones, but no update has a rate of 0."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from accelerate.scheduler import AcceleratedScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

logger = logging.getLogger(__name__)


def make_schedule(
    name: str,
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    max_steps: int,
    options: Mapping[str, Any] | None = None,
) -> LRScheduler:
    """Make the schedule `name` of `transformers.get_scheduler`.

    Upstream's warm-up begins at 0: update s of w, counted from 0, has the fraction s / w of the peak, so the first one
    moves nothing and its completions are wasted. Here it has (s + 1) / (w + 1). The rest of the schedule is upstream's,
    and so is a schedule without warm-up.

    options: lr_scheduler_kwargs of transformers' TrainingArguments
    """
    if not warmup_steps:
        return get_scheduler(name, optimizer, 0, max_steps, dict(options or {}))
    schedule = get_scheduler(name, optimizer, warmup_steps + 1, max_steps + 1, dict(options or {}))
    if not isinstance(schedule, LambdaLR):  # one that follows a metric has no warm-up
        return schedule
    return LambdaLR(optimizer, [_one_later(factor) for factor in schedule.lr_lambdas])


def follow_new_length(scheduler: LRScheduler | AcceleratedScheduler, max_steps: int) -> None:
    """Set the next step's rate to that of the schedule of `max_steps` steps; log it if the restored rate is another.

    A restored schedule keeps the checkpoint's rate for one step, which is 0 where a shorter schedule ended.
    """
    schedule = scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler
    if not isinstance(schedule, LambdaLR):  # such as reduce_lr_on_plateau, which has no length
        return
    restored, step = schedule.get_last_lr(), schedule.last_epoch
    rates = [rate * factor(step) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    if rates == restored:
        return
    schedule.last_epoch -= 1
    schedule.step()
    logger.info(
        "the learning rate follows the schedule of %d steps: step %d has %.4g; the checkpoint's schedule had %.4g",
        max_steps,
        step + 1,
        rates[0],
        restored[0],
    )


def _one_later(factor: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: factor(step + 1)
