"""``distill``: learn an embedding set for a frozen backbone from reference trajectories (torch)."""

from mteo_deploy.distillation.run import Recipe, distill

__all__ = ["Recipe", "distill"]
