"""Other lightweight ways to few-step sampling on the same frozen backbone, learned from its reference trajectories.

Each adds a few numbers to a plain multistep solver and changes no weight; each is written after its paper's idea, not its
code, and trained here as the packaged sets are: end to end, the mean absolute error of the last state, Adam.

- scalar time: the time told to the network and a factor on its direction, per evaluation. After TimeTuner (Xia et al. 2023,
  arXiv 2310.09469) and the scalings of AMED-Plugin (Zhou et al. 2023, arXiv 2312.00094).
- time points: the interior noise levels, and the time told to the network at each. After LD3 (Tong et al. 2024, arXiv
  2405.15506) and GITS (Chen et al. 2024, arXiv 2405.11326).
- principal directions: coordinates of the direction in a basis of the trajectory's own principal directions. After PAS (Wang
  et al. 2024, arXiv 2411.06503).

The solver below them is Euler, second-order iPNDM (Adams-Bashforth as if steps were even) or second-order DEIS (as they are),
of which `benchmarks/results.py` takes the best: plain iPNDM of the third order is nearer at none of 2 to 8 evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mteo_deploy.distillation.losses import distance
from mteo_deploy.schedules import NoiseLevels

TIMESTEPS = 100.0
"""What a learned offset of 1 is in the backbone's timesteps: Adam moves every number by about its learning rate."""

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(state at unit variance [n, ...], timestep []) -> predicted noise [n, ...]``."""


class Neighbour(torch.nn.Module):
    """A multistep solver of an epsilon backbone in ``x = x0 + sigma noise``; without learned numbers, as here, the plain one.

    Attributes:
        lr: of Adam: what it learned best with at 3 evaluations, of several between 0.001 and 0.05.

    Args:
        sigmas: ``steps + 1`` noise levels, highest first.
        solver: ``euler``, ``ipndm-2`` or ``deis-2``.
    """

    lr = 0.02

    def __init__(self, levels: NoiseLevels, sigmas: Sequence[float], solver: str) -> None:
        super().__init__()
        self.solver, self.steps = solver, len(sigmas) - 1
        self.register_buffer("grid", torch.tensor(sigmas, dtype=torch.float64))
        self.register_buffer("log_sigmas", torch.from_numpy(np.log(levels.sigma)))

    def sigmas(self) -> torch.Tensor:
        return self.grid

    def timesteps(self, sigmas: torch.Tensor) -> torch.Tensor:
        """The backbone's continuous timestep at noise levels ``[n]``: :meth:`NoiseLevels.timestep`, differentiable."""
        log = sigmas.log().clamp(self.log_sigmas[0], self.log_sigmas[-1])
        below = torch.searchsorted(self.log_sigmas, log.detach(), right=True).clamp(1, len(self.log_sigmas) - 1) - 1
        low, high = self.log_sigmas[below], self.log_sigmas[below + 1]
        return below + (log - low) / (high - low)

    def times(self, sigmas: torch.Tensor) -> torch.Tensor:
        """What the network is told at each evaluation, ``[steps]``."""
        return self.timesteps(sigmas[:-1])

    def direction(self, i: int, found: torch.Tensor, before: list[torch.Tensor]) -> torch.Tensor:
        """What stands for the direction ``d = dx/dsigma`` that was found; ``before`` begins with the noise."""
        return found

    def forward(self, noise: torch.Tensor, network: Network) -> torch.Tensor:
        """Noise ``[n, ...]`` to images."""
        sigmas = self.sigmas()
        times, x = self.times(sigmas), noise * sigmas[0].float()
        before, used = [noise], list[torch.Tensor]()
        for i in range(self.steps):
            found = network(x / (1 + sigmas[i] ** 2).sqrt().float(), times[i].float())
            used.insert(0, self.direction(i, found, before))
            before.append(found)
            length, step = sigmas[i + 1] - sigmas[i], used[0]
            if i > 0 and self.solver != "euler":
                ratio = length / (sigmas[i] - sigmas[i - 1]) if self.solver == "deis-2" else torch.ones(())
                step = used[0] + (ratio / 2).float() * (used[0] - used[1])
            x = x + length.float() * step
        return x


class ScalarTime(Neighbour):
    """Two numbers an evaluation: an offset on the time told to the network, and a factor on the direction."""

    def __init__(self, levels: NoiseLevels, sigmas: Sequence[float], solver: str) -> None:
        super().__init__(levels, sigmas, solver)
        self.offset = torch.nn.Parameter(torch.zeros(self.steps, dtype=torch.float64))
        self.log_factor = torch.nn.Parameter(torch.zeros(self.steps))

    def times(self, sigmas: torch.Tensor) -> torch.Tensor:
        return (super().times(sigmas) + TIMESTEPS * self.offset).clamp(0, len(self.log_sigmas) - 1)

    def direction(self, i: int, found: torch.Tensor, before: list[torch.Tensor]) -> torch.Tensor:
        return self.log_factor[i].exp() * found


class TimePoints(Neighbour):
    """Interior noise levels, falling by construction, and the time told to the network at each evaluation."""

    def __init__(self, levels: NoiseLevels, sigmas: Sequence[float], solver: str) -> None:
        super().__init__(levels, sigmas, solver)
        self.shares = torch.nn.Parameter((-self.grid.log().diff()).log())
        self.offset = torch.nn.Parameter(torch.zeros(self.steps, dtype=torch.float64))

    def sigmas(self) -> torch.Tensor:
        log = self.grid.log()
        fallen = self.shares.softmax(0).cumsum(0)
        return torch.cat([self.grid[:1], (log[0] + fallen[:-1] * (log[-1] - log[0])).exp(), self.grid[-1:]])

    def times(self, sigmas: torch.Tensor) -> torch.Tensor:
        return (super().times(sigmas) + TIMESTEPS * self.offset).clamp(0, len(self.log_sigmas) - 1)


class PrincipalDirections(Neighbour):
    """Four coordinates an evaluation: along the direction found, and along three principal directions of the trajectory so far
    that are orthogonal to it, in units of its length. Their signs are fixed by the noise."""

    WIDTH = 3
    lr = 0.005

    def __init__(self, levels: NoiseLevels, sigmas: Sequence[float], solver: str) -> None:
        super().__init__(levels, sigmas, solver)
        self.along = torch.nn.Parameter(torch.ones(self.steps))
        self.across = torch.nn.Parameter(torch.zeros(self.steps, self.WIDTH))

    def direction(self, i: int, found: torch.Tensor, before: list[torch.Tensor]) -> torch.Tensor:
        basis = principal_directions(found.detach(), [one.detach() for one in before], self.WIDTH)
        length = found.flatten(1).norm(dim=1).view(-1, *[1] * (found.dim() - 1))
        across = torch.einsum("k,nk...->n...", self.across[i, : basis.shape[1]], basis)
        return self.along[i] * found + length * across


def principal_directions(found: torch.Tensor, before: list[torch.Tensor], width: int) -> torch.Tensor:
    """Orthonormal ``[n, up to width, ...]``, orthogonal to ``found``: the largest principal directions of ``before``."""
    rows = torch.stack([one.flatten(1) for one in before], dim=1).double()
    unit = torch.nn.functional.normalize(found.flatten(1).double(), dim=1).unsqueeze(1)
    rows = rows - (rows * unit).sum(2, keepdim=True) * unit
    values, vectors = torch.linalg.eigh(rows @ rows.transpose(1, 2))
    basis = vectors.flip(2)[:, :, :width].transpose(1, 2) @ rows
    basis = basis / values.flip(1)[:, :width].clamp(min=1e-12).sqrt().unsqueeze(2)
    sign = (basis * rows[:, :1]).sum(2, keepdim=True).sign()
    return (basis * torch.where(sign == 0, 1.0, sign)).float().unflatten(2, found.shape[1:])


METHODS: dict[str, type[Neighbour]] = {
    "scalar time": ScalarTime,
    "time points": TimePoints,
    "principal directions": PrincipalDirections,
}


@dataclass(frozen=True)
class Budget:
    """How a neighbour is trained."""

    iterations: int = 120
    batch: int = 32
    seed: int = 0


def learn(student: Neighbour, network: Network, noise: torch.Tensor, images: torch.Tensor, budget: Budget) -> list[float]:
    """Train a neighbour on the reference trajectories' noise and images ``[count, ...]``; the loss of each iteration."""
    optimizer, losses = torch.optim.Adam(student.parameters(), lr=student.lr), []
    for iteration in range(budget.iterations):
        generator = torch.Generator().manual_seed(budget.seed * 1_000_003 + iteration)
        rows = torch.randint(len(noise), (budget.batch,), generator=generator)
        loss = distance("absolute", student(noise[rows], network), images[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = student.lr * 0.5 * (1 + math.cos(math.pi * iteration / budget.iterations))
        optimizer.step()
        losses.append(loss.item())
    return losses


def numbers(student: Neighbour) -> dict[str, Any]:
    """What was learned, as JSON."""
    return {name: parameter.detach().tolist() for name, parameter in student.named_parameters()}


def restore(student: Neighbour, found: dict[str, Any]) -> Neighbour:
    """Inverse of :func:`numbers`."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(torch.tensor(found[name], dtype=parameter.dtype))
    return student
