"""Solvers: order of convergence on ODEs with a known solution."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from mteo_deploy import schedules, solvers
from mteo_deploy.errors import InputError
from mteo_deploy.solvers import SOLVERS, Evaluate, Solver

Grid = NDArray[np.float64]
VARIANCES, HIGH, LOW = np.array([0.05, 0.1, 0.25, 0.6, 1.5, 4.0]), 3.0, 0.3
LEVELS = schedules.NoiseLevels(np.geomspace(0.01, 100, 1000))


def gaussian(solver: Solver) -> Evaluate:
    """Data N(0, c) for several c at once: ``D = x c / (c + sigma^2)``."""

    def evaluate(x: Grid, sigma: float) -> Grid:
        denoised = x * VARIANCES / (VARIANCES + sigma**2)
        return denoised if solver.keeps == "D" else (x - denoised) / sigma

    return evaluate


def gaussian_error(solver: Solver, grid: Grid) -> float:
    """RMS error against ``x(sigma) = x0 sqrt((c + sigma^2) / (c + sigma_max^2))``."""
    exact = np.sqrt((VARIANCES + grid[-1] ** 2) / (VARIANCES + grid[0] ** 2))
    found = solver.solve(np.ones(len(VARIANCES)), grid, gaussian(solver))
    return float(np.sqrt(np.mean((found - exact) ** 2)))


def slopes(error: Callable[[int], float], counts: tuple[int, ...]) -> Grid:
    """Observed orders between doublings of the step count."""
    errors = np.array([error(n) for n in counts])
    assert np.all(errors > 1e-11), f"errors {errors} are rounding, not truncation"
    return np.log2(errors[:-1] / errors[1:])


def uneven(count: int) -> Grid:
    """Intervals of lengths 1 : 2 : 1 : 2 ..., a grid no refinement makes smooth, after three of length 1/count^2: a multistep
    method then has its history at hardly any cost of its low-order start."""
    lengths = np.tile([1.0, 2.0], count // 2)
    rest = lengths / lengths.sum() * (1 - 3 / count**2)
    return HIGH - (HIGH - LOW) * np.concatenate([[0.0], np.cumsum([*[1 / count**2] * 3, *rest])])


@pytest.mark.parametrize("name", SOLVERS)
def test_order_on_any_grid(name: str) -> None:
    """``Solver.order`` is what holds without any assumption about the grid."""
    found = slopes(lambda n: gaussian_error(SOLVERS[name], uneven(n)), (256, 512))
    np.testing.assert_allclose(found, SOLVERS[name].order, atol=0.12, rtol=0)


@pytest.mark.parametrize("schedule", ["polynomial", "logsnr"])
@pytest.mark.parametrize("name", SOLVERS)
def test_order_on_our_schedules(name: str, schedule: str) -> None:
    """From a standing start: the first step's error is of order 2, with a corrector 3. iPNDM is of order 2 where neighbouring
    steps are equal to first order."""
    solver = SOLVERS[name]
    least = 2 if name.startswith("ipndm") else min(solver.order, 3 if name.startswith("unipc") else 2)
    found = slopes(lambda n: gaussian_error(solver, schedules.grid(schedule, n, HIGH, LOW, LEVELS)), (128, 256))
    assert least - 0.2 < found < solver.order + 1.12


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

    solver.solve(np.ones(1), schedules.grid("polynomial", 5, HIGH, LOW, LEVELS), evaluate)
    assert calls == 5 * solver.evaluations_per_interval == len(solvers.trace(solver, np.linspace(3, 1, 6)).sigmas)


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].keeps == "d"])
def test_constant_slope_is_exact(name: str) -> None:
    found = SOLVERS[name].solve(np.array([2.0]), uneven(6), lambda x, sigma: np.array([-1.5]))
    np.testing.assert_allclose(found, 2.0 - 1.5 * (LOW - HIGH), rtol=1e-13)


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].keeps == "D"])
def test_constant_denoised_is_exact(name: str) -> None:
    """``D`` constant: ``x = D + (x0 - D) sigma / sigma_max``, on any grid (Lu et al. 2022b, eq. 8)."""
    found = SOLVERS[name].solve(np.array([2.0]), uneven(6), lambda x, sigma: np.array([0.7]))
    np.testing.assert_allclose(found, 0.7 + (2.0 - 0.7) * LOW / HIGH, rtol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_to_zero_gives_the_denoised_estimate(name: str) -> None:
    """``D`` constant again, down to sigma 0: nothing is left of the noise, and nothing is divided by zero."""
    solver = SOLVERS[name]
    grid = np.array([*schedules.grid("polynomial", 4, HIGH, LOW, LEVELS), 0.0])
    found = solver.solve(np.array([2.0]), grid, lambda x, sigma: np.array([0.7]) if solver.keeps == "D" else (x - 0.7) / sigma)
    np.testing.assert_allclose(found, 0.7, rtol=1e-12)


@pytest.mark.parametrize("log", [False, True])
def test_lagrange_integrals_are_exact_for_polynomials(log: bool) -> None:
    """Integrals of 1, v, v^2 with v = sigma or log sigma, known in closed form, on uneven nodes."""
    nodes, end = np.array([1.3, 2.0, 3.1]), 0.4
    weights = solvers.lagrange_integrals(nodes, end, log)
    v = np.log(nodes) if log else nodes
    antiderivatives: list[Callable[[float], float]] = [
        lambda s: s,
        (lambda s: s * math.log(s) - s) if log else (lambda s: s**2 / 2),
        (lambda s: s * math.log(s) ** 2 - 2 * s * math.log(s) + 2 * s) if log else (lambda s: s**3 / 3),
    ]
    for power, whole in enumerate(antiderivatives):
        assert weights @ v**power == pytest.approx(whole(end) - whole(nodes[0]), rel=1e-12)


def test_aliases_and_unknown_names() -> None:
    assert solvers.get("ddim") is SOLVERS["euler"]
    assert solvers.get("ipndm") is SOLVERS["ipndm-3"]
    assert solvers.get("ipndm-v-3") is SOLVERS["deis-3"]
    assert all(name in SOLVERS for name in solvers.ALIASES.values()) and not SOLVERS.keys() & solvers.ALIASES
    with pytest.raises(InputError, match=r"dpmpp-2m.*found 'rk45'"):
        solvers.get("rk45")
