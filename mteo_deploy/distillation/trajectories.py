"""Reference trajectories: the frozen backbone's own states at the plan's time points, from a plan of many evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mteo_deploy.exporters.base import Adapter
from mteo_deploy.plan import Plan, reference_plan, run
from mteo_deploy.requests import Arrays
from mteo_deploy.sampler import noise_for


@dataclass(frozen=True)
class Trajectories:
    """Noise ``[count, ...]`` and the reference states at each time point, ``[steps, count, ...]``, at unit variance.

    Attributes:
        requests: request inputs, ``[count, ...]`` each.
    """

    noise: torch.Tensor
    states: torch.Tensor
    requests: dict[str, torch.Tensor]

    def take(self, rows: torch.Tensor | slice) -> Trajectories:
        """Some of the trajectories."""
        requests = {name: values[rows] for name, values in self.requests.items()}
        return Trajectories(self.noise[rows], self.states[:, rows], requests)


@torch.no_grad()
def reference_trajectories(
    adapter: Adapter,
    plan: Plan,
    *,
    count: int,
    seed: int,
    batch: int,
    substeps: int,
    progress: Callable[[int], None],
    given: Arrays | None = None,
) -> Trajectories:
    """Solve the backbone's ODE finely from ``count`` noises and keep the states at the plan's time points.

    Args:
        progress: called with the number of trajectories finished since the last call.
        given: request inputs to draw from; None for random ones.
    """
    fine = reference_plan(plan, adapter.levels, substeps)
    embeddings = adapter.embeddings(torch.tensor([e.timestep for e in fine.evaluations], dtype=torch.float32))
    noise = torch.from_numpy(noise_for(adapter.sample_shape, seed, range(count)))
    requests = adapter.draw_requests(count, seed, given)
    at = [i for i, e in enumerate(fine.evaluations) if e.time_point is not None and e.time_point % substeps == 0]
    chunks = []
    for start in range(0, count, batch):
        part = {name: values[start : start + batch] for name, values in requests.items()}

        def network(i: int, state: torch.Tensor, part: dict[str, torch.Tensor] = part) -> torch.Tensor:
            return adapter(state, *[embedding[i : i + 1] for embedding in embeddings], **part)

        states = run(fine, noise[start : start + batch], network)
        chunks.append(torch.stack([states[i] for i in at]))
        progress(chunks[-1].shape[1])
    return Trajectories(noise, torch.cat(chunks, dim=1), requests)
