"""The best checkpoint of a run by a metric of its evaluations, and when a run stops because nothing gets better.

`metric_for_best_model`, `greater_is_better` and `early_stopping_patience` have transformers' meaning, but a checkpoint
is saved at each new best, whatever `save_steps` says, and it stays until there is a better one. Its name is a link:

    checkpoints/best -> checkpoint-N
"""

import json
import logging
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.run.checkpoints import STATE_FILE, checkpoint_step, find_fault, numbered_checkpoints

logger = logging.getLogger(__name__)

# In each checkpoint of a run with `metric_for_best_model`: the state of BestModel.
BEST_FILE = "best_model.json"
BEST = "best"
KEYS = ("metric_for_best_model", "greater_is_better", "early_stopping_patience")


@dataclass(kw_only=True)
class BestModel:
    """The best evaluation so far.

    metric:            name of a metric of an evaluation, in full or without `eval/` or `eval_`; None: there is no best
    greater_is_better: None: True, except for a metric whose name ends in `loss`
    patience:          number of evaluations without a better one after which the run stops; None: it goes on
    value, step:       of the best evaluation; None before the first one
    num_worse:         evaluations since the best one
    """

    metric: str | None
    greater_is_better: bool | None = None
    patience: int | None = None
    value: float | None = None
    step: int | None = None
    num_worse: int = 0

    @property
    def is_exhausted(self) -> bool:
        """True if as many evaluations as the patience allows were no better."""
        return self.patience is not None and self.num_worse >= self.patience

    def update(self, step: int, metrics: Mapping[str, float | None]) -> bool:
        """Take an evaluation into account -> True if it is the best so far; one without the metric is left out."""
        value = next((metrics[name] for name in self.names if metrics.get(name) is not None), None)
        if value is None:
            return False
        is_greater_better = self.greater_is_better
        if is_greater_better is None:
            is_greater_better = not str(self.metric).endswith("loss")
        if self.value is None or (value > self.value if is_greater_better else value < self.value):
            self.value, self.step, self.num_worse = value, step, 0
            return True
        self.num_worse += 1
        if self.is_exhausted:
            logger.info(
                "stopped early after step %d: %d evaluations were no better than %s %.4g of step %d",
                step,
                self.num_worse,
                self.metric,
                self.value,
                self.step,
            )
        return False

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the metric may have in the log."""
        return () if self.metric is None else (self.metric, f"eval/{self.metric}", f"eval_{self.metric}")

    def check_metric(self, key: str, known: Collection[str]) -> None:
        """Raise InputError if no evaluation of the run has the metric."""
        if self.metric is not None and not {*self.names} & {*known}:
            raise InputError(f"{key} is {self.metric!r}, which no evaluation of this run has: {', '.join(known)}")

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint that is being written, if the run has a metric."""
        if self.metric is not None:
            (checkpoint / BEST_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def restore(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint's state; another metric, or another direction, starts anew."""
        if checkpoint is None or not (checkpoint / BEST_FILE).exists():
            return
        state = json.loads((checkpoint / BEST_FILE).read_text(encoding="utf-8"))
        if state["metric"] == self.metric and state["greater_is_better"] == self.greater_is_better:
            self.value, self.step, self.num_worse = state["value"], state["step"], state["num_worse"]


def check_best(name: str, section: Mapping[str, Any], *, evaluates: bool, key: str) -> None:
    """Raise InputError for `metric_for_best_model` without evaluations, and for what needs it."""
    if section.get("metric_for_best_model") is None:
        for other in ("greater_is_better", "early_stopping_patience"):
            if section.get(other) is not None:
                raise InputError(f"{name}.{other} needs {name}.metric_for_best_model: name a metric, or remove {other}")
    elif not evaluates:
        raise InputError(f"{name}.metric_for_best_model needs evaluations while the run trains: set {key}")


def best_step(checkpoint: Path) -> int | None:
    """Return the step of the best checkpoint so far, if the checkpoint names one."""
    for name, key in ((BEST_FILE, "step"), (STATE_FILE, "best_model_checkpoint")):
        if (checkpoint / name).exists():
            best = json.loads((checkpoint / name).read_text(encoding="utf-8")).get(key)
            if best is not None:
                return best if isinstance(best, int) else checkpoint_step(Path(best))
    return None


def link_best(checkpoints: Path, step: int | None) -> None:
    """Make the link `best`, or remove it if there is no best checkpoint; a file of the user with that name stays."""
    link = checkpoints / BEST
    if os.path.lexists(link) and not link.is_symlink():
        return
    if step is None or not (checkpoints / f"checkpoint-{step}").is_dir():
        link.unlink(missing_ok=True)
        return
    partial = checkpoints / f".{BEST}.rekatrain-partial"
    partial.unlink(missing_ok=True)
    with suppress(OSError):  # a file system without links: `--checkpoint best` works there, too
        partial.symlink_to(f"checkpoint-{step}")
        partial.replace(link)


def resolve_checkpoint(run: Path, name: str) -> Path:
    """Return a checkpoint of a run folder by its name: `best`, a step, or `checkpoint-N`; InputError if it has none."""
    checkpoints = numbered_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise InputError(f"--checkpoint {name}: {str(run)!r} has no checkpoints: give the folder of a run")
    step = best_step(_newest_whole(checkpoints)) if name == BEST else name.removeprefix("checkpoint-")
    if step is None:
        raise InputError(
            f"--checkpoint best: the run {str(run)!r} has no best checkpoint: it was trained without "
            "metric_for_best_model, or has not been evaluated yet"
        )
    found = next((path for path in checkpoints if path.name == f"checkpoint-{step}"), None)
    if found is None:
        raise InputError(
            f"--checkpoint {name or repr(name)}: the run {str(run)!r} has none of step {step or repr(step)}; it has "
            + ", ".join(path.name for path in checkpoints)
        )
    return found


def _newest_whole(checkpoints: list[Path]) -> Path:
    """Return the newest checkpoint whose record of the best one is that of its manifest, or else the newest."""

    def is_whole(checkpoint: Path) -> bool:
        return find_fault(checkpoint, is_needed=lambda name: name in (BEST_FILE, STATE_FILE)) is None

    return next((path for path in reversed(checkpoints) if is_whole(path)), checkpoints[-1])
