"""Noise schedules and noise levels: where along the noise level the evaluations lie, and what a backbone calls that place.

A schedule is a function of ``u`` in [0, 1] (0 = highest noise). Whatever the schedule, the reference trajectory's time points
lie inside the plan's own intervals (:func:`refine`), so its grid contains the plan's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import InputError

Array = NDArray[np.float64]
RHO = 7.0


class Levels(Protocol):
    """What a family of backbones means by noise and by time.

    Attributes:
        low, high: the range of noise levels sampling runs through by default.
        limits: the range the backbone was trained on.
        default_schedule: out of :data:`SCHEDULES`.
        rho: equal steps in ``sigma**(1/rho)`` cut an interval for the reference trajectory.
    """

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def limits(self) -> tuple[float, float]: ...
    @property
    def default_schedule(self) -> str: ...
    @property
    def rho(self) -> float: ...

    def scale(self, sigma: float) -> float:
        """Factor between the solver's state ``x`` and the network's input ``y = x / scale``."""

    def timestep(self, sigma: Array) -> Array:
        """The backbone's own, continuous time of noise levels."""

    def sigma_at(self, timestep: Array) -> Array:
        """Inverse of :meth:`timestep`."""


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels a discrete-time backbone was trained at: ``sigma[t] = sqrt((1 - abar[t]) / abar[t])``.

    Sampling runs through those inside [0.002, 80] (Karras et al. 2022, table 1).

    Attributes:
        sigma: float64 ``[timesteps]``, increasing.
    """

    sigma: Array
    default_schedule = "polynomial"
    rho = RHO

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: NDArray[np.floating]) -> NoiseLevels:
        abar = np.asarray(alphas_cumprod, dtype=np.float64)
        return cls(np.sqrt((1 - abar) / abar))

    @property
    def limits(self) -> tuple[float, float]:
        return float(self.sigma[0]), float(self.sigma[-1])

    @property
    def low(self) -> float:
        return max(self.limits[0], 0.002)

    @property
    def high(self) -> float:
        return min(self.limits[1], 80.0)

    def scale(self, sigma: float) -> float:
        return float(np.sqrt(1 + sigma * sigma))

    def timestep(self, sigma: Array) -> Array:
        """By interpolation in log sigma, clipped to the trained range."""
        return np.interp(np.log(sigma), np.log(self.sigma), np.arange(len(self.sigma), dtype=np.float64))

    def sigma_at(self, timestep: Array) -> Array:
        return np.exp(np.interp(timestep, np.arange(len(self.sigma)), np.log(self.sigma)))


@dataclass(frozen=True)
class EDMLevels:
    """Continuous noise levels of a backbone with EDM's preconditioning, time ``log(sigma)/4`` (Karras et al. 2022, table 1)."""

    low: float = 0.002
    high: float = 80.0
    sigma_data: float = 0.5
    default_schedule = "polynomial"
    rho = RHO

    @property
    def limits(self) -> tuple[float, float]:
        return self.low, self.high

    def scale(self, sigma: float) -> float:
        return float(np.sqrt(self.sigma_data**2 + sigma * sigma))

    def timestep(self, sigma: Array) -> Array:
        return np.asarray(np.log(sigma) / 4)

    def sigma_at(self, timestep: Array) -> Array:
        return np.asarray(np.exp(4 * timestep))


@dataclass(frozen=True)
class FlowLevels:
    """Flow matching (Lipman et al. 2023; Liu et al. 2023): ``x = (1 - t) x0 + t noise``, the network's output is ``dx/dt``.

    What is called sigma elsewhere is the time ``t`` in [0, 1] here.

    Attributes:
        shift: of uniform times, ``t -> shift t / (1 + (shift - 1) t)`` (Esser et al. 2024, section 5.3.2).
        timesteps: what the network calls ``t = 1``.
    """

    shift: float = 1.0
    timesteps: float = 1000.0
    low = 0.0
    high = 1.0
    limits = (0.0, 1.0)
    default_schedule = "time-uniform"
    rho = 1.0

    def scale(self, sigma: float) -> float:
        return 1.0

    def timestep(self, sigma: Array) -> Array:
        return np.asarray(sigma * self.timesteps)

    def sigma_at(self, timestep: Array) -> Array:
        return np.asarray(timestep / self.timesteps)


Schedule = Callable[[Array, float, float, Levels], Array]
"""(u, sigma_max, sigma_min, levels) -> sigma(u), strictly decreasing in u."""


def polynomial(u: Array, sigma_max: float, sigma_min: float, levels: Levels | None = None, rho: float = RHO) -> Array:
    """Karras et al. 2022 (EDM), eq. 5: equal steps in ``sigma**(1/rho)``."""
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.asarray((top + u * (bottom - top)) ** rho, dtype=np.float64)


def log_uniform(u: Array, sigma_max: float, sigma_min: float, levels: Levels | None = None) -> Array:
    """Equal steps in log sigma (the logSNR schedule of Lu et al. 2022a)."""
    return np.asarray(sigma_max * (sigma_min / sigma_max) ** u, dtype=np.float64)


def time_uniform(u: Array, sigma_max: float, sigma_min: float, levels: Levels) -> Array:
    """Equal steps in the backbone's own time; of flow matching shifted as :class:`FlowLevels` says."""
    start, end = levels.timestep(np.array([sigma_max, sigma_min]))
    sigmas = levels.sigma_at(start + u * (end - start))
    if isinstance(levels, FlowLevels):
        sigmas = levels.shift * sigmas / (1 + (levels.shift - 1) * sigmas)
    return sigmas


SCHEDULES: dict[str, Schedule] = {"polynomial": polynomial, "logsnr": log_uniform, "time-uniform": time_uniform}

SCHEDULER = "scheduler"
"""The time points of the pipeline's own diffusers scheduler: not a curve, known only where diffusers is."""
GIVEN = "given"
"""The name of a schedule whose time points somebody gave."""


def given_points(schedule: str | Sequence[float] | None) -> list[float] | None:
    """The noise levels of a schedule that is a list of them, as numbers or as text with commas; None for the name of one.

    Raises:
        InputError: for a list that is none of falling noise levels, the last of which may be 0.
    """
    if schedule is None or (isinstance(schedule, str) and "," not in schedule and not _is_number(schedule)):
        return None
    parts = [part.strip() for part in schedule.split(",")] if isinstance(schedule, str) else list(schedule)
    if wrong := [part for part in parts if not _is_number(part)]:
        raise InputError(f"expected a schedule's name, or noise levels by comma, as in 14.6,2.5,0.6,0; found {wrong[0]!r}")
    points = [float(part) for part in parts]
    falling = all(a > b for a, b in itertools.pairwise(points))
    if len(points) < 2 or not (falling and math.isfinite(points[0]) and points[-1] >= 0):
        raise InputError(
            "expected noise levels that fall from one time point to the next, two or more, the last 0 or above; found "
            f"{', '.join(f'{point:g}' for point in points)}; the highest comes first"
        )
    return points


def _is_number(text: object) -> bool:
    try:
        float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return not isinstance(text, bool)


def steps_of(schedule: str | Sequence[float] | None, steps: int | None, default: int | None = None) -> int | None:
    """The step count: what is asked for, or what a list of noise levels has, or ``default``.

    Raises:
        InputError: when the list has another count.
    """
    points = given_points(schedule)
    if points is None:
        return default if steps is None else steps
    if steps is not None and steps != len(points) - 1:
        raise InputError(
            f"expected {steps + 1} noise levels for {steps} steps; found {len(points)}; pass --steps {len(points) - 1}, or "
            "leave it out"
        )
    return len(points) - 1


def grid(schedule: str, intervals: int, sigma_max: float, sigma_min: float, levels: Levels) -> Array:
    """The ``intervals + 1`` noise levels of a schedule, highest first.

    Raises:
        InputError: for an unknown schedule, a non-positive count or an empty range of noise levels.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"expected a schedule out of {', '.join([*SCHEDULES, SCHEDULER])}; found {schedule!r}")
    if intervals < 1:
        raise InputError(f"expected a step count of 1 or more; found {intervals}; pass for example --steps 4")
    above_zero = sigma_min > 0 or (sigma_min == 0 and schedule != "logsnr" and isinstance(levels, FlowLevels))
    if not (above_zero and sigma_min < sigma_max):
        raise InputError(f"expected 0 < sigma_min < sigma_max; found sigma_min={sigma_min}, sigma_max={sigma_max}")
    return SCHEDULES[schedule](np.arange(intervals + 1) / intervals, sigma_max, sigma_min, levels)


def refine(sigmas: Array, parts: int, rho: float = RHO) -> Array:
    """Every interval of a grid cut into ``parts``, in equal steps of ``sigma**(1/rho)``, as the polynomial schedule does."""
    roots = np.asarray(sigmas, dtype=np.float64) ** (1 / rho)
    inner = np.interp(np.arange((len(roots) - 1) * parts + 1) / parts, np.arange(len(roots)), roots) ** rho
    inner[::parts] = sigmas
    return np.asarray(inner)
