"""A plan whose own numbers are learned: time points and the coefficients of the updates. They cost nothing at inference.

The plan stays what the compiler makes of solver and points. Its derivatives with respect to the few points are taken by central
differences in float64, which is right for every solver, schedule and parameterisation and needs no second compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mteo_deploy.errors import InputError
from mteo_deploy.plan import Plan, compile_plan
from mteo_deploy.schedules import SCHEDULER, Levels

Array = NDArray[np.float64]
SCHEDULE = "learned"
"""The name of a schedule whose points were learned."""
STEP = 1e-5


class _Differences(torch.autograd.Function):
    """``function(at)`` of a float64 vector, its derivative by central differences."""

    @staticmethod
    def forward(ctx: Any, at: torch.Tensor, function: Callable[[Array], Array]) -> torch.Tensor:
        ctx.at, ctx.function = at.detach().numpy(), function
        return torch.from_numpy(function(ctx.at))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        found = []
        for i, value in enumerate(ctx.at):
            shift = np.zeros_like(ctx.at)
            shift[i] = STEP * abs(value)
            slope = (ctx.function(ctx.at + shift) - ctx.function(ctx.at - shift)) / (2 * shift[i])
            found.append((gradient.numpy() * slope).sum())
        return torch.from_numpy(np.array(found)), None


class LearnedPlan(torch.nn.Module):
    """The numbers of ``plan``, those named in ``learn`` as parameters (float64, on the CPU).

    Points: the gaps between them in ``sigma**(1/rho)``, in which the polynomial schedule is uniform, are a softmax of free
    numbers, so they stay in order between the first and the last. Coefficients: a factor ``1 + p`` on each carry and weight.

    Raises:
        InputError: when there is no point between the first and the last to learn, or the solver is a scheduler's own.
    """

    def __init__(self, plan: Plan, levels: Levels, learn: Collection[str]) -> None:
        super().__init__()
        if "points" in learn and plan.steps < 2:
            raise InputError("expected --steps of 2 or more with --learn points: one step has no point between its ends")
        if "points" in learn and plan.solver == SCHEDULER:
            raise InputError(
                "expected --learn points with a solver of docs/solvers.md; found scheduler, whose points are its own"
            )
        self.start, self.levels = plan, levels
        roots = np.asarray(plan.sigmas) ** (1 / levels.rho)
        gaps = torch.from_numpy(-np.diff(roots))
        self.gaps = torch.nn.Parameter(gaps.log()) if "points" in learn else None
        shape = len(plan.evaluations), plan.history + 2
        self.factors = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) if "coefficients" in learn else None
        self._ends = float(roots[0]), float(roots[-1])

    def _compile(self, roots: Array) -> Plan:
        """The plan with other points between the first and the last, in ``sigma**(1/rho)``."""
        if self.gaps is None:
            return self.start
        plan = self.start
        return compile_plan(
            self.levels,
            steps=plan.steps,
            solver=plan.solver,
            schedule=SCHEDULE,
            prediction_type=plan.prediction_type,
            points=[plan.sigmas[0], *(roots**self.levels.rho).tolist(), plan.sigmas[-1]],
        )

    def _numbers(self, roots: Array) -> Array:
        """``[evaluations, (timestep, keep_state, keep_output, carry, weights...)]``."""
        rows = np.zeros((len(self.start.evaluations), 5 + self.start.history))
        for row, e in zip(rows, self._compile(roots).evaluations, strict=True):
            row[:4] = e.timestep, e.keep_state, e.keep_output, e.carry
            row[4 : 4 + len(e.weights)] = e.weights
        return rows

    def _roots(self) -> torch.Tensor:
        if self.gaps is None:
            return torch.zeros(0, dtype=torch.float64)
        first, last = self._ends
        return first - (first - last) * torch.cumsum(torch.softmax(self.gaps, 0), 0)[:-1]

    def numbers(self) -> torch.Tensor:
        """The plan's numbers with gradients, float64 ``[evaluations, 5 + history]``, as :meth:`rows` takes them."""
        found = _Differences.apply(self._roots(), self._numbers)
        if self.factors is None:
            return found
        return torch.cat([found[:, :3], found[:, 3:] * (1 + self.factors)], dim=1)

    def with_numbers(self, numbers: Any) -> Plan:
        """The plan with these numbers, tensors or floats, for :func:`mteo_deploy.plan.run`."""
        plan = self._compile(self._roots().detach().numpy())
        rows = [
            replace(
                e,
                timestep=row[0],
                keep_state=row[1],
                keep_output=row[2],
                carry=row[3],
                weights=tuple(row[4 : 4 + len(e.weights)]),
            )
            for e, row in zip(plan.evaluations, numbers, strict=True)
        ]
        return replace(plan, evaluations=tuple(rows))

    def plan(self) -> Plan:
        """What was learned, in plain numbers."""
        return self.with_numbers(self.numbers().detach().tolist())
