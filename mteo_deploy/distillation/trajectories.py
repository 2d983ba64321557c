"""Reference trajectories: the frozen backbone's own states at the plan's time points, from a plan of many evaluations."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mteo_deploy.distillation.parallel import Processes
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

    def to(self, device: torch.device) -> Trajectories:
        """The same on a device."""
        requests = {name: values.to(device) for name, values in self.requests.items()}
        return Trajectories(self.noise.to(device), self.states.to(device), requests)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        requests = {f"request.{name}": values for name, values in self.requests.items()}
        try:
            save_file({"noise": self.noise, "states": self.states, **requests}, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """Read a file written by :meth:`save`."""
        tensors = load_file(path)
        requests = {n.removeprefix("request."): v for n, v in tensors.items() if n.startswith("request.")}
        return cls(tensors["noise"], tensors["states"], requests)


def digest(given: Arrays | None) -> str:
    """A name for arrays: equal arrays, equal name."""
    found = hashlib.sha256()
    for name, values in sorted((given or {}).items()):
        found.update(f"{name}{values.shape}{values.dtype}".encode() + np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


def _path(directory: Path, *depends: Any) -> Path:
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    return directory / f"trajectories-{key}.safetensors"


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
    teacher: str = "heun",
    processes: Processes | None = None,
    cache: Path | None = None,
) -> Trajectories:
    """Solve the backbone's ODE finely from ``count`` noises and keep the states at the plan's time points, on the CPU.

    Args:
        progress: called with the number of trajectories finished since the last call.
        given: request inputs to draw from; None for random ones.
        teacher: the solver that does it.
        processes: which share the work, each with its own ``adapter``; None for this one alone, on the CPU.
        cache: a directory where trajectories are kept, by all that they depend on; None: nowhere.
    """
    processes = processes or Processes(torch.device("cpu"))
    fine = reference_plan(plan, adapter.levels, substeps, teacher)
    noise = torch.from_numpy(noise_for(adapter.sample_shape, seed, range(count)))
    requests = adapter.draw_requests(count, seed, given)
    path = None
    if cache is not None:
        drawn = digest({name: values.numpy() for name, values in requests.items()})
        path = _path(
            cache, adapter.fingerprint(), fine.to_json(), substeps, list(noise.shape), seed, drawn, dict(adapter.negatives)
        )
        if path.exists():
            progress(count)
            return Trajectories.load(path)
    whole = Trajectories(noise, torch.zeros(plan.steps, *noise.shape), requests)
    at = [i for i, e in enumerate(fine.evaluations) if e.time_point is not None and e.time_point % substeps == 0]
    timesteps = torch.tensor([e.timestep for e in fine.evaluations], dtype=torch.float32, device=processes.device)
    embeddings = adapter.embeddings(timesteps)
    mine = processes.share(count)
    for start in range(mine.start, mine.stop, batch):
        rows = slice(start, min(start + batch, mine.stop))
        part = whole.take(rows).to(processes.device)

        def network(i: int, state: torch.Tensor, part: Trajectories = part) -> torch.Tensor:
            return adapter(state, *[embedding[i : i + 1] for embedding in embeddings], **part.requests)

        states = run(fine, part.noise, network)
        whole.states[:, rows] = torch.stack([states[i] for i in at]).cpu()
        progress(part.noise.shape[0])
    found = Trajectories(noise, processes.sum(whole.states), requests)
    if path is not None and processes.main:
        found.save(path)
    return found
