"""Reference trajectories: the frozen backbone's own states at the plan's time points, from a plan of many evaluations.

In memory, or in a directory of npy files that are mapped: written as they are computed, and read batch by batch, so that there
may be more of them than there is memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mteo_deploy.directories import whole_directory
from mteo_deploy.distillation.parallel import Processes
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.files import sweep
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

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(values.nbytes for values in self.arrays().values())

    def arrays(self) -> dict[str, torch.Tensor]:
        """All of them, by the name of their file."""
        return {"noise": self.noise, "states": self.states, **{f"request.{n}": v for n, v in self.requests.items()}}

    def mapped(self, directory: Path) -> Trajectories:
        """A copy in npy files of a directory, mapped."""
        found = {}
        for name, values in self.arrays().items():
            array = values.numpy()
            file = np.lib.format.open_memmap(directory / f"{name}.npy", "w+", array.dtype, array.shape)
            _take_room(directory / f"{name}.npy")
            file[:] = array
            found[name] = torch.from_numpy(file)
        return Trajectories._of(found)

    @classmethod
    def load(cls, directory: Path) -> Trajectories:
        """Map the files of a directory that :meth:`mapped` wrote; changes stay in memory."""
        return cls._of({p.stem: torch.from_numpy(np.load(p, "c", allow_pickle=False)) for p in directory.glob("*.npy")})

    @classmethod
    def _of(cls, arrays: dict[str, torch.Tensor]) -> Trajectories:
        requests = {n.removeprefix("request."): v for n, v in arrays.items() if n.startswith("request.")}
        return cls(arrays["noise"], arrays["states"], requests)


def _take_room(path: Path) -> None:
    """Have the disk's blocks for a file before it is written through a map, where a full disk is no error but SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def digest(given: Arrays | None) -> str:
    """A name for arrays: equal arrays, equal name."""
    found = hashlib.sha256()
    for name, values in sorted((given or {}).items()):
        found.update(f"{name}{values.shape}{values.dtype}".encode() + np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


def _path(directory: Path, *depends: Any) -> Path:
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    return directory / f"trajectories-{key}"


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
    limit: int | None = None,
) -> Trajectories:
    """Solve the backbone's ODE finely from ``count`` noises and keep the states at the plan's time points, on the CPU.

    Args:
        progress: called with the number of trajectories finished since the last call.
        given: request inputs to draw from; None for random ones.
        teacher: the solver that does it.
        processes: which share the work, each with its own ``adapter``; None for this one alone, on the CPU.
        cache: a directory where trajectories are kept, by all that they depend on, and mapped; None: in memory.
        limit: bytes that they may take, in memory or in ``cache`` with what is there already; None: what there is.

    Raises:
        InputError: when they would take more than ``limit``, or than the disk has free.
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
    none = torch.zeros(()).expand(plan.steps, *noise.shape)  # takes no memory yet
    planned = Trajectories(noise, none, requests)
    _check_room(planned, cache, limit)
    solve = partial(_solve, adapter, fine, batch, substeps, processes, progress)
    if path is not None and processes.count == 1:
        with _kept(path) as directory:
            solve(planned.mapped(directory))
        return Trajectories.load(path)
    found = Trajectories(noise, torch.zeros(none.shape), requests)
    solve(found)
    found = Trajectories(noise, processes.sum(found.states), requests)
    if path is None:
        return found
    if processes.main:
        with _kept(path) as directory:
            found.mapped(directory)
    processes.wait()
    return Trajectories.load(path)


@contextmanager
def _kept(path: Path) -> Iterator[Path]:
    """A directory that becomes ``path``; where another run came first with the same trajectories, those stay."""
    try:
        with whole_directory(path) as directory:
            yield directory
    except InputError:
        if not path.exists():
            raise


def _check_room(planned: Trajectories, cache: Path | None, limit: int | None) -> None:
    """Raise where what is planned takes more than is allowed or there is."""
    if cache is not None:
        for left in {path.name.removesuffix(".tmp")[:-8] for path in cache.glob(".trajectories-*.tmp")}:
            sweep(cache, left)  # of runs that were killed, with other arguments too
    there = 0 if cache is None else sum(file.stat().st_size for file in cache.glob("trajectories-*/*.npy"))
    wanted, count = planned.nbytes, len(planned.noise)
    each = f"{wanted:,} bytes for {count} reference trajectories, {wanted // count:,} for each"
    way_out = (
        "lower --trajectories or raise --reference-limit" if cache else "lower --trajectories, raise it, or pass --cache DIR"
    )
    if limit is not None and there + wanted > limit:
        kept = f", beside {there:,} bytes that {cache} has already" if there else ""
        raise InputError(f"expected at most {limit:,} bytes with --reference-limit; found {each}{kept}; {way_out}")
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if wanted > free:
            raise InputError(f"expected room for {each} in {cache}; found {free:,} bytes free; lower --trajectories")


def _solve(
    adapter: Adapter,
    fine: Plan,
    batch: int,
    substeps: int,
    processes: Processes,
    progress: Callable[[int], None],
    whole: Trajectories,
) -> None:
    """Put this process's share of the states in their place, a batch at a time."""
    at = [i for i, e in enumerate(fine.evaluations) if e.time_point is not None and e.time_point % substeps == 0]
    timesteps = torch.tensor([e.timestep for e in fine.evaluations], dtype=torch.float32, device=processes.device)
    embeddings = adapter.embeddings(timesteps)
    mine = processes.share(len(whole.noise))
    for start in range(mine.start, mine.stop, batch):
        rows = slice(start, min(start + batch, mine.stop))
        part = whole.take(rows).to(processes.device)

        def network(i: int, state: torch.Tensor, part: Trajectories = part) -> torch.Tensor:
            return adapter(state, *[embedding[i : i + 1] for embedding in embeddings], **part.requests)

        for i, state in enumerate(run(fine, part.noise, network)):
            if i in at:
                whole.states[at.index(i), rows] = state.cpu()
        progress(part.noise.shape[0])
