"""Where the backbone's weights lie while an embedding set is learned, and in which type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mteo_deploy.exporters.base import Adapter

Use = Callable[[torch.dtype], None]
"""Gives the backbone's floating-point tensors a type: float32 for what they were."""


@contextmanager
def placed(adapter: Adapter, device: torch.device) -> Iterator[Use]:
    """The backbone on a device; afterwards its tensors are the very ones that they were.

    The originals are kept. That costs memory on the CPU alone, and little there where they are mapped from a file.
    """
    tensors = [*adapter.parameters(), *adapter.buffers()]
    originals = [tensor.data for tensor in tensors]

    def use(dtype: torch.dtype) -> None:
        for tensor, original in zip(tensors, originals, strict=True):
            narrowed = dtype != torch.float32 and original.is_floating_point()
            tensor.data = original.to(device, dtype if narrowed else original.dtype)

    try:
        use(torch.float32)
        yield use
    finally:
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.data = original
