"""Files that appear whole or not at all, and what a writer that died leaves behind.

Everything is written in a scratch directory beside its place and renamed. A lock in the scratch directory, which the system
takes back when its owner ends, however it ends, tells a writer that lives from one that died: what the dead ones left is
deleted by the next writer to the same place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mteo_deploy.errors import InputError

LOCK, SUFFIX = ".lock", ".tmp"
ABANDONED = 24 * 3600.0
"""Seconds after which a scratch directory without a lock counts as left behind: that of an older version."""
LONGEST = 200
"""Bytes of a name that become part of the name of its scratch directory; longer ones are hashed, since names are limited."""


class Scratch:
    """A temporary directory, deleted when it is closed, when nobody refers to it, or by the next writer when this one died.

    Args:
        prefix: of its name, which ends in eight random characters and :data:`SUFFIX`. Directories of the same prefix whose
            writer died are deleted.
        folder: that it lies in; None for the system's place for temporary files.
    """

    def __init__(self, prefix: str, folder: Path | None = None) -> None:
        place = Path(tempfile.gettempdir()) if folder is None else folder
        sweep(place, prefix)
        self.path = Path(tempfile.mkdtemp(SUFFIX, prefix, place))
        self.close = weakref.finalize(self, _end, os.getpid(), self.path, hold(self.path))

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()


def hold(directory: Path) -> Any:
    """The lock in a directory, held; None where somebody else holds it, or the file system has no locks."""
    from filelock import FileLock

    lock = FileLock(directory / LOCK, timeout=0, thread_local=False)
    with contextlib.suppress(OSError, NotImplementedError):
        lock.acquire()
        return lock
    return None


def _end(owner: int, directory: Path, lock: Any) -> None:
    if os.getpid() != owner:  # a forked child: the directory is its parent's
        return
    if lock is not None:
        lock.release(force=True)
    shutil.rmtree(directory, ignore_errors=True)


def scratches(folder: Path, prefix: str) -> list[Path]:
    """Scratch directories of a prefix, oldest first; those of other users, and links, are none."""
    name = re.compile(re.escape(prefix) + "[a-z0-9_]{8}" + re.escape(SUFFIX))
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if not hasattr(os, "getuid") or status.st_uid == os.getuid():
                        found.append((status.st_mtime, folder / entry.name))
    return [path for _, path in sorted(found)]


def abandoned(scratch: Path) -> bool:
    """Whether the writer of a scratch directory died: nobody holds its lock."""
    from filelock import FileLock, Timeout

    lock = scratch / LOCK
    try:
        if not stat.S_ISREG(lock.lstat().st_mode):
            return False
    except OSError:
        with contextlib.suppress(OSError):
            return time.time() - scratch.stat().st_mtime > ABANDONED
        return False
    try:
        with FileLock(lock, timeout=0, thread_local=False):
            return True
    except (Timeout, OSError, NotImplementedError):
        return False


def sweep(folder: Path, prefix: str) -> None:
    """Delete the scratch directories of a prefix whose writers died."""
    for path in scratches(folder, prefix):
        if abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def prefix_of(place: Path) -> str:
    """How the names of the scratch directories begin in which ``place`` is written."""
    name = os.fsencode(place.name)
    return f".{place.name if len(name) <= LONGEST else hashlib.sha256(name).hexdigest()[:16]}."


def destination(path: Path) -> Path:
    """Where a path leads: the end of the links at it, which may not be there yet; the path itself where it is no link.

    Raises:
        InputError: for links in a circle, or to a folder that is not there (a disk that is not mounted).
    """
    if not os.path.islink(path):
        return path
    end = Path(os.path.realpath(path))
    if os.path.islink(end):
        raise InputError(f"expected a link that ends somewhere at {path}; found links in a circle; pass another -o/--output")
    if not end.parent.is_dir():
        raise InputError(f"expected a link to a place that is there at {path}; {end.parent} is not; pass another -o/--output")
    return end


def _is_passage(path: Path) -> bool:
    """Whether what is written to a path goes on to somebody: a device, a pipe, an open file that the system lends."""
    if os.path.abspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/")):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def check_folder(folder: Path) -> None:
    """Refuse a folder, there or yet to be made, that nothing can be written into.

    Raises:
        InputError: for one below a file, on something read-only, or that somebody else may write only.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # which says what is wrong with a name
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write into {folder}: {_reason(error)}; pass another -o/--output") from None
    near = Path(os.path.abspath(folder))
    while not os.path.lexists(near) and near != near.parent:
        near = near.parent
    if not near.is_dir():
        raise InputError(f"cannot write into {folder}: expected a folder at {near}; found none; pass another -o/--output")
    if not os.access(near, os.W_OK | os.X_OK):
        raise InputError(f"cannot write into {folder}: {near} is read-only, or not yours to write; pass another -o/--output")


def check_file(path: Path) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Raises:
        InputError: for a folder, a read-only file, a place as in :func:`check_folder`, or a name that no file can have.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # which says what is wrong with a name
        if path.is_dir():
            raise InputError(f"expected a file at {path}; found a folder; pass another -o/--output")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"cannot write {path}: it is read-only, or not yours to write; pass another -o/--output")
        if not _is_passage(path):
            check_folder(destination(path).parent)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {_reason(error)}; pass another -o/--output") from None


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` when the block ends without an error: what was there before stays until then.

    A link at ``path`` stays, and where it leads is written. Devices and pipes are written to as they are.

    Raises:
        InputError: when it cannot be written.
    """
    from safetensors import SafetensorError

    try:
        if _is_passage(path):
            yield path
            return
        place = destination(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with Scratch(prefix_of(place), place.parent) as scratch:
            new = scratch / f"new{place.suffix}"
            yield new
            if place.exists():
                shutil.copymode(place, new)
            os.replace(new, place)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"could not write {path}: {_reason(error)}; what was there before is as it was; free space, or pass another "
            "-o/--output"
        ) from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all; text in UTF-8.

    Raises:
        InputError: when it cannot be written.
    """
    with written(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def save_tensors(
    save: Callable[..., Any], tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all, for all to read; safetensors writes for the owner only.

    Args:
        save: ``save_file`` of ``safetensors.numpy`` or ``safetensors.torch``.

    Raises:
        InputError: when it cannot be written.
    """
    with written(path) as new:
        save(dict(tensors), new, metadata=None if metadata is None else dict(metadata))
        new.chmod(0o644)
