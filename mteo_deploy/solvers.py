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
        order: order of convergence on any grid, once a multistep method has its history, used by the tests. Started with
            lower orders, as they are, all keep an error of order 2 from their first step (UniPC's corrector: 3).
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
    """Heun's second-order method (Karras et al. 2022, algorithm 1), two evaluations on every interval that ends above zero."""
    for t, t_next in itertools.pairwise(sigmas):
        h = t_next - t
        d = evaluate(x, t)
        x = x + h * (d if t_next == 0 else (d + evaluate(x + h * d, t_next)) / 2)
    return x


def dpm_solver_2(x: Any, sigmas: NDArray[np.float64], evaluate: Evaluate, r: float = 0.5) -> Any:
    """DPM-Solver-2 (Lu et al. 2022a, algorithm 1) in sigma: a midpoint in log sigma."""
    for t, t_next in itertools.pairwise(sigmas):
        h, m = t_next - t, t_next**r * t ** (1 - r)
        d = evaluate(x, t)
        slope = d if t_next == 0 else evaluate(x + (m - t) * d, m) / (2 * r) + (1 - 1 / (2 * r)) * d
        x = x + h * slope
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


def lagrange_integrals(nodes: NDArray[np.float64], end: float, log: bool) -> NDArray[np.float64]:
    """Integrals over sigma, from ``nodes[0]`` to ``end``, of the Lagrange polynomials on ``nodes``.

    Args:
        log: polynomials in log sigma instead of sigma.
    """
    start = nodes[0]
    at = np.log(nodes / start) if log else nodes - start
    stop = float(np.log(end / start) if log else end - start)
    points, weights = np.polynomial.legendre.leggauss(32)  # exact for the polynomials, to rounding with the exponential
    v = stop * (points + 1) / 2
    measure = weights * stop / 2 * (start * np.exp(v) if log else 1.0)
    basis = [np.prod([(v - other) / (node - other) for other in np.delete(at, k)], axis=0) for k, node in enumerate(at)]
    return np.array([np.sum(measure * values) for values in basis])


def adams_bashforth(order: int, log: bool = False) -> Callable[[Any, NDArray[np.float64], Evaluate], Any]:
    """Variable-step Adams-Bashforth: the slope is a polynomial through the last ``order`` ones, integrated exactly.

    In sigma this is DEIS's rhoAB (Zhang & Chen 2023, section 3 and appendix B) and iPNDM_v; in log sigma it is what diffusers
    calls DEIS (``logrho``), of which a step to zero is Euler's.
    """

    def solve(x: Any, sigmas: NDArray[np.float64], evaluate: Evaluate) -> Any:
        slopes: list[Any] = []
        for i, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
            slopes.insert(0, evaluate(x, t))
            count = 1 if log and t_next == 0 else min(order, len(slopes))
            nodes = sigmas[i - count + 1 : i + 1][::-1]
            weights = lagrange_integrals(nodes, t_next, log) if count > 1 else np.array([t_next - t])
            x = sum((float(w) * d for w, d in zip(weights, slopes, strict=False)), x)
        return x

    return solve


def dpmpp_2m(x: Any, sigmas: NDArray[np.float64], evaluate: Evaluate) -> Any:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2) with lambda = -log sigma; a step to zero is ``x = D``."""
    previous, h_previous = None, 0.0
    for t, t_next in itertools.pairwise(sigmas):
        denoised = evaluate(x, t)
        if t_next == 0:
            return denoised
        h = float(np.log(t / t_next))
        estimate = denoised
        if previous is not None:
            estimate = denoised + (h / h_previous / 2) * (denoised - previous)
        x = (t_next / t) * x - float(np.expm1(-h)) * estimate
        previous, h_previous = denoised, h
    return x


def dpmpp_3m(x: Any, sigmas: NDArray[np.float64], evaluate: Evaluate) -> Any:
    """DPM-Solver++(3M) (Lu et al. 2022b, appendix B, in multistep form) with lambda = -log sigma; a step to zero is ``x = D``.

    The second difference enters with the factor of the authors' code and of diffusers, half of what a third order takes: the
    order is 2.
    """
    known: list[Any] = []
    steps: list[float] = []
    for t, t_next in itertools.pairwise(sigmas):
        known.insert(0, evaluate(x, t))
        if t_next == 0:
            return known[0]
        h = float(np.log(t / t_next))
        phi_1 = float(np.expm1(-h))
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        x = (t_next / t) * x - phi_1 * known[0]
        if len(known) == 2:
            x = x - phi_1 / 2 * (h / steps[0]) * (known[0] - known[1])
        elif len(known) > 2:
            r_0, r_1 = steps[0] / h, steps[1] / h
            a, b = (known[0] - known[1]) / r_0, (known[1] - known[2]) / r_1
            x = x + phi_2 * (a + r_0 / (r_0 + r_1) * (a - b)) - phi_3 / (r_0 + r_1) * (a - b)
        steps.insert(0, h)
    return x


def unipc_weights(ratios: NDArray[np.float64], h: float, bh: float) -> NDArray[np.float64]:
    """Weights ``rho`` of the differences at ``ratios`` of a step (Zhao et al. 2023, UniPC, equations 5 and 6; data prediction).

    Args:
        ratios: distances from the step's start over its length; -1 is a step of equal length back, 1 the step's end.
        h: length of the step in lambda.
        bh: the function B of the method at the step.
    """
    right, factorial, phi = [], 1.0, float(np.expm1(-h)) / -h - 1
    for k in range(1, len(ratios) + 1):
        right.append(phi * factorial / bh)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    powers = np.vander(ratios, increasing=True).T
    return np.asarray(np.linalg.solve(powers, np.array(right)))


def unipc(order: int, variant: Literal["bh1", "bh2"] = "bh2") -> Callable[[Any, NDArray[np.float64], Evaluate], Any]:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2), multistep, data prediction: a predictor and, from the evaluation at the
    predicted state, a corrector of the state before it is used on; a step to zero is ``x = D``."""

    def step(x: Any, at: NDArray[np.float64], known: list[Any], t_next: float, corrected: Any = None) -> Any:
        """From ``at[0]`` to ``t_next`` with estimates ``known`` at ``at``; with that at ``t_next`` it is the corrector."""
        h = float(np.log(at[0] / t_next))
        phi_1 = float(np.expm1(-h))
        bh = -h if variant == "bh1" else phi_1
        ratios = np.log(at[0] / at[1:]) / h
        differences = [d - known[0] for d in known[1:]]
        if corrected is not None:
            ratios, differences = np.append(ratios, 1.0), [*differences, corrected - known[0]]
        # of one difference the weight is 1/2 to the order needed, and independent of B (the paper, section 3.4)
        rho = np.array([0.5]) if len(ratios) == 1 else unipc_weights(ratios, h, bh)
        x = (t_next / at[0]) * x - phi_1 * known[0]
        return sum((-bh * float(w / r) * d for w, r, d in zip(rho, ratios, differences, strict=True)), x)

    def solve(x: Any, sigmas: NDArray[np.float64], evaluate: Evaluate) -> Any:
        known: list[Any] = []
        before = x
        for i, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
            denoised = evaluate(x, t)
            if t_next == 0:
                return denoised
            if known:
                x = step(before, sigmas[i - len(known) : i][::-1], known, t, denoised)
            known = [denoised, *known][:order]
            before = x
            x = step(x, sigmas[i - len(known) + 1 : i + 1][::-1], known, t_next)
        return x

    return solve


SOLVERS: dict[str, Solver] = {
    "euler": Solver("d", 1, 1, euler),
    "heun": Solver("d", 2, 2, heun),
    "dpm-solver-2": Solver("d", 2, 2, dpm_solver_2),
    "ipndm-2": Solver("d", 1, 1, ipndm(2)),
    "ipndm-3": Solver("d", 1, 1, ipndm(3)),
    "ipndm-4": Solver("d", 1, 1, ipndm(4)),
    "deis-2": Solver("d", 1, 2, adams_bashforth(2)),
    "deis-3": Solver("d", 1, 3, adams_bashforth(3)),
    "deis-4": Solver("d", 1, 4, adams_bashforth(4)),
    "deis-log-2": Solver("d", 1, 2, adams_bashforth(2, log=True)),
    "deis-log-3": Solver("d", 1, 3, adams_bashforth(3, log=True)),
    "dpmpp-2m": Solver("D", 1, 2, dpmpp_2m),
    "dpmpp-3m": Solver("D", 1, 2, dpmpp_3m),
    "unipc-2": Solver("D", 1, 3, unipc(2)),
    "unipc-3": Solver("D", 1, 4, unipc(3)),
    "unipc-2-bh1": Solver("D", 1, 3, unipc(2, "bh1")),
    "unipc-3-bh1": Solver("D", 1, 4, unipc(3, "bh1")),
}
"""iPNDM's weights assume equal steps: ``order`` is what holds on any grid; on a uniform one order k shows."""

ALIASES = {"ddim": "euler", "ipndm": "ipndm-3", "ipndm-1": "euler", "unipc": "unipc-2", "deis": "deis-3"} | {
    f"ipndm-v-{k}": f"deis-{k}" for k in (2, 3, 4)
}
"""Other names of the same method."""


def canonical(name: str) -> str:
    """The name a solver is stored under: that of :data:`SOLVERS`, for an alias too."""
    return ALIASES.get(name, name)


def get(name: str) -> Solver:
    """The solver of that name, or alias.

    Raises:
        InputError: naming the solvers that exist.
    """
    solver = SOLVERS.get(canonical(name))
    if solver is None:
        own = ", or scheduler for a pipeline's own" if name != "scheduler" else "; scheduler is for a pipeline's plan alone"
        raise InputError(f"expected a solver out of {', '.join(SOLVERS)}{own}; found {name!r}")
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
