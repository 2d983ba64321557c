"""The training: Adam on what the student learns, with a checkpoint from which an interrupted run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mteo_deploy.distillation.losses import Features, objective
from mteo_deploy.distillation.parallel import Processes
from mteo_deploy.distillation.student import Student
from mteo_deploy.distillation.trajectories import Trajectories
from mteo_deploy.errors import InputError
from mteo_deploy.files import save_tensors
from mteo_deploy.progress import Reporter

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Checkpoint:
    """What is learned and Adam's moments beside the output, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path, key: str, student: Student, optimizer: torch.optim.Adam) -> None:
        self.path, self.key = path, key
        self.parameters, self.optimizer = dict(student.named_parameters()), optimizer

    def save(self, iteration: int, seconds: float) -> None:
        tensors = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"{name}/{moment}": state[moment].clone() for moment in MOMENTS}
        metadata = {"iteration": str(iteration), "seconds": str(seconds), "key": self.key}
        save_tensors(save_file, tensors, self.path, metadata)

    def load(self) -> tuple[int, float]:
        """Iterations done and seconds spent; none when there is no checkpoint of this run."""
        if not self.path.exists():
            return 0, 0.0
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
            if metadata["key"] != self.key:
                return 0, 0.0
            for name, parameter in self.parameters.items():
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(name))
                state = {moment: file.get_tensor(f"{name}/{moment}") for moment in MOMENTS}
                self.optimizer.state[parameter] = {m: v if m == "step" else v.to(parameter.device) for m, v in state.items()}
        return int(metadata["iteration"]), float(metadata["seconds"])


def _step(
    student: Student, data: Trajectories, iteration: int, processes: Processes, features: Features | None
) -> torch.Tensor:
    """Leave the gradient of one batch in the student; returns the loss. Every process draws the batch and takes its rows."""
    recipe = student.recipe
    generator = torch.Generator().manual_seed(recipe.seed + iteration)
    drawn = torch.randint(data.noise.shape[0], (recipe.batch,), generator=generator)[processes.share(recipe.batch)]
    part = data.take(drawn).to(processes.device)
    with torch.autocast(processes.device.type, torch.bfloat16, enabled=recipe.bf16):
        states = student(part.noise, part.requests)
    loss = objective(states, part.states, student.start, recipe, features) * (len(drawn) / recipe.batch)
    total = processes.sum(loss.detach())
    if not torch.isfinite(total):
        raise InputError(f"the loss is {total.item()} at iteration {iteration}; lower --lr (now {recipe.lr})")
    loss.backward()
    processes.sum_gradients(list(student.parameters()))
    return total


def train(
    student: Student,
    data: Trajectories,
    path: Path,
    key: str,
    report: Reporter,
    processes: Processes,
    features: Features | None = None,
) -> float:
    """Train the student, with a checkpoint at ``path`` every half minute; returns the seconds spent.

    Raises:
        InputError: for a loss that is not finite, or fewer images in a batch than processes.
    """
    recipe = student.recipe
    if recipe.batch < processes.count:
        raise InputError(f"expected --batch of at least the {processes.count} processes; found {recipe.batch}")
    optimizer = torch.optim.Adam(student.groups(recipe.lr))
    checkpoint = Checkpoint(path, key, student, optimizer)
    start, spent = checkpoint.load()
    processes.wait()  # all have read it before the first writes the next
    with recomputing(student):
        return _iterate(student, data, checkpoint, optimizer, (start, spent), report, processes, features)


@contextmanager
def recomputing(student: Student) -> Iterator[None]:
    """What the recipe says of checkpointing: by block where the network can, else by evaluation."""
    if not student.recipe.checkpointing:
        yield
        return
    with student.adapter[0].recomputing_blocks() as by_block:
        student.recompute = not by_block
        try:
            yield
        finally:
            student.recompute = False


def _iterate(
    student: Student,
    data: Trajectories,
    checkpoint: Checkpoint,
    optimizer: torch.optim.Adam,
    begun: tuple[int, float],
    report: Reporter,
    processes: Processes,
    features: Features | None,
) -> float:
    recipe, (start, spent) = student.recipe, begun
    clock, saved = time.monotonic() - spent, time.monotonic()
    task = report.task("learning", recipe.iterations, start)
    for iteration in range(start, recipe.iterations):
        optimizer.zero_grad(set_to_none=True)
        loss = _step(student, data, iteration, processes, features)
        torch.nn.utils.clip_grad_norm_(list(student.parameters()), 1.0)
        done = iteration / recipe.iterations
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * done)) if done >= group["after"] else 0.0
        optimizer.step()
        report.advance(task, 1, f"loss {loss.item():.4f}")
        if processes.main and time.monotonic() - saved > 30:
            checkpoint.save(iteration + 1, time.monotonic() - clock)
            saved = time.monotonic()
    return time.monotonic() - clock


@torch.no_grad()
def error(student: Student, data: Trajectories, batch: int, device: torch.device | None = None) -> float:
    """Mean squared error of the image against the reference trajectory's, over held-out noise."""
    errors = []
    for i in range(0, data.noise.shape[0], batch):
        part = data.take(slice(i, i + batch)).to(device or torch.device("cpu"))
        errors.append((student(part.noise, part.requests)[-1] - part.states[-1]).square().flatten(1).mean(1))
    return float(torch.cat(errors).mean())
