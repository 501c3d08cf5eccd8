"""Gradient clipping at a fixed norm, or at what has been usual lately."""

import math
from collections import deque
from typing import Any

import numpy as np
from rekatrain.trainer.rloo.config import RLOOConfig

# Norms that must be known before their quantile says what is usual.
FIRST_NORMS = 10


class GradientClipper:
    """The norm to scale a gradient down to: min(max_grad_norm, quantile of the last updates' norms before clipping).

    Updates without a gradient, whose groups all lacked variance, and norms that are not finite are left out of those.
    Reka Flash 3.1 was trained with "gradient clipping informed by effective gradient norms"; the quantile is our
    reading of it. Its norms are part of a checkpoint.
    """

    def __init__(self, config: RLOOConfig) -> None:
        self._max_norm = config.max_grad_norm
        self._quantile = config.grad_norm_quantile
        self._norms: deque[float] = deque(maxlen=config.grad_norm_window)
        self._last_norm, self._last_limit = 0.0, config.max_grad_norm

    @property
    def limit(self) -> float:
        """The norm that the next update is clipped to."""
        if self._quantile is not None and len(self._norms) >= min(FIRST_NORMS, self._norms.maxlen or FIRST_NORMS):
            return min(self._max_norm, float(np.quantile(self._norms, self._quantile)))
        return self._max_norm

    def remember(self, norm: float) -> None:
        """Take note of an update's norm before clipping."""
        self._last_norm, self._last_limit = norm, self.limit
        if 0 < norm < math.inf:
            self._norms.append(norm)

    def metrics(self) -> dict[str, float]:
        """Norm of the last update's gradient before clipping, and the norm that it was clipped to."""
        return {"grad_norm": self._last_norm, "grad_norm_limit": self._last_limit}

    def state_dict(self) -> dict[str, Any]:
        """What the next update depends on; Accelerate saves it."""
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint was."""
        self._norms.extend(state["norms"])
