"""ODE solvers, written once as they stand in the papers and *partially evaluated* into coefficients.

A solver here is ordinary code over ``x``, the network's estimate and the noise levels, in the variance-exploding form
``dx/dsigma = d = (x - D)/sigma``. It never asks what ``x`` is: handed arrays it solves an ODE (that is how its order is
tested), handed :class:`Combination` objects it leaves behind the linear combinations that make up a plan. No second
implementation exists, so none can disagree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import InputError


class Evaluate(Protocol):
    """One call of the network at state ``x`` and noise level ``sigma``: returns d or D, as the solver asks for."""

    def __call__(self, x: Any, sigma: float) -> Any: ...


@dataclass(frozen=True)
class Solver:
    """A method: what it keeps of each evaluation, how many evaluations an interval costs, and its update.

    Attributes:
        keeps: ``"d"`` (the ODE's slope) or ``"D"`` (the denoised estimate).
        evaluations_per_interval: 1 for multistep methods, 2 for Heun and DPM-Solver-2.
        order: order of convergence, used by the tests.
        solve: ``(x, sigmas, evaluate) -> x`` at the last noise level.
    """

    keeps: Literal["d", "D"]
    evaluations_per_interval: int
    order: int
    solve: Callable[[Any, NDArray[np.float64], Evaluate], Any]


def euler(x: Any, sigmas: NDArray[np.float64], evaluate: Evaluate) -> Any:
    """Euler in sigma; for eps models this is DDIM (Song et al. 2021; Karras et al. 2022, sec. 3)."""
    for t, t_next in itertools.pairwise(sigmas):
        x = x + (t_next - t) * evaluate(x, t)
    return x


def heun(x: Any, sigmas: NDArray[np.float64], evaluate: Evaluate) -> Any:
    """Heun's second-order method (Karras et al. 2022, algorithm 1), two evaluations on every interval."""
    for t, t_next in itertools.pairwise(sigmas):
        h = t_next - t
        d = evaluate(x, t)
        d_prime = evaluate(x + h * d, t_next)
        x = x + h * (d + d_prime) / 2
    return x


def dpm_solver_2(x: Any, sigmas: NDArray[np.float64], evaluate: Evaluate, r: float = 0.5) -> Any:
    """DPM-Solver-2 (Lu et al. 2022a, algorithm 1) in sigma: a midpoint in log sigma."""
    for t, t_next in itertools.pairwise(sigmas):
        h, m = t_next - t, t_next**r * t ** (1 - r)
        d = evaluate(x, t)
        d_m = evaluate(x + (m - t) * d, m)
        x = x + h * (d_m / (2 * r) + (1 - 1 / (2 * r)) * d)
    return x


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(order: int) -> Callable[[Any, NDArray[np.float64], Evaluate], Any]:
    """Improved PNDM (Zhang & Chen 2023): Adams-Bashforth with equal-step weights and a rising order at the start."""

    def solve(x: Any, sigmas: NDArray[np.float64], evaluate: Evaluate) -> Any:
        slopes: list[Any] = []
        for t, t_next in itertools.pairwise(sigmas):
            slopes.insert(0, evaluate(x, t))
            weights = ADAMS_BASHFORTH[min(order, len(slopes)) - 1]
            total = sum((w * d for w, d in zip(weights[1:], slopes[1:], strict=False)), weights[0] * slopes[0])
            x = x + (t_next - t) * total
        return x

    return solve


def dpmpp_2m(x: Any, sigmas: NDArray[np.float64], evaluate: Evaluate) -> Any:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2) with lambda = -log sigma."""
    previous, h_previous = None, 0.0
    for t, t_next in itertools.pairwise(sigmas):
        h = float(np.log(t / t_next))
        denoised = evaluate(x, t)
        estimate = denoised
        if previous is not None:
            estimate = denoised + (h / h_previous / 2) * (denoised - previous)
        x = (t_next / t) * x - float(np.expm1(-h)) * estimate
        previous, h_previous = denoised, h
    return x


SOLVERS: dict[str, Solver] = {
    "euler": Solver("d", 1, 1, euler),
    "heun": Solver("d", 2, 2, heun),
    "dpm-solver-2": Solver("d", 2, 2, dpm_solver_2),
    "ipndm-2": Solver("d", 1, 1, ipndm(2)),
    "ipndm-3": Solver("d", 1, 1, ipndm(3)),
    "ipndm-4": Solver("d", 1, 1, ipndm(4)),
    "dpmpp-2m": Solver("D", 1, 2, dpmpp_2m),
}
"""iPNDM's weights assume equal steps: ``order`` is what holds on any grid; on a uniform one order k shows."""


def canonical(name: str) -> str:
    """The name a solver is stored under: ``ddim`` is ``euler``, ``ipndm`` is ``ipndm-3``."""
    return {"ddim": "euler", "ipndm": "ipndm-3"}.get(name, name)


def get(name: str) -> Solver:
    """The solver of that name (``ddim`` is an alias of ``euler``, ``ipndm`` of ``ipndm-3``).

    Raises:
        InputError: naming the solvers that exist.
    """
    solver = SOLVERS.get(canonical(name))
    if solver is None:
        raise InputError(f"expected a solver out of {', '.join(SOLVERS)}; found {name!r}")
    return solver


@dataclass(frozen=True)
class Combination:
    """A vector over the basis (initial state, first kept quantity, second, ...), closed under what solvers do."""

    weights: NDArray[np.float64]

    def __add__(self, other: Combination) -> Combination:
        return Combination(self.weights + other.weights)

    def __sub__(self, other: Combination) -> Combination:
        return Combination(self.weights - other.weights)

    def __mul__(self, factor: float) -> Combination:
        return Combination(self.weights * float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Combination:
        return Combination(self.weights / float(divisor))


@dataclass(frozen=True)
class Trace:
    """What a solver did: the noise level and the state's combination at each evaluation, and the last state's."""

    sigmas: list[float]
    states: list[Combination]
    last: Combination


def trace(solver: Solver, sigmas: NDArray[np.float64]) -> Trace:
    """Run ``solver`` on combinations instead of arrays, and return what it computed, in float64."""
    count = solver.evaluations_per_interval * (len(sigmas) - 1)
    basis = [Combination(row) for row in np.eye(count + 1)]
    at: list[float] = []
    states: list[Combination] = []

    def evaluate(x: Combination, sigma: float) -> Combination:
        at.append(float(sigma))
        states.append(x)
        return basis[len(states)]

    last = solver.solve(basis[0], sigmas, evaluate)
    return Trace(at, states, last)
