"""Solvers: order of convergence on ODEs with a known solution, and equality with diffusers' DDIM."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray

from mteo_deploy import schedules, solvers
from mteo_deploy.errors import InputError
from mteo_deploy.solvers import SOLVERS, Evaluate, Solver

Grid = NDArray[np.float64]
VARIANCE, HIGH, LOW = 0.25, 3.0, 0.3


def gaussian(solver: Solver) -> Evaluate:
    """Data N(0, c): ``D = x c / (c + sigma^2)``."""

    def evaluate(x: Grid, sigma: float) -> Grid:
        denoised = x * VARIANCE / (VARIANCE + sigma**2)
        return denoised if solver.keeps == "D" else (x - denoised) / sigma

    return evaluate


def gaussian_error(solver: Solver, grid: Grid) -> float:
    """Error against ``x(sigma) = x0 sqrt((c + sigma^2) / (c + sigma_max^2))``."""
    exact = math.sqrt((VARIANCE + grid[-1] ** 2) / (VARIANCE + grid[0] ** 2))
    return float(np.abs(solver.solve(np.ones(1), grid, gaussian(solver)) - exact)[0])


def slopes(error: Callable[[int], float], counts: tuple[int, ...]) -> Grid:
    """Observed orders between doublings of the step count."""
    errors = np.array([error(n) for n in counts])
    assert np.all(errors > 1e-13), f"errors {errors} are rounding, not truncation"
    return np.log2(errors[:-1] / errors[1:])


def uneven(count: int) -> Grid:
    """Intervals of lengths 1 : 2 : 1 : 2 ..., a grid no refinement makes smooth."""
    lengths = np.tile([1.0, 2.0], count // 2)
    return HIGH - (HIGH - LOW) * np.concatenate([[0.0], np.cumsum(lengths)]) / lengths.sum()


@pytest.mark.parametrize("name", SOLVERS)
def test_order_on_any_grid(name: str) -> None:
    """``Solver.order`` is what holds without any assumption about the grid."""
    found = slopes(lambda n: gaussian_error(SOLVERS[name], uneven(n)), (1024, 2048, 4096))
    np.testing.assert_allclose(found, SOLVERS[name].order, atol=0.06, rtol=0)


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_order_on_our_schedules(name: str, schedule: str) -> None:
    """On a smooth schedule iPNDM is of order 2: neighbouring steps are equal to first order, its start is Euler."""
    expected = 2 if name.startswith("ipndm") else SOLVERS[name].order
    found = slopes(lambda n: gaussian_error(SOLVERS[name], schedules.grid(schedule, n, HIGH, LOW)), (256, 512, 1024))
    np.testing.assert_allclose(found, expected, atol=0.15, rtol=0)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_ipndm_order_on_equal_steps(k: int) -> None:
    """``x' = (x - g) + g'`` with ``g = 1 + (sigma_max - sigma)^5``: flat at first, so the Euler start costs nothing."""

    def error(count: int) -> float:
        def evaluate(x: Grid, sigma: float) -> Grid:
            return (x - (1 + (3 - sigma) ** 5)) - 5 * (3 - sigma) ** 4

        found = SOLVERS[f"ipndm-{k}"].solve(np.ones(1), np.linspace(3, 1, count + 1), evaluate)
        return float(np.abs(found - (1 + 2**5))[0])

    np.testing.assert_allclose(slopes(error, (128, 256, 512)), k, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_are_those_declared(name: str) -> None:
    solver, calls = SOLVERS[name], 0

    def evaluate(x: Grid, sigma: float) -> Grid:
        nonlocal calls
        calls += 1
        return gaussian(solver)(x, sigma)

    solver.solve(np.ones(1), schedules.grid("polynomial", 5, HIGH, LOW), evaluate)
    assert calls == 5 * solver.evaluations_per_interval == len(solvers.trace(solver, np.linspace(3, 1, 6)).sigmas)


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].keeps == "d"])
def test_constant_slope_is_exact(name: str) -> None:
    found = SOLVERS[name].solve(np.array([2.0]), uneven(6), lambda x, sigma: np.array([-1.5]))
    np.testing.assert_allclose(found, 2.0 - 1.5 * (LOW - HIGH), rtol=1e-13)


def test_dpmpp_2m_is_exact_for_constant_denoised() -> None:
    """``D`` constant: ``x = D + (x0 - D) sigma / sigma_max``, on any grid (Lu et al. 2022b, eq. 8)."""
    found = SOLVERS["dpmpp-2m"].solve(np.array([2.0]), uneven(6), lambda x, sigma: np.array([0.7]))
    np.testing.assert_allclose(found, 0.7 + (2.0 - 0.7) * LOW / HIGH, rtol=1e-13)


def test_euler_is_diffusers_ddim() -> None:
    """Same timesteps, same (made-up) eps network, both in float64."""
    ddim = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, set_alpha_to_one=False)
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.final_alpha_cumprod = ddim.alphas_cumprod[0]
    ddim.set_timesteps(7)
    times = [*ddim.timesteps.tolist(), 0]
    levels = schedules.NoiseLevels.from_alphas_cumprod(ddim.alphas_cumprod.numpy())
    sigmas = levels.sigma[times]

    def eps(y: NDArray[np.float64], t: int) -> NDArray[np.float64]:
        return np.tanh(1.3 * y - 0.001 * t)

    noise = np.random.default_rng(0).standard_normal((2, 3))
    sample = torch.from_numpy(noise)
    for t in ddim.timesteps:
        sample = ddim.step(torch.from_numpy(eps(sample.numpy(), int(t))), t, sample).prev_sample

    def evaluate(x: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
        return eps(x / math.sqrt(1 + sigma**2), times[int(np.argmin(np.abs(sigmas - sigma)))])

    found = SOLVERS["euler"].solve(noise * math.sqrt(1 + sigmas[0] ** 2), sigmas, evaluate)
    np.testing.assert_allclose(found / math.sqrt(1 + sigmas[-1] ** 2), sample.numpy(), rtol=1e-10, atol=1e-12)


def test_aliases_and_unknown_names() -> None:
    assert solvers.get("ddim") is SOLVERS["euler"]
    assert solvers.get("ipndm") is SOLVERS["ipndm-3"]
    with pytest.raises(InputError, match=r"dpmpp-2m.*found 'rk45'"):
        solvers.get("rk45")
