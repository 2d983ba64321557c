"""The recipe: train one delta per (evaluation, site), end to end through all evaluations of the plan.

End to end, because an error made early is then paid for where it shows; on a small MNIST backbone training step by step
on detached states stayed four times further from the reference for the same budget.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mteo_deploy.distillation.trajectories import Trajectories, reference_trajectories
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.plan import Plan, default_substeps, reference_plan, run
from mteo_deploy.progress import Reporter, reporter
from mteo_deploy.requests import Arrays, draw_all, read


@dataclass(frozen=True)
class Recipe:
    """Budget and optimiser of a distillation.

    Attributes:
        trajectories: how many reference trajectories to learn from (a further 1/8 is held out for the report).
        iterations, batch, lr: Adam with cosine decay to zero and gradients clipped at norm 1.
        intermediate: weight of the loss on the time points before the last.
        substeps: reference intervals inside each interval of the plan; None for about 36 evaluations in all.
        bf16: run the backbone under bf16 autocast while training (the reference is always float32).

    Raises:
        InputError: for a count below 1 or a learning rate that is not positive.
    """

    trajectories: int = 1024
    iterations: int = 400
    batch: int = 64
    lr: float = 0.05
    intermediate: float = 0.1
    substeps: int | None = None
    seed: int = 1_000_000
    bf16: bool = False

    def __post_init__(self) -> None:
        if min(self.trajectories, self.iterations, self.batch) < 1:
            raise InputError("expected at least 1 trajectory, iteration and batch; see `mteo-deploy distill --help`")
        if not 0 < self.lr < math.inf:
            raise InputError(f"expected a learning rate above 0; found --lr {self.lr}")


def _delta_loss(states: list[torch.Tensor], targets: torch.Tensor, plan: Plan, intermediate: float) -> torch.Tensor:
    reached = [s for s, e in zip(states, plan.evaluations, strict=True) if e.time_point is not None]
    errors = [(state - target).square().mean() for state, target in zip(reached, targets, strict=True)]
    return errors[-1] + intermediate * sum(errors[:-1], torch.zeros(()))


class Student(torch.nn.Module):
    """The deltas ``[evaluations, width]`` per site, and the plan run with them."""

    def __init__(self, adapter: Adapter, plan: Plan) -> None:
        super().__init__()
        self.adapter, self.plan = (adapter,), plan  # in a tuple: the backbone's parameters are not ours
        with torch.no_grad():
            timesteps = torch.tensor([e.timestep for e in plan.evaluations], dtype=torch.float32)
            self.base = torch.stack(adapter.embeddings(timesteps), dim=1)  # [evaluations, sites, width]
        self.delta = torch.nn.Parameter(torch.zeros_like(self.base))

    def forward(self, noise: torch.Tensor, requests: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        def network(i: int, state: torch.Tensor) -> torch.Tensor:
            rows = (self.base[i] + self.delta[i]).unsqueeze(1)
            return self.adapter[0](state, *rows.unbind(), **requests).float()

        return list(run(self.plan, noise, network))


class _Checkpoint:
    """Deltas and Adam moments beside the output, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path, key: str, student: Student, optimizer: torch.optim.Adam) -> None:
        self.path, self.key = path, key
        self.delta, self.optimizer = student.delta, optimizer

    def save(self, iteration: int, seconds: float) -> None:
        state = self.optimizer.state[self.delta]
        tensors = {"delta": self.delta.detach().clone(), **{k: state[k].clone() for k in ("exp_avg", "exp_avg_sq", "step")}}
        temporary = self.path.with_suffix(".tmp")
        save_file(tensors, temporary, {"iteration": str(iteration), "seconds": str(seconds), "key": self.key})
        os.replace(temporary, self.path)

    def load(self) -> tuple[int, float]:
        if not self.path.exists():
            return 0, 0.0
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
            if metadata["key"] != self.key:
                return 0, 0.0
            with torch.no_grad():
                self.delta.copy_(file.get_tensor("delta"))
            self.optimizer.state[self.delta] = {k: file.get_tensor(k) for k in ("exp_avg", "exp_avg_sq", "step")}
        return int(metadata["iteration"]), float(metadata["seconds"])


def _train(student: Student, data: Trajectories, recipe: Recipe, path: Path, key: str, report: Reporter) -> float:
    """Train the deltas, with a checkpoint at ``path`` every half minute; returns the seconds spent."""
    optimizer = torch.optim.Adam([student.delta], lr=recipe.lr)
    checkpoint = _Checkpoint(path, key, student, optimizer)
    start, spent = checkpoint.load()
    clock, saved = time.monotonic() - spent, time.monotonic()
    task = report.task("learning", recipe.iterations, start)
    for iteration in range(start, recipe.iterations):
        generator = torch.Generator().manual_seed(recipe.seed + iteration)
        drawn = data.take(torch.randint(data.noise.shape[0], (recipe.batch,), generator=generator))
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            states = student(drawn.noise, drawn.requests)
        loss = _delta_loss(states, drawn.states, student.plan, recipe.intermediate)
        if not torch.isfinite(loss):
            raise InputError(f"the loss is {loss.item()} at iteration {iteration}; lower --lr (now {recipe.lr})")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([student.delta], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * iteration / recipe.iterations))
        optimizer.step()
        report.advance(task, 1, f"loss {loss.item():.4f}")
        if time.monotonic() - saved > 30:
            checkpoint.save(iteration + 1, time.monotonic() - clock)
            saved = time.monotonic()
    return time.monotonic() - clock


@torch.no_grad()
def _error(student: Student, data: Trajectories, batch: int) -> float:
    """Mean squared error of the image against the reference trajectory's, over held-out noise."""
    errors = []
    for i in range(0, data.noise.shape[0], batch):
        part = data.take(slice(i, i + batch))
        errors.append((student(part.noise, part.requests)[-1] - part.states[-1]).square().flatten(1).mean(1))
    return float(torch.cat(errors).mean())


def _requests(adapter: Adapter, requests: Path | str | Arrays | None) -> Arrays | None:
    """What trajectories draw from; None for random class labels.

    Raises:
        InputError: when the backbone wants what cannot be drawn at random, such as prompts.
    """
    wanted = [request.name for request in adapter.requests if request.high is None]
    if requests is None and wanted:
        raise InputError(
            f"expected values of {', '.join(wanted)} to learn from (prompt embeddings, say); pass --requests FILE, an npz with "
            "an array [rows, ...] for each"
        )
    found = read(Path(requests)) if isinstance(requests, (Path, str)) else requests
    if found is not None:
        draw_all(adapter.requests, 1, 0, found)  # said before the work
    return found


def _digest(given: Arrays | None) -> str:
    digest = hashlib.sha256()
    for name, values in sorted((given or {}).items()):
        digest.update(f"{name}{values.shape}{values.dtype}".encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def distill(
    model: Path | str | Adapter,
    output: Path | str,
    *,
    steps: int,
    solver: str = "euler",
    schedule: str | None = None,
    recipe: Recipe = Recipe(),
    requests: Path | str | Arrays | None = None,
    quiet: bool = False,
) -> EmbeddingSet:
    """Learn an embedding set and write it to ``output``.

    Args:
        model: diffusers pipeline directory, or a backbone that :func:`~mteo_deploy.exporters.base.load_backbone` gave; its
            network is frozen.
        output: the ``.safetensors`` file to write; a checkpoint lies beside it while the run lasts, and a second call
            with the same arguments goes on from there.
        steps: intervals of the schedule (evaluations, for solvers with one evaluation per interval).
        schedule: where the time points lie; None for the backbone's default.

        requests: what the backbone wants beside the noise, to learn from: an npz file or arrays ``[rows, ...]`` by name, of
            which trajectories draw rows. None draws at random, which only class labels allow.

    Returns:
        The set; its ``training`` holds the parameters trained, the time, and the error before and after.

    Raises:
        InputError: for a model that is not supported, or arguments no plan can be made of.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise InputError(f"expected an output file ending in .safetensors; found {output}")
    adapter = model if isinstance(model, Adapter) else load_backbone(Path(model))
    plan = adapter.compile_plan(steps, solver, schedule)
    output.parent.mkdir(parents=True, exist_ok=True)
    fingerprint = adapter.fingerprint()
    given = _requests(adapter, requests)
    key = json.dumps([fingerprint, plan.to_json(), asdict(recipe), _digest(given)], sort_keys=True)
    checkpoint = output.with_suffix(".checkpoint.safetensors")
    held_out = max(16, recipe.trajectories // 8)
    substeps = recipe.substeps or default_substeps(plan)
    with reporter(quiet) as report:
        task = report.task("reference trajectories", recipe.trajectories + held_out)
        clock = time.monotonic()
        everything = reference_trajectories(
            adapter,
            plan,
            count=recipe.trajectories + held_out,
            seed=recipe.seed,
            batch=recipe.batch,
            substeps=substeps,
            progress=lambda n: report.advance(task, n),
            given=given,
        )
        reference_seconds = time.monotonic() - clock
        train, test = everything.take(slice(held_out, None)), everything.take(slice(held_out))
        student = Student(adapter, plan)
        before = _error(student, test, recipe.batch)
        seconds = _train(student, train, recipe, checkpoint, key, report)
        after = _error(student, test, recipe.batch)
    deltas = {site.name: student.delta.detach()[:, i].contiguous().numpy() for i, site in enumerate(adapter.sites)}
    training = {
        "recipe": asdict(recipe),
        "reference": {
            "solver": "heun",
            "evaluations": len(reference_plan(plan, adapter.levels, substeps).evaluations),
            "seconds": round(reference_seconds, 1),
        },
        "parameters": student.delta.numel(),
        "share_of_backbone": student.delta.numel() / adapter.parameter_count,
        "seconds": round(seconds, 1),
        "error_before": before,
        "error_after": after,
    }
    result = EmbeddingSet(deltas, plan, fingerprint, training)
    result.save(output)
    checkpoint.unlink(missing_ok=True)
    return result
