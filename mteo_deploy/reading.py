"""Files that somebody else wrote: opened only when they are regular, read only up to a size, remembered as they were checked.

A FIFO, a device or a link to one would keep a reader waiting for ever, so a file is opened without waiting and looked at before
it is read. A link is resolved once: what was hashed is what is opened afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*){0,3}")
"""Names of files in a bundle: ASCII only, so that no two of them are one name to another file system's rules on Unicode."""
NAME_LENGTH = 200
DIGITS = 20
"""Of an integer in JSON: ``2**64`` has as many; Python refuses more than 4300 with an error that speaks of its own settings."""

logger = logging.getLogger(__name__)

Identity = tuple[int, int, int, int, int]
"""Device, inode, size, and when the content and the inode last changed, in nanoseconds. The last of them nobody can put back;
hard links change it too."""
CONTENT = slice(0, 4)
"""Of an identity: what hard links leave alone."""


class UnreadableError(ValueError):
    """A file is not what may be read; the message continues ``NAME ...``."""


def name_problem(name: str) -> str | None:
    """Why a name in a manifest is refused; None for one that is taken."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or "\\" in name or ":" in name:
        return "which leaves the bundle; do not trust this bundle"
    if len(name) > NAME_LENGTH or NAME.fullmatch(name) is None:
        return f"expected up to four parts of letters, digits and ._+- ({NAME_LENGTH} characters at most)"
    return None


@contextmanager
def open_regular(path: Path | str) -> Iterator[tuple[BufferedReader, os.stat_result]]:
    """A file opened for reading, with its status, if it is a regular file.

    Raises:
        UnreadableError: for a directory, a FIFO, a socket, a device.
        OSError: when it is not there or may not be read.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError(f"is {_kind(status.st_mode)}, not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file, status
    finally:
        os.close(descriptor)


def _kind(mode: int) -> str:
    kinds: list[tuple[Callable[[int], bool], str]] = [
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ]
    return next((words for test, words in kinds if test(mode)), "something else")


def read_regular(path: Path | str, most: int) -> bytes:
    """All of a regular file of at most ``most`` bytes.

    Raises:
        UnreadableError: for anything else.
        OSError: when it is not there or may not be read.
    """
    with open_regular(path) as (file, status):
        if status.st_size > most:
            raise UnreadableError(f"has {status.st_size:,} bytes, expected {most:,} at most")
        content = file.read(most + 1)
        if len(content) > most:  # /proc and the like tell no size
            raise UnreadableError(f"has more than {most:,} bytes")
        return content


def identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True)
class CheckedFile:
    """A file as it was when its hash was found right.

    Attributes:
        path: with every link resolved.
        linked: whether the bundle has a link in its place.
    """

    name: str
    path: Path
    size: int
    sha256: str
    identity: Identity
    linked: bool = False

    @classmethod
    def check(cls, root: Path, name: str, size: int, sha256: str) -> tuple[CheckedFile, bytes | None]:
        """A file below ``root``, hashed; the content of a graph, so that what is parsed is what was hashed.

        Raises:
            UnreadableError: when it is not a regular file of this size and hash, or lies in a linked directory.
        """
        path, linked = locate(root, name)
        seen, content = _hashed(path, size, sha256, keep=name.endswith(".onnx"))
        return cls(name, path, size, sha256, seen, linked), content

    def again(self) -> CheckedFile:
        """The same file, later: hashed again where it is not the one that was checked, by inode, size or time.

        Raises:
            UnreadableError: when its content is another one now.
        """
        try:
            if identity(self.path.stat()) == self.identity:
                return self
        except OSError as error:
            raise UnreadableError(f"cannot be read any more ({error.strerror or error}); open the bundle again") from None
        return replace(self, identity=_hashed(self.path, self.size, self.sha256)[0])

    def linked_elsewhere(self) -> CheckedFile:
        """The same file after we ourselves made or removed a hard link to it."""
        with suppress(OSError):
            now = identity(self.path.stat())
            return replace(self, identity=now) if now[CONTENT] == self.identity[CONTENT] else self
        return self


def _hashed(path: Path, size: int, sha256: str, keep: bool = False) -> tuple[Identity, bytes | None]:
    """The identity of a file of this size and hash, and its content where it is to be kept."""
    try:
        with open_regular(path) as (file, status):
            if status.st_size != size:
                raise UnreadableError(f"has {status.st_size} bytes, expected {size} (truncated?); export again")
            content = file.read(size + 1) if keep else None
            found = hashlib.file_digest(file, "sha256") if content is None else hashlib.sha256(content)
            now = os.fstat(file.fileno())
    except OSError as error:
        raise UnreadableError(f"cannot be read ({error.strerror or error}); export again") from None
    if identity(now)[CONTENT] != identity(status)[CONTENT]:
        raise UnreadableError("was written to while it was read; wait until it is whole")
    if found.hexdigest() != sha256:
        raise UnreadableError("was altered (its SHA-256 differs from the manifest's); export again")
    return identity(now), content


def locate(root: Path, name: str) -> tuple[Path, bool]:
    """Where a file of a bundle lies, with every link resolved, and whether the file itself is one.

    The file may be a link, as in the cache of the Hugging Face Hub; the directories on the way to it may not.

    Raises:
        UnreadableError: when it is not there, or lies in a linked directory.
    """
    folder = root
    for part in name.split("/")[:-1]:
        folder = folder / part
        if folder.is_symlink():
            raise UnreadableError(f"lies in {part}/, which is a link to a directory; only files may be links")
    path = root / name
    try:
        linked = path.is_symlink()
        resolved = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        raise UnreadableError("is missing; export again") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UnreadableError(f"cannot be resolved ({getattr(error, 'strerror', None) or error}); export again") from None
    return resolved, linked


def together(files: Sequence[CheckedFile], beside: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary directory with ``files`` under their own names: hard links where a file system allows them, else copies.

    Args:
        beside: a directory that may lie on their file system, if it is there and may be written to.

    Raises:
        UnreadableError: when there is no room for copies.
    """
    usable = beside.is_dir() and not beside.is_symlink()
    for parent in (None, *([beside] if usable else [])):  # the system's own directory of temporary files first
        with suppress(OSError):
            return _filled(parent, files, os.link)
    try:
        return _filled(None, files, shutil.copyfile)
    except OSError as error:
        raise UnreadableError(f"cannot be copied out of a directory of links ({error.strerror or error}); set TMPDIR") from None


def _filled(
    parent: Path | None, files: Sequence[CheckedFile], put: Callable[[Path, Path], object]
) -> tempfile.TemporaryDirectory[str]:
    directory = tempfile.TemporaryDirectory(prefix=".open.", suffix=".tmp", dir=parent, ignore_cleanup_errors=True)
    try:
        for file in files:
            put(file.path, Path(directory.name, file.name.rpartition("/")[2]))
    except OSError:
        directory.cleanup()
        raise
    return directory


@cache
def say_once(message: str) -> None:
    """A word that is no error, once in a process: through the module's logger, which Python lets end on standard error."""
    logger.warning("warning: %s", message)


def strict_json(text: str | bytes) -> Any:
    """JSON whose numbers are finite, whose integers fit 64 bits, whose keys are there once and whose text is Unicode.

    Raises:
        ValueError: for anything else, in one line.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        found = json.loads(
            decoded, object_pairs_hook=_once, parse_int=_integer, parse_float=_finite, parse_constant=_no_constant
        )
        canonical(found)  # a lone surrogate
    except RecursionError:
        raise ValueError("nested too deep") from None
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"text that is no Unicode ({error.reason})") from None
    return found


def canonical(data: Any) -> bytes:
    """One form for equal JSON: keys in order, no spaces, UTF-8."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _integer(text: str) -> int:
    if len(text) > DIGITS + 1:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{text[:40]} is not finite")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")
