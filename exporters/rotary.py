"""Rotary position embeddings without complex numbers.

Some of diffusers' networks turn queries and keys as complex numbers (``torch.view_as_complex``), which ONNX and the engines do
not have. The same multiplication on pairs of real numbers takes its place while an adapter runs: the network's own code is
called, with cosines and sines where it would have complex factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Rotation:
    """Stands for complex factors ``cos + i sin``; both ``[..., tokens, half of a head's width]``."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self.cos, self.sin = cos, sin

    @classmethod
    def of(cls, factors: torch.Tensor) -> Rotation:
        """Of a complex tensor."""
        return cls(factors.real.float().contiguous(), factors.imag.float().contiguous())

    @classmethod
    def joined(cls, parts: Iterable[Rotation], dim: int) -> Rotation:
        """Along an axis."""
        cos, sin = zip(*((part.cos, part.sin) for part in parts), strict=True)
        return cls(torch.cat(cos, dim), torch.cat(sin, dim))

    def at(self, index: torch.Tensor) -> Rotation:
        """Of some positions, out of a table of all."""
        return Rotation(self.cos[index], self.sin[index])

    def to(self, device: torch.device) -> Rotation:
        return Rotation(self.cos.to(device), self.sin.to(device))

    def unsqueeze(self, dim: int) -> Rotation:
        return Rotation(self.cos.unsqueeze(dim), self.sin.unsqueeze(dim))

    def expand(self, *sizes: int) -> Rotation:
        return Rotation(self.cos.expand(*sizes), self.sin.expand(*sizes))


class _Pairs:
    """Stands for a complex tensor: ``[..., 2]``, real and imaginary parts."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __mul__(self, by: Rotation) -> _Pairs:
        real, imaginary = self.values.unbind(-1)
        cos, sin = by.cos.to(real.device), by.sin.to(real.device)
        return _Pairs(torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].values if func is torch.view_as_real else NotImplemented


class RealRotations(TorchFunctionMode):
    """While it is entered, ``view_as_complex`` gives pairs of real numbers, to be multiplied by a :class:`Rotation`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Pairs(*args) if func is torch.view_as_complex else func(*args, **(kwargs or {}))
