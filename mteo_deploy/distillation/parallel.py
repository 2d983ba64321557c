"""Several processes that learn one set: a thin layer over accelerate, which is imported only where a launcher started them.

    accelerate launch --num_processes 4 -m mteo_deploy.cli distill --model my-pipeline -o e.safetensors       # GPUs
    torchrun --nproc-per-node 2 -m mteo_deploy.cli distill --device cpu -o e.safetensors                      # CPU (gloo)

Every process draws the same batches and takes its rows of them, gradients are summed, and all take the same step: what
comes out is what one process would learn, but for the order of sums.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from mteo_deploy.errors import InputError


def is_main() -> bool:
    """Whether this is the process that writes and prints: the only one, or the first of those that were launched."""
    return int(os.environ.get("RANK", "0")) == 0


def device_of(name: str | None) -> torch.device:
    """Where to learn: ``cpu`` or ``cuda``; None for what torch has.

    Raises:
        InputError: for another name, or ``cuda`` where torch finds no such device.
    """
    if name not in (None, "cpu", "cuda"):
        raise InputError(f"expected --device cpu or cuda; found {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("expected a GPU for --device cuda; torch finds none; install torch for CUDA, or use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


class Processes:
    """The processes of this run: one, unless a launcher (``accelerate launch``, ``torchrun``) started more.

    Attributes:
        rank: which of them this is.
        count: how many there are.
        device: this process's own.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count, self.device = 0, 1, device
        self._accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=device.type == "cpu")
            self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
            self.device = self._accelerator.device

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This process's rows of ``rows``."""
        return slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor, where that is."""
        if self._accelerator is None:
            return value
        return self._accelerator.reduce(value.to(self.device), "sum").to(value.device)

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes, in one exchange for each type of number."""
        if self._accelerator is None:
            return
        for dtype in dict.fromkeys(p.dtype for p in parameters):  # in one order everywhere, which a set has not
            gradients = [p.grad for p in parameters if p.grad is not None and p.dtype == dtype]
            total = self.sum(torch.cat([g.flatten() for g in gradients]))
            for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def wait(self) -> None:
        """Until every process is here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
