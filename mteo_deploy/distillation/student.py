"""The student: the frozen backbone in few evaluations, with what is learned for each."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from mteo_deploy.distillation.learned_plan import LearnedPlan
from mteo_deploy.distillation.recipe import DEFAULT, Recipe
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, site_dict
from mteo_deploy.exporters.fake_quantize import FakeQuantised
from mteo_deploy.plan import Plan, run
from mteo_deploy.requests import GUIDANCE_SCALE

SLOW = 0.1
"""Learning rate of single numbers (times, points, coefficients) beside that of vectors: each moves the whole image."""
SETTLED = 0.5
"""Share of the iterations before the solver's coefficients begin to move, for embeddings that have found their place."""


class Student(torch.nn.Module):
    """The deltas, and the plan run with them.

    Attributes:
        start: the plan before any of its numbers is learned.
        delta: ``[evaluations, sites, width]``; one site with ``share="step"``; with ``share="time"`` ``[evaluations]``,
            shifts of the timestep over the plan's range of timesteps.
        recompute: an evaluation's activations are not kept, but computed again for its gradient.
        quantised: the backbone's layers while they are fake quantised; None while they are not.

    Raises:
        InputError: when the sites have nothing to share.
    """

    def __init__(self, adapter: Adapter, plan: Plan, recipe: Recipe = DEFAULT) -> None:
        super().__init__()
        self.adapter, self.recipe = (adapter,), recipe  # in a tuple: the backbone's parameters are not ours
        self.learned = LearnedPlan(plan, adapter.levels, recipe.learn) if recipe.learn else None
        self.start, self.recompute = plan, False
        self.quantised: FakeQuantised | None = None
        timesteps = [e.timestep for e in plan.evaluations]
        self._span = max(timesteps) - min(timesteps) or 1.0
        self._device = next(adapter.parameters()).device
        with torch.no_grad():
            self.base = self._embeddings(torch.tensor(timesteps, dtype=torch.float32))
        if recipe.share == "step" and not torch.equal(self.base, self.base[:, :1].expand_as(self.base)):
            raise InputError(
                f"expected a backbone whose sites share one embedding for --share step; those of {adapter.family} differ; use "
                "--share none or --share time"
            )
        shared = {"none": self.base, "step": self.base[:, :1], "time": self.base[:, 0, 0]}[recipe.share]
        self.delta = torch.nn.Parameter(torch.zeros_like(shared))

    def _embeddings(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Pretrained embeddings ``[evaluations, sites, width]``."""
        return torch.stack(self.adapter[0].embeddings(timesteps.to(self._device, torch.float32)), dim=1)

    @property
    def plan(self) -> Plan:
        """In plain numbers, as learned so far."""
        return self.start if self.learned is None else self.learned.plan()

    def _rows(self, timesteps: torch.Tensor | None) -> torch.Tensor:
        """The embeddings ``[evaluations, sites, width]`` as learned, at other timesteps than the plan's first if given."""
        if self.recipe.share == "time":
            at = torch.tensor([e.timestep for e in self.start.evaluations]) if timesteps is None else timesteps
            return self._embeddings(at.to(self._device, torch.float32) + self._span * self.delta)
        return (self.base if timesteps is None else self._embeddings(timesteps)) + self.delta

    def forward(self, noise: torch.Tensor, requests: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """States after every evaluation; stepwise, no gradient goes from one step to the one before."""
        numbers = None if self.learned is None else self.learned.numbers()
        plan = self.start if self.learned is None else self.learned.with_numbers(numbers)
        rows = self._rows(None if numbers is None else numbers[:, 0])

        requests = {name: self._cast(values) if name != GUIDANCE_SCALE else values for name, values in requests.items()}

        def network(i: int, state: torch.Tensor) -> torch.Tensor:
            if self.quantised is not None:
                self.quantised.evaluation = i
            return self._call(state, rows[i].unsqueeze(1).unbind(), requests)

        between = torch.Tensor.detach if self.recipe.objective == "stepwise" else None
        return list(run(plan, noise, network, between))

    def _call(
        self, state: torch.Tensor, embeddings: tuple[torch.Tensor, ...], requests: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        adapter, given = self.adapter[0], (self._cast(state), *map(self._cast, embeddings))
        if self.recompute and torch.is_grad_enabled():
            found: torch.Tensor = checkpoint(partial(adapter, **requests), *given, use_reentrant=False)
            return found.float()
        return adapter(*given, **requests).float()

    def _cast(self, values: torch.Tensor) -> torch.Tensor:
        """What goes into the backbone has the type of its weights; states and embeddings are float32 outside it."""
        return values.to(next(self.adapter[0].parameters()).dtype) if values.is_floating_point() else values

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer, their learning ``rate``, and ``after`` which share of the iterations they move."""
        vectors = [] if self.recipe.share == "time" else [self.delta]
        coefficients = [] if self.learned is None or self.learned.factors is None else [self.learned.factors]
        numbers = [p for p in self.parameters() if all(p is not one for one in (*vectors, *coefficients))]
        found = (vectors, lr, 0.0), (numbers, lr * SLOW, 0.0), (coefficients, lr * SLOW, SETTLED)
        return [{"params": ps, "lr": rate, "rate": rate, "after": after} for ps, rate, after in found if ps]

    @torch.no_grad()
    def deltas(self) -> dict[str, NDArray[np.float32]]:
        """Per site ``[evaluations, width]``, on the pretrained embedding at the plan's timesteps."""
        rows: torch.Tensor = self.delta
        if self.recipe.share == "time":
            timesteps = torch.tensor([e.timestep for e in self.plan.evaluations], dtype=torch.float32)
            rows = self._rows(timesteps) - self._embeddings(timesteps)
        rows = rows.expand_as(self.base).cpu()
        return {site.name: rows[:, i].contiguous().numpy() for i, site in enumerate(self.adapter[0].sites)}

    @torch.no_grad()
    def start_from(self, found: EmbeddingSet) -> None:
        """Take the deltas of another set that :func:`check_start` has nothing against."""
        deltas = [torch.from_numpy(np.asarray(found.deltas[site.name])) for site in self.adapter[0].sites]
        self.delta.copy_(torch.stack(deltas, dim=1))


def check_start(found: EmbeddingSet, adapter: Adapter, plan: Plan, recipe: Recipe) -> None:
    """Whether one can start from a set: it has as many evaluations, and may be another backbone's with the same sites.

    Raises:
        InputError: when its shapes differ, or one vector for each site is not what is learned.
    """
    if recipe.share != "none":
        raise InputError(f"expected --share none with --init, whose vectors are the sites' own; found {recipe.share}")
    evaluations, given = len(plan.evaluations), len(found.plan.evaluations)
    if evaluations != given:
        raise InputError(f"expected --init with a set of {evaluations} evaluations; found {given}; pass --steps as it has")
    found.check(found.backbone, site_dict(adapter.sites))


def start_plan(found: EmbeddingSet, plan: Plan, recipe: Recipe) -> Plan:
    """``plan`` itself, or what a set to start from has learned of it; points to be learned begin where the plan has them."""
    plain = found.plain_plan
    same = (plain.solver, plain.steps, plain.prediction_type) == (plan.solver, plan.steps, plan.prediction_type)
    if not same or found.plan == plain or "points" in recipe.learn:
        return plan
    return found.plan if np.allclose(plain.sigmas, plan.sigmas, rtol=1e-9) else plan
