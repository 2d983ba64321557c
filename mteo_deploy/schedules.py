"""Noise schedules: where along the noise level the evaluations lie.

A schedule is a function of ``u`` in [0, 1] (0 = highest noise), so that a grid of N intervals and the reference
trajectory's grid of N*M intervals come from one curve and the second contains the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import InputError

Schedule = Callable[[NDArray[np.float64], float, float], NDArray[np.float64]]
"""(u, sigma_max, sigma_min) -> sigma(u), strictly decreasing in u."""


def polynomial(u: NDArray[np.float64], sigma_max: float, sigma_min: float, rho: float = 7.0) -> NDArray[np.float64]:
    """Karras et al. 2022 (EDM), eq. 5: equal steps in ``sigma**(1/rho)``."""
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.asarray((top + u * (bottom - top)) ** rho, dtype=np.float64)


def log_uniform(u: NDArray[np.float64], sigma_max: float, sigma_min: float) -> NDArray[np.float64]:
    """Equal steps in log sigma (the logSNR schedule of Lu et al. 2022a)."""
    return np.asarray(sigma_max * (sigma_min / sigma_max) ** u, dtype=np.float64)


SCHEDULES: dict[str, Schedule] = {"polynomial": polynomial, "logsnr": log_uniform}


def grid(schedule: str, intervals: int, sigma_max: float, sigma_min: float) -> NDArray[np.float64]:
    """The ``intervals + 1`` noise levels of a schedule, highest first.

    Raises:
        InputError: for an unknown schedule, a non-positive count or an empty range of noise levels.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"expected a schedule out of {', '.join(SCHEDULES)}; found {schedule!r}")
    if intervals < 1:
        raise InputError(f"expected a step count of 1 or more; found {intervals}; pass for example --steps 4")
    if not 0 < sigma_min < sigma_max:
        raise InputError(f"expected 0 < sigma_min < sigma_max; found sigma_min={sigma_min}, sigma_max={sigma_max}")
    return SCHEDULES[schedule](np.arange(intervals + 1) / intervals, sigma_max, sigma_min)


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels a discrete-time backbone was trained at: ``sigma[t] = sqrt((1 - abar[t]) / abar[t])``.

    Attributes:
        sigma: float64 ``[timesteps]``, increasing.
    """

    sigma: NDArray[np.float64]

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: NDArray[np.floating]) -> NoiseLevels:
        abar = np.asarray(alphas_cumprod, dtype=np.float64)
        return cls(np.sqrt((1 - abar) / abar))

    def timestep(self, sigma: NDArray[np.float64]) -> NDArray[np.float64]:
        """Continuous timestep of a noise level, by interpolation in log sigma (clipped to the trained range)."""
        return np.interp(np.log(sigma), np.log(self.sigma), np.arange(len(self.sigma), dtype=np.float64))
