"""Weights from a model's directory, in float32, mapped rather than read.

A float32 file is mapped by safetensors: its pages belong to the system, which reads them when they are first used and drops
them when memory is short. Weights that are stored in half precision would be converted in memory, all of them at once. Here
they are converted a few at a time into a temporary file, which is mapped in their place.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mteo_deploy.errors import InputError

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
HALF = ("F16", "BF16")
SHARD = 1 << 28
"""Bytes of a converted file: what is in memory while it is written."""


def load_network(cls: Any, directory: Path) -> Any:
    """A diffusers network of class ``cls`` from its directory, in one safetensors file or in shards, in float32.

    Raises:
        InputError: when there are no weights as safetensors that fit it.
    """
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with in_float32(directory) as found:
            return cls.from_pretrained(found, use_safetensors=True, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"expected {cls.__name__} weights as safetensors in {directory}; {reason}") from None
    finally:
        if bars:
            logging.enable_progress_bar()


@contextmanager
def in_float32(directory: Path) -> Iterator[Path]:
    """The directory, or a copy of it with float32 weights where it has weights of half precision.

    The copy is unlinked at the end; what was mapped from it stays until it is let go.
    """
    files = _files(directory)
    if not _are_half(files):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="mteo-weights-", ignore_cleanup_errors=True) as scratch:  # Windows: it is open
        target = Path(scratch)
        for path in directory.glob("*.json"):
            if path.name != INDEX:
                shutil.copy(path, target)
        _convert(files, target)
        yield target


def _files(directory: Path) -> list[Path]:
    """The files that diffusers reads; none where it has an index that cannot be read."""
    try:
        names = set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        names = {f"{STEM}.safetensors"}
    except (OSError, ValueError, KeyError, AttributeError):
        return []
    return [directory / name for name in sorted(names)]


def _are_half(files: list[Path]) -> bool:
    """Whether any tensor is; not where a file is missing or broken, of which diffusers says what is wrong."""
    types: set[str] = set()
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                types.update(tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            return False
    return not types.isdisjoint(HALF)


def _convert(files: list[Path], target: Path) -> None:
    """Write the tensors of ``files`` to shards of about :data:`SHARD` bytes, floating-point ones in float32."""
    places: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"{STEM}-{len(set(places.values())):05}.safetensors"
        save_file(part, target / name)
        places.update(dict.fromkeys(part, name))
        part.clear()

    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                stored = tensors.get_tensor(name)
                part[name] = stored.to(torch.float32) if stored.is_floating_point() else stored
                if sum(tensor.nbytes for tensor in part.values()) >= SHARD:
                    flush()
    if part:
        flush()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
