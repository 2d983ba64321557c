"""What lies under ``engines/`` of a bundle: built engines, what builds that died left, and what is none of ours.

Anybody may have put things there, so names are looked at first, only regular files are opened, and sizes and counts are limited
before anything is read. What is not ours is named and passed over; only what is certainly ours is ever deleted, and never
through a link.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from mteo_deploy.bundle import Bundle
from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.files import Scratch, abandoned
from mteo_deploy.precision import HINTS
from mteo_deploy.reading import CheckedFile, UnreadableError, read_regular, strict_json
from mteo_deploy.text import one_line

FOLDER, RECORD, LOCK = "engines", "engine.json", ".lock"
ENTRIES = 10_000
"""Names in one directory, at most: more is no folder of engines."""
LONGEST, LARGEST = 1 << 22, 1 << 30
"""Bytes of a record; of a built engine's file, beside four times the bundle's graphs."""
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)+-[0-9a-f]{12}")
LEFT = re.compile(rf"\.(build|bisect|open|{NAME.pattern})\.[a-z0-9_]{{8}}\.tmp")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,200}")
OURS = re.compile(r".*\.(blob|plan|layers\.json)")
"""Files that a build leaves beside a record that cannot be read any more."""
INTERRUPTED, RUNNING = "left by a build that was interrupted", "of a build that runs now"

logger = logging.getLogger(__name__)


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    precision: str = "fp32"
    threads: int | None = None
    batch: list[int] = []
    engine_options: dict[str, str | int] = {}

    def __post_init__(self) -> None:
        if self.precision not in HINTS:
            raise ValueError(f"precision {self.precision[:40]!r} is none of {', '.join(HINTS)}")
        if any(not 0 < number < 2**31 for number in [*self.batch, self.threads or 1]):
            raise ValueError("batch and threads are 1 or more")


class _Parts(msgspec.Struct, forbid_unknown_fields=True):
    graphs: str
    engine: str
    engine_version: str
    device: str
    machine: str
    options: _Options


class _Record(msgspec.Struct):
    """A record, as far as anything depends on it."""

    parts: _Parts
    realisation: Literal["baked", "table", "fused"]
    files: dict[str, str] = {}
    bytes: dict[str, int] = {}

    def __post_init__(self) -> None:
        for name, digest in self.files.items():
            if FILE.fullmatch(name) is None or re.fullmatch("[0-9a-f]{64}", digest) is None:
                raise ValueError(f"file {name[:40]!r} is no name, or has no SHA-256")


@dataclass(frozen=True)
class Entry:
    """One name under ``engines/``.

    Attributes:
        kind: ``built`` (the name of a built engine, and a record that may be opened), ``left`` (what a build works in, or
            left), or ``stray``.
        reason: why it is passed over.
    """

    path: Path
    kind: Literal["built", "left", "stray"]
    reason: str = ""

    @property
    def bytes(self) -> int:
        """Of the regular files in it; links are not followed."""
        found = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                with contextlib.suppress(OSError):
                    status = os.lstat(os.path.join(folder, name))
                    found += status.st_size if stat.S_ISREG(status.st_mode) else 0
        return found


def folder_of(bundle: Bundle) -> Path:
    """The bundle's ``engines/``, which need not be there.

    Raises:
        BundleError: for a link or a file in its place.
    """
    folder = bundle.path / FOLDER
    if folder.is_symlink():
        raise BundleError(
            f"expected a directory at {folder}; found a link; nothing behind it is read or deleted; remove it, and build again"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise BundleError(f"expected a directory at {folder}; found a file; remove it, and build again")
    return folder


def entries(bundle: Bundle) -> list[Entry]:
    """Everything under ``engines/`` but the lock, by name.

    Raises:
        BundleError: when it is no directory, cannot be read, or has more names than :data:`ENTRIES`.
    """
    folder = folder_of(bundle)
    if not folder.is_dir():
        return []
    return [_entry(folder / name) for name in names_in(folder) if name != LOCK]


def names_in(folder: Path) -> list[str]:
    """The names in a directory, in order."""
    try:
        with os.scandir(folder) as found:
            names = [entry.name for _, entry in zip(range(ENTRIES + 1), found, strict=False)]
    except OSError as error:
        raise BundleError(f"cannot list {folder}: {error.strerror or error}") from None
    if len(names) > ENTRIES:
        raise BundleError(f"expected {ENTRIES:,} names in {folder} at most; found more; remove what is none of ours")
    return sorted(names)


def _entry(path: Path) -> Entry:
    try:
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) and LEFT.fullmatch(path.name):
            return Entry(path, "left", INTERRUPTED if abandoned(path) else RUNNING)
        reason = _stray(path, status.st_mode)
    except FileNotFoundError:
        reason = f"it has no {RECORD}"
    except OSError as error:
        reason = f"it cannot be read ({error.strerror or error})"
    return Entry(path, "stray", f"{reason}; passed over") if reason else Entry(path, "built")


def _stray(path: Path, mode: int) -> str:
    """Why a path is no built engine; empty for one."""
    if stat.S_ISLNK(mode):
        return "a link, which is not followed"
    if not stat.S_ISDIR(mode):
        return "no directory"
    if not NAME.fullmatch(path.name):
        return "not the name of a built engine"
    return "" if stat.S_ISREG((path / RECORD).stat().st_mode) else f"its {RECORD} is no regular file"


def read_record(path: Path) -> dict[str, Any]:
    """A record, its structure checked.

    Raises:
        BundleError: in one line, for anything else.
    """
    try:
        data = strict_json(read_regular(path, LONGEST))
        msgspec.convert(data, _Record, strict=True)
    except (OSError, ValueError, RecursionError, OverflowError) as error:  # msgspec's errors are ValueErrors
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BundleError(f"{RECORD} cannot be read ({one_line(reason)[:300]})") from None
    found: dict[str, Any] = data
    return found


def check_files(bundle: Bundle, directory: Path, record: Mapping[str, Any]) -> dict[str, CheckedFile]:
    """The files that a record lists, hashed; others in the directory are nobody's, and never opened.

    Raises:
        BundleError: for one that is missing, altered, no regular file, or larger than can be.
    """
    sizes, found = record.get("bytes", {}), {}
    graphs = sum(entry["bytes"] for name, entry in bundle.manifest["files"].items() if name.startswith("graphs/"))
    for name, digest in record.get("files", {}).items():
        try:
            size = (directory / name).stat().st_size
            if size != sizes.get(name, size) or size > 4 * graphs + LARGEST:
                raise UnreadableError(f"has {size:,} bytes")
            found[name], _ = CheckedFile.check(directory, name, size, digest)
        except (OSError, UnreadableError) as error:
            reason = getattr(error, "strerror", None) or str(error).split(";", maxsplit=1)[0].replace("manifest's", "record's")
            raise BundleError(f"its files were altered ({name}: {reason})") from None
    return found


def beside(entry: Entry) -> list[str]:
    """Names in a built engine's directory that its record does not list: nobody's, and never opened."""
    with contextlib.suppress(BundleError):
        listed = read_record(entry.path / RECORD).get("files", {})
        return [name for name in names_in(entry.path) if name not in listed and name != RECORD]
    return []


def remove(entry: Entry) -> str:
    """Delete a built engine, or what a build left; what else lies in a built engine's directory stays, and is named.

    Raises:
        InputError: when it cannot be deleted.
    """
    try:
        if entry.kind == "left":
            shutil.rmtree(entry.path)
            return ""
        for name in _files_to_delete(entry.path):
            (entry.path / name).unlink(missing_ok=True)
        if kept := names_in(entry.path):
            return f"{', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''} in it stay: no file of a build"
        entry.path.rmdir()
    except OSError as error:
        raise InputError(f"cannot delete {entry.path}: {error.strerror or error}; delete it yourself") from None
    return ""


def _files_to_delete(directory: Path) -> list[str]:
    """The names in a built engine's directory that a build wrote, the record last: files and links, no directories."""
    try:
        listed = set(read_record(directory / RECORD).get("files", {}))
    except BundleError:
        listed = {name for name in names_in(directory) if OURS.fullmatch(name)}
    modes = {name: (directory / name).lstat().st_mode for name in names_in(directory) if name in listed}
    return [*(name for name, mode in modes.items() if stat.S_ISREG(mode) or stat.S_ISLNK(mode)), RECORD]


@contextlib.contextmanager
def locked(bundle: Bundle) -> Iterator[None]:
    """One build or clean at a time per bundle: a second one waits. The lock goes with its process, however that ends.

    Raises:
        BundleError: as :func:`folder_of`.
        InputError: for a bundle that cannot be written to.
    """
    from filelock import FileLock

    folder = folder_of(bundle)
    try:
        folder.mkdir(exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "it is read-only, or not yours to write")
    except OSError as error:
        raise InputError(f"cannot write into {bundle.path}: {error.strerror or error}; build a copy") from None
    lock = FileLock(folder / LOCK)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file system without locks: filelock has another way there
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.warning("warning: %s cannot be locked (%s): builds at the same time are not kept apart", folder, error)
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)  # who waits for it notices, and makes a new one
            lock.release()
        with contextlib.suppress(OSError):  # not empty: what was built
            folder.rmdir()


@contextlib.contextmanager
def scratch(bundle: Bundle, kind: str = "build") -> Iterator[Path]:
    """A directory under ``engines/`` for what may still be discarded; it is gone when the block ends, or with the next one.

    Raises:
        BundleError: as :func:`folder_of`.
        InputError: for a bundle that cannot be written to.
    """
    folder = folder_of(bundle)
    try:
        folder.mkdir(exist_ok=True)
        directory = Scratch(f".{kind}.", folder)
    except OSError as error:
        raise InputError(f"cannot write into {bundle.path}: {error.strerror or error}; build a copy") from None
    try:
        with directory as path:
            yield path
    finally:
        with contextlib.suppress(OSError):  # not empty: what was built
            folder.rmdir()
