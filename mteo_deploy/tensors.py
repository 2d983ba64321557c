"""Tensors out of safetensors files that somebody else wrote: of known types, finite, and no more than the file may hold."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import MteoError, border

RANK, COUNT = 8, 100_000
"""Axes of a tensor and tensors of a file, at most."""


def read_tensors(
    path: Path, what: str, way_out: str, error: type[MteoError], dtypes: Collection[str] = ("F32",), most: int = 2**32
) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Metadata and tensors of a safetensors file.

    Args:
        what: the file, for messages.
        way_out: what mends it.
        error: the error's type.
        dtypes: that tensors may have, as safetensors names them.
        most: bytes of the file.

    Raises:
        MteoError: of type ``error``, for a file that cannot be read, or has other types or numbers that are not finite.
    """
    from safetensors import safe_open

    with border(f"expected {what} as a safetensors file; {path} cannot be read", way_out, error):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a FIFO would be waited for
            raise error(f"expected {what} as a regular file; found something else at {path}; {way_out}")
        if status.st_size > most:
            raise error(f"expected {what} of {most:,} bytes at most; {path} has {status.st_size:,}; {way_out}")
        with safe_open(path, "numpy") as file:
            names = list(file.keys())
            if len(names) > COUNT:
                raise error(f"expected {what} with {COUNT:,} tensors at most; {path} has {len(names):,}; {way_out}")
            for name in names:
                stored = file.get_slice(name)
                kind, shape = stored.get_dtype(), list(stored.get_shape())
                if kind not in dtypes or len(shape) > RANK:
                    raise error(
                        f"expected {what} with tensors of type {' or '.join(dtypes)}; found {kind} {shape} at {name[:80]!r} in "
                        f"{path}; {way_out}"
                    )
            found = {name: file.get_tensor(name) for name in names}
            metadata = dict(file.metadata() or {})
    for name, values in found.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise error(f"expected {what} with finite numbers; found others at {name[:80]!r} in {path}; {way_out}")
    return metadata, found
