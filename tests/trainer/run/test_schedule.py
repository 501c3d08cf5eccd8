"""Learning-rate schedules against transformers': equal but for the warm-up, which does not begin at 0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from rekatrain.trainer.run.schedule import make_schedule

SCHEDULES = [
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("linear", {}),
    ("cosine", {}),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"power": 2.0}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 3}),
]


def rates(make: Callable[[AdamW], LRScheduler], num_steps: int = 10) -> list[float]:
    """Return the learning rate of each update."""
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer)
    result = []
    for _ in range(num_steps):
        result.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == result[-1:]
        optimizer.step()
        schedule.step()
    return result


@pytest.mark.parametrize(("name", "options"), SCHEDULES)
def test_schedule_is_upstreams_but_for_the_warm_up(name: str, options: dict[str, Any]) -> None:
    for warmup in (0, 1, 4):
        ours = rates(
            lambda optimizer, n=warmup: make_schedule(name, optimizer, warmup_steps=n, max_steps=10, options=options)
        )
        theirs = rates(lambda optimizer, n=warmup: get_scheduler(name, optimizer, n, 10, options))
        if name == "constant":
            assert ours == theirs
            continue
        assert ours[warmup:] == pytest.approx(theirs[warmup:])
        assert ours[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)])
        assert min(ours) > 0


def test_schedule_continues_from_its_state() -> None:
    def resumed(optimizer: AdamW) -> LRScheduler:
        earlier = AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        first = make_schedule("cosine", earlier, warmup_steps=3, max_steps=10)
        for _ in range(4):
            earlier.step()
            first.step()
        schedule = make_schedule("cosine", optimizer, warmup_steps=3, max_steps=10)
        optimizer.load_state_dict(earlier.state_dict())
        schedule.load_state_dict(first.state_dict())
        return schedule

    whole = rates(lambda optimizer: make_schedule("cosine", optimizer, warmup_steps=3, max_steps=10))
    assert rates(resumed, 6) == whole[4:]
