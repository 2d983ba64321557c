"""How far the student's states are from the reference trajectory's."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mteo_deploy.distillation.recipe import Recipe
from mteo_deploy.plan import Plan

Features = Callable[[torch.Tensor], torch.Tensor]
"""Images ``[batch, channels, height, width]`` to features ``[batch, ...]``, differentiable."""

C = 0.00054


def distance(loss: str, state: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over a batch ``[batch, ...]`` of the squared or absolute error per element, or of the pseudo-Huber distance.

    The last is ``sqrt(|a - b|^2 + c^2) - c`` with ``c = 0.00054 sqrt(d)`` for images of d elements (Song & Dhariwal 2023,
    arXiv 2310.14189, eq. 8 and section 3.3), here over sqrt(d): one scale, whatever the size of the images.
    """
    if loss == "absolute":
        return (state - target).abs().mean()
    squared = (state - target).square().flatten(1).mean(1)
    return (squared if loss == "squared" else (squared + C**2).sqrt() - C).mean()


def objective(
    states: list[torch.Tensor], targets: torch.Tensor, plan: Plan, recipe: Recipe, features: Features | None = None
) -> torch.Tensor:
    """The loss of a batch.

    Args:
        states: after every evaluation, ``[batch, ...]`` each.
        targets: the reference trajectory's states at the plan's time points, ``[steps, batch, ...]``.
        features: of images, whose distance counts with the recipe's ``feature_weight``.
    """
    reached = [s for s, e in zip(states, plan.evaluations, strict=True) if e.time_point is not None]
    errors = [distance(recipe.loss, state, target) for state, target in zip(reached, targets, strict=True)]
    total = errors[-1]
    if recipe.intermediate_weight:
        total = total + recipe.intermediate_weight * sum(errors[:-1], torch.zeros_like(total))
    if features is not None:
        with torch.no_grad():
            wanted = features(targets[-1])
        total = total + recipe.feature_weight * distance(recipe.loss, features(reached[-1]), wanted)
    return total
