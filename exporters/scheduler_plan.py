"""``--solver scheduler``: a diffusers scheduler's own update, with all its options, as a plan, by partial evaluation.

Between calls of the network a scheduler computes linear combinations of the noise and of the network's outputs, whatever its
options say. So the scheduler itself is run, with vectors of coefficients in the images' place: the noise is the first unit
vector, and the output of evaluation ``i`` is the unit vector ``i + 1``. What it hands to the network are the exact coefficients
of that input. Nothing of a scheduler is written again here, so nothing can differ.

A scheduler that is not linear (``clip_sample``, thresholding) or draws noise is found out by running it once more with a
network of its own: the plan must give the same images.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from mteo_deploy.errors import InputError, border
from mteo_deploy.exporters.scheduler_options import Config, class_name, left_out
from mteo_deploy.exporters.schedulers import at_work, level_at, points_of
from mteo_deploy.plan import Evaluation, Plan, kept_coefficients, run
from mteo_deploy.schedules import SCHEDULER, Levels

Array = NDArray[np.float64]

CLOSED = 1e-9
"""Of a state: what its combination of earlier quantities may leave over, in float64."""
LINEAR = 1e-6
"""Relative error of the plan's images against the scheduler's."""
REACH = 8
"""Earlier evaluations that an update reaches back to, before all of them are taken."""
WAY_OUT = "pass --solver euler, or another of docs/solvers.md, on the same time points with --schedule scheduler"


class _Double(TorchFunctionMode):
    """float64 where code asks for float32: schedulers cast states to it, which would blur coefficients."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call: Callable[..., Any] = torch.Tensor.double if func is torch.Tensor.float else func
        swapped = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return call(*swapped, **named)


@contextmanager
def _in_double(scheduler: Any, seed: int) -> Iterator[None]:
    """Run ``scheduler`` in float64 on the tables that it made in float32, with random numbers of its own."""
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            setattr(scheduler, name, value.double())
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad(), _Double():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


@dataclass(frozen=True)
class Trace:
    """What a scheduler did with coefficients.

    Attributes:
        states: float64 ``[evaluations + 1, 1 + evaluations]``: each input of the network, and last the image, in terms of the
            noise and of the outputs.
        sigmas: the noise level that the scheduler takes each input for.
        timesteps: what it hands to the network with it.
    """

    states: Array
    sigmas: list[float]
    timesteps: list[float]


def _level(scheduler: Any, index: int, timestep: Any) -> float:
    """The noise level of the state that evaluation ``index`` is about to see."""
    if not hasattr(scheduler, "sigmas"):
        return level_at(scheduler, int(timestep))
    if getattr(scheduler, "step_index", 0) is None:
        scheduler._init_step_index(timestep)
    at = getattr(scheduler, "step_index", index)
    inside = hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order
    return float((scheduler.sigmas_interpol if inside else scheduler.sigmas)[at])


def walk(scheduler: Any, noise: torch.Tensor, network: Callable[[int, torch.Tensor, Any], torch.Tensor]) -> torch.Tensor:
    """diffusers' loop as its pipelines run it; the image.

    Args:
        network: ``(index, input, timestep) -> output``.
    """
    more: dict[str, Any] = {"eta": 0.0} if "eta" in scheduler.step.__code__.co_varnames else {}  # the pipelines' default
    sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for index, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        output = network(index, scaled, t)
        sample = scheduler.step(output, t, sample, **more, return_dict=False)[0]
    return sample


def trace(scheduler: Any) -> Trace:
    """Run a scheduler at work on vectors of coefficients."""
    count = len(scheduler.timesteps)
    basis = torch.eye(count + 1, dtype=torch.float64).reshape(count + 1, 1, 1, 1, count + 1)
    states: list[Array] = []
    sigmas: list[float] = []
    timesteps: list[float] = []

    def network(index: int, state: torch.Tensor, t: Any) -> torch.Tensor:
        sigmas.append(_level(scheduler, index, t))
        timesteps.append(float(t))
        states.append(state.flatten().numpy().copy())
        return basis[index + 1]

    with _in_double(scheduler, 0):
        last = walk(scheduler, basis[0], network)
    states.append(last.flatten().numpy().copy())
    return Trace(np.stack(states).astype(np.float64), sigmas, timesteps)


class _Trial:
    """A scheduler on a network that is not linear: what it makes, twice, and what a plan makes of the same."""

    def __init__(self, scheduler: Any) -> None:
        generator, shape = np.random.default_rng(0), (1, 3, 4, 8)
        self.scheduler, self.noise = scheduler, torch.from_numpy(4 * generator.standard_normal(shape))
        self._moved = torch.from_numpy(generator.standard_normal((len(scheduler.timesteps), *shape)))

    def network(self, index: int, state: torch.Tensor) -> torch.Tensor:
        return 4 * torch.tanh(state + self._moved[index])

    def by_scheduler(self, seed: int) -> Array:
        """The images, with random numbers of a seed."""
        scheduler = copy.deepcopy(self.scheduler)
        with _in_double(scheduler, seed):
            return np.asarray(walk(scheduler, self.noise, lambda index, state, _: self.network(index, state)).numpy())

    def error(self, plan: Plan, expected: Array) -> float:
        """Relative error of a plan's images."""
        found = run(plan, self.noise, self.network)[-1].numpy()
        return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def _row(states: Array, kept: Array, index: int, reach: int) -> tuple[float, list[float]] | None:
    """``(carry, weights)`` of one update, with as few earlier quantities as do it exactly; None for more than ``reach``."""
    target = states[index + 1]
    size = np.linalg.norm(target)
    for back in range(min(reach, index) + 1):
        terms = np.stack([states[index], *kept[index - back : index + 1][::-1]], axis=1)
        scale = np.linalg.norm(terms, axis=0)
        found = np.linalg.lstsq(terms / scale, target, rcond=None)[0] / scale
        if np.linalg.norm(terms @ found - target) <= CLOSED * size:
            found[np.abs(found) * scale < 1e-12 * size] = 0.0
            return float(found[0]), found[1:].tolist()
    return None


def _program(traced: Trace, prediction_type: str, levels: Levels) -> tuple[list[tuple[float, float]], list[Any]] | None:
    """What is kept of each evaluation, and the updates: of output, denoised estimate and slope, what reaches back least.

    None where an update is no combination of the state and the outputs before it.
    """
    count = len(traced.sigmas)
    outputs = np.eye(count + 1)[1:]
    candidates = [[(0.0, 1.0)] * count] + [
        [kept_coefficients(keeps, prediction_type, sigma, levels) for sigma in traced.sigmas] for keeps in ("D", "d")
    ]
    best: tuple[list[tuple[float, float]], list[Any]] | None = None
    reach = REACH
    for keeps in candidates:
        kept = np.stack([p * state + q * own for (p, q), state, own in zip(keeps, traced.states, outputs, strict=False)])
        rows = [_row(traced.states, kept, index, reach) for index in range(count)]
        if None not in rows and (best is None or _longest(rows) < _longest(best[1])):
            best, reach = (keeps, rows), _longest(rows) - 1
    if best is None:  # with every output kept, always
        rows = [_row(traced.states, outputs, index, count) for index in range(count)]
        best = None if None in rows else (candidates[0], rows)
    return best


def _longest(rows: Sequence[Any]) -> int:
    return max(len(weights) for _, weights in rows)


def _reached(sigmas: Sequence[float], points: Sequence[float]) -> dict[int, int]:
    """Evaluation -> the time point that its update is the last to reach."""
    found = {}
    for k, point in enumerate(points[1:-1], start=1):
        at = [i for i, sigma in enumerate(sigmas) if abs(sigma - point) <= 1e-6 * point]
        if at:
            found[at[-1] - 1] = k
    return {**found, len(sigmas) - 1: len(points) - 1}


def scheduler_plan(
    config: Config, steps: int, levels: Levels, prediction_type: str, tokens: int | None = None, pipeline: str = ""
) -> Plan:
    """The plan of a pipeline's own scheduler: schedule, update, options and scaling of the first noise.

    Args:
        levels, prediction_type: what :func:`~mteo_deploy.exporters.schedulers.noise_levels` says of ``config``.
        tokens, pipeline: as for :func:`~mteo_deploy.exporters.schedulers.scheduler_points`.

    Raises:
        InputError: for a scheduler that is not understood or does not take that many steps, that is not linear, or draws noise.
    """
    name, scheduler = class_name(config), at_work(config, steps, tokens, pipeline)
    points = points_of(scheduler, steps)
    trial = _Trial(scheduler)
    with border(f"{name} does not run as its pipelines run it, on {steps} steps", f"it cannot be a plan; {WAY_OUT}"):
        images = trial.by_scheduler(0), trial.by_scheduler(1)
        traced = trace(copy.deepcopy(scheduler))
    reasons = left_out(config)
    if not np.array_equal(*images, equal_nan=True):
        drawn = next((reason for reason in reasons if "drawn" in reason), "noise drawn at its steps")
        raise InputError(f"expected a scheduler that draws no noise with --solver scheduler; found {name}: {drawn}; {WAY_OUT}")
    if not (np.isfinite(images[0]).all() and np.isfinite(traced.states).all()):
        raise InputError(
            f"expected {name} to make finite numbers in {steps} steps; found others, as diffusers' does; {WAY_OUT}"
        )
    _check_range(name, traced.sigmas, levels)
    plan = _plan(traced, points, levels, prediction_type)
    error = trial.error(plan, images[0]) if plan else np.inf
    if plan is None or not error < LINEAR:
        why = ", ".join(reasons) or f"an update that is not (relative error {error:.1e})"
        raise InputError(
            f"expected a scheduler whose update is linear with --solver scheduler; found {name} with {why}; switch it off in "
            f"scheduler_config.json, or {WAY_OUT}"
        )
    return plan


def _plan(traced: Trace, points: list[float], levels: Levels, prediction_type: str) -> Plan | None:
    found = _program(traced, prediction_type, levels)
    if found is None:
        return None
    keeps, rows = found
    reached = _reached(traced.sigmas, points)
    evaluations = [
        Evaluation(
            sigma=traced.sigmas[i],
            timestep=traced.timesteps[i],
            keep_state=keeps[i][0],
            keep_output=keeps[i][1],
            carry=carry,
            weights=tuple(weights),
            time_point=reached.get(i),
        )
        for i, (carry, weights) in enumerate(rows)
    ]
    return Plan(
        solver=SCHEDULER,
        schedule=SCHEDULER,
        prediction_type=prediction_type,
        steps=len(points) - 1,
        sigmas=tuple(points),
        initial_scale=float(traced.states[0, 0]),
        evaluations=tuple(evaluations),
    )


def _check_range(name: str, sigmas: Sequence[float], levels: Levels) -> None:
    low, high = levels.limits
    if max(sigmas) > high * 1.0001 or min(sigmas) < low * 0.9999:
        raise InputError(
            f"expected noise levels of {name} inside the backbone's [{low:.4g}, {high:.4g}]; found [{min(sigmas):.4g}, "
            f"{max(sigmas):.4g}]; change its sigma_min, sigma_max and spacing in scheduler_config.json, or pass a --schedule"
        )
