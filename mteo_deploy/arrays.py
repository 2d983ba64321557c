"""Archives that somebody gives: regular files only, and none that unpacks to far more than it is."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy.errors import InputError, border

PLAUSIBLE = 1 << 30
"""Bytes that any archive may unpack to."""
RATIO = 200
"""Times its own size that a larger one may: deflate reaches a thousand on nothing but zeros, images and arrays ten."""


def check_ratio(path: Path, unpacked: int) -> None:
    """Refuse an archive that is small and unpacks to ``unpacked`` bytes.

    Raises:
        InputError: where that is more than :data:`PLAUSIBLE` and :data:`RATIO` times its size.
    """
    if unpacked > max(PLAUSIBLE, RATIO * path.stat().st_size):
        raise InputError(f"expected an archive of plausible size; {path} unpacks to {unpacked} bytes or more; do not trust it")


@contextmanager
def npz(path: Path, what: str, way_out: str) -> Iterator[Any]:
    """The arrays of an npz file by name, as :func:`numpy.load` gives them; nothing in it is unpickled.

    Args:
        what: it should be, for the error: ``an npz file of request inputs``.

    Raises:
        InputError: for a file that is none, is damaged or holds other objects than plain arrays; while it is open too.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"expected {what} at {path}; found no regular file; {way_out}")
    with border(f"expected {what} at {path}", way_out):
        with zipfile.ZipFile(path) as archive:
            check_ratio(path, sum(entry.file_size for entry in archive.infolist()))
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
