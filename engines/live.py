"""Files that an engine opens late, or goes on using: compared with what they were when they were checked.

An engine maps files: its weights are then the file's bytes of this moment. Written to in place, the file gives other images;
shortened, it ends the process with SIGBUS. So a file is compared with what was checked when it is opened, and, where it is
mapped, before and after each run, by size and time, which costs a microsecond. What takes its place under its name (written
beside, and renamed) does not touch what is mapped.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

from mteo_deploy.bundle import Bundle
from mteo_deploy.errors import BundleError
from mteo_deploy.reading import CONTENT, CheckedFile, UnreadableError, identity

_CHECKED: dict[str, dict[str, CheckedFile]] = {}
"""By directory of a built engine: its files, as they were when they were checked."""
_OPEN: weakref.WeakValueDictionary[tuple[int, int], Mapped] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def remember(directory: Path, files: Mapping[str, CheckedFile]) -> None:
    """Keep what :func:`stored` compares with."""
    _CHECKED[os.path.abspath(directory)] = dict(files)


def stored(directory: Path | None, name: str) -> Path | None:
    """A file of a built engine, if it has such a one; of one that was checked, a file that was checked and is still the same.

    Raises:
        BundleError: when it was altered since.
    """
    if directory is None:
        return None
    checked = _CHECKED.get(os.path.abspath(directory))
    if checked is None:
        return directory / name if (directory / name).is_file() else None
    return _again(checked, name, directory).path if name in checked else None


def _again(checked: dict[str, CheckedFile], name: str, directory: Path) -> CheckedFile:
    try:
        found = checked[name] = checked[name].again()
        return found
    except UnreadableError as error:
        raise BundleError(f"{directory}: {name} {error}") from None


def mapped_stored(directory: Path | None, name: str) -> list[Mapped]:
    """A file of a built engine, in a list that is empty when nobody checked it."""
    checked = {} if directory is None else _CHECKED.get(os.path.abspath(directory), {})
    return [Mapped.of(_again(checked, name, directory))] if directory is not None and name in checked else []


def mapped_weights(bundle: Bundle, graph: str) -> list[Mapped]:
    """The files that hold a graph's weights; none of a bundle that nobody checked.

    Raises:
        BundleError: when one was altered since it was checked.
    """
    return [Mapped.of(_again(bundle.checked, name, bundle.path)) for name in bundle.external.get(graph, ())]


class Mapped:
    """A file that an engine has mapped, opened once however many graphs map it."""

    def __init__(self, file: CheckedFile, descriptor: int) -> None:
        self._file, self._descriptor, self._lock = file, descriptor, threading.Lock()
        self._was, self._refused = (file.identity[2], file.identity[3]), ""
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def of(cls, file: CheckedFile) -> Mapped:
        """A file that was just checked.

        Raises:
            BundleError: when it is another one already, or cannot be opened.
        """
        try:
            descriptor = os.open(file.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise BundleError(f"{file.path} cannot be read ({error.strerror or error}); open the bundle again") from None
        status = os.fstat(descriptor)
        if identity(status)[CONTENT] != file.identity[CONTENT]:
            os.close(descriptor)
            raise BundleError(f"{file.path} was replaced while it was opened; open the bundle again")
        with _LOCK:
            found = _OPEN.get((status.st_dev, status.st_ino))
            if found is not None and not found._refused and found._was == found._now():
                os.close(descriptor)
                return found
            made = _OPEN[status.st_dev, status.st_ino] = cls(file, descriptor)
            return made

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def check(self) -> None:
        """Compare it with what it was.

        Raises:
            BundleError: when something was written to it.
        """
        if self._now() == self._was and not self._refused:
            return
        with self._lock:
            now = self._now()
            if not self._refused and now != self._was:
                if now[0] == self._was[0] and self._digest() == self._file.sha256:
                    self._was = now
                else:
                    self._refused = (
                        f"{self._file.path} was written to while it was in use; load the sampler again; a bundle is replaced "
                        "by writing another one beside it and renaming"
                    )
            if self._refused:
                raise BundleError(self._refused)

    def _digest(self) -> str:
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()


def check_all(files: Iterable[Mapped]) -> None:
    """:meth:`Mapped.check` of each."""
    for file in files:
        file.check()
