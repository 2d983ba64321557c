"""``distill``: learn an embedding set for a frozen backbone from reference trajectories (torch)."""

from mteo_deploy.distillation.recipe import Recipe
from mteo_deploy.distillation.run import distill

__all__ = ["Recipe", "distill"]
