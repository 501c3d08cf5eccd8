"""Gradient clipping at a fixed norm, or at what has been usual lately."""

import math
from collections import deque
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from trainer.rloo.config import RLOOConfig

# Norms that must be known before their quantile says what is usual.
FIRST_NORMS = 10


class GradientClipper:
    """Scales the gradient down to min(max_grad_norm, quantile of the norms of the last updates before clipping).

    Updates without a gradient, whose groups all lacked variance, and norms that are not finite are left out of those.
    Reka Flash 3.1 was trained with "gradient clipping informed by effective gradient norms"; the quantile is our
    reading of it. Its norms are part of a checkpoint.
    """

    def __init__(self, config: RLOOConfig) -> None:
        self._max_norm = config.max_grad_norm
        self._quantile = config.grad_norm_quantile
        self._norms: deque[float] = deque(maxlen=config.grad_norm_window)
        self._last_norm, self._last_limit = 0.0, config.max_grad_norm

    def clip(self, accelerator: Accelerator, model: torch.nn.Module) -> None:
        """Clip the gradient that lies on the model, and remember its norm."""
        self._last_limit = self._max_norm
        if self._quantile is not None and len(self._norms) >= min(FIRST_NORMS, self._norms.maxlen or FIRST_NORMS):
            self._last_limit = min(self._max_norm, float(np.quantile(self._norms, self._quantile)))
        self._last_norm = float(accelerator.clip_grad_norm_(model.parameters(), self._last_limit))
        if 0 < self._last_norm < math.inf:
            self._norms.append(self._last_norm)

    def metrics(self) -> dict[str, float]:
        """Norm of the last update's gradient before clipping, and the norm that it was clipped to."""
        return {"grad_norm": self._last_norm, "grad_norm_limit": self._last_limit}

    def state_dict(self) -> dict[str, Any]:
        """What the next update depends on; Accelerate saves it."""
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint was."""
        self._norms.extend(state["norms"])
