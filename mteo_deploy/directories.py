"""Directories that appear whole or not at all, and replace nothing but an older result of ours.

A result is written in a scratch directory beside its place and takes the place by one rename, or by one exchange of two names
where there is an older one and the kernel can (Linux). Elsewhere it takes two renames: who dies between them leaves the older
result in the scratch directory, from where :func:`recover` brings it back. A place that cannot be renamed (a mount point, the
working directory, a folder in one that we may not write) keeps its directory, whose entries are moved out and in, the marker
first and last: without it the directory is no result, and :func:`recover` undoes what was begun.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mteo_deploy.errors import InputError
from mteo_deploy.files import Scratch, abandoned, check_folder, destination, prefix_of, scratches

MARKER, KIND = "manifest.json", "mteo-deploy bundle"
RECORD = "engine.json"
FILES = ("embeddings.safetensors", "tables.safetensors", "weights.bin")
CARDS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
"""What a bundle of the Hub has beside the files that its manifest lists."""
FOLDERS = ("engines", "graphs", "reference", "tokenizers")
"""What a bundle has at its top, beside its manifest."""
INSIDE = ".mteo-deploy."
"""How the scratch directory's name begins that lies in its own target."""
NEW, OLD, PARTLY = "new", "old", "partly-old"
LARGEST = 1 << 28
"""Bytes of a manifest: a larger file is something else."""
NAMED, PATIENCE = 3, 2.0


def check_directory(target: Path, replace: str | None = None) -> Path:
    """Refuse a target that :func:`whole_directory` would refuse, before any work is done.

    Args:
        replace: as :func:`whole_directory` takes it.

    Returns:
        Where it leads: the end of the link at it, or itself.

    Raises:
        InputError: saying what is there, or why nothing can be written.
    """
    try:
        place = destination(target)
        place = place.resolve() if place.name in ("", "..") else place
        recover(place)
        if os.path.lexists(place):
            _check_ours(target, place, replace)
        if not os.path.lexists(place) or _can_be_renamed(place):
            check_folder(place.parent)
        else:
            check_folder(place)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {target}: {_reason(error)}; pass another -o/--output") from None
    return place


def _check_ours(target: Path, place: Path, replace: str | None) -> None:
    expected = f"expected a new path or an older result at {target}"
    if not place.is_dir():
        raise InputError(f"{expected}; found a file; pass another -o/--output")
    if not (there := _entries(place)):
        return
    strangers = _RULES[replace](place) if replace in _RULES else sorted(there)
    if strangers:
        more = f" and {len(strangers) - NAMED} more" if len(strangers) > NAMED else ""
        raise InputError(
            f"{expected}; found {', '.join(strangers[:NAMED])}{more}; nothing was deleted; pass another -o/--output"
        )


def _entries(place: Path) -> list[str]:
    """Names in a directory, without scratch directories in it and what a file system keeps at its root."""
    return [name for name in os.listdir(place) if name != "lost+found" and not name.startswith(INSIDE)]


def _not_of_a_bundle(place: Path) -> list[str]:
    """What lies in a directory that no export of ours wrote; empty for an older bundle, whole or damaged."""
    listed = _listed(place / MARKER)
    if listed is None:
        there = sorted(_entries(place))
        return [f"a {MARKER} of something else" if name == MARKER else name for name in there]
    strangers = []
    for name in sorted(_entries(place)):
        status = (place / name).lstat()
        if name in FOLDERS and stat.S_ISLNK(status.st_mode):
            continue  # the link goes, what it leads to stays
        if name == "engines" and stat.S_ISDIR(status.st_mode):
            strangers += [f"engines/{one}" for one in sorted(os.listdir(place / name)) if not _is_built(place / name / one)]
        elif name in FOLDERS and stat.S_ISDIR(status.st_mode):
            files = [path for path in (place / name).rglob("*") if path.is_symlink() or not path.is_dir()]
            names = sorted(path.relative_to(place).as_posix() for path in files)
            strangers += [one for one in names if one not in listed]
        elif name not in (MARKER, *FILES, *CARDS) or stat.S_ISDIR(status.st_mode):
            strangers.append(name)
    return strangers


def _listed(manifest: Path) -> set[str] | None:
    """The files that a bundle's manifest names; None for a file that is none of ours, or of a newer schema."""
    from mteo_deploy.bundle import SCHEMA

    with contextlib.suppress(OSError, ValueError, RecursionError):
        if not manifest.is_file() or manifest.stat().st_size > LARGEST:
            return None
        found: Any = json.loads(manifest.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("kind") == KIND and found.get("schema") in range(1, SCHEMA + 1):
            return set(found["files"]) if isinstance(found.get("files"), dict) else set()
    return None


def _is_built(path: Path) -> bool:
    """Whether an entry of ``engines/`` is a built engine, or what a build left."""
    if path.is_symlink():
        return False
    if path.name == ".lock":  # of a build that was killed
        return path.is_file()
    return path.is_dir() and ((path / RECORD).is_file() or (path.name.startswith(".") and path.name.endswith(".tmp")))


def _not_of_an_engine(place: Path) -> list[str]:
    """What lies in the place of a built engine and is none: a build writes files, and no folders or links."""
    return [name for name in sorted(os.listdir(place)) if not stat.S_ISREG((place / name).lstat().st_mode)]


_RULES: dict[str | None, Callable[[Path], list[str]]] = {MARKER: _not_of_a_bundle, RECORD: _not_of_an_engine}


@contextlib.contextmanager
def whole_directory(target: Path, *, replace: str | None = None) -> Iterator[Path]:
    """A temporary directory that becomes ``target`` when the block ends without an error.

    ``target`` may be a link, which stays, and whose end is written. What writers to the same place left that died is deleted.

    Args:
        replace: file that marks an older result which may be replaced: ``manifest.json`` of a bundle, ``engine.json`` of a
            built engine. All that lies there must be ours. None for a place that must be new, or empty.

    Raises:
        InputError: when something else is at ``target``, or the disk cannot take it.
    """
    place = check_directory(target, replace)
    inside = os.path.lexists(place) and not _can_be_renamed(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Scratch(INSIDE, place) if inside else Scratch(prefix_of(place), place.parent)
    except OSError as error:
        raise InputError(f"cannot write beside {target}: {_reason(error)}; pass another -o/--output") from None
    with scratch as beside:
        try:
            (beside / NEW).mkdir()
            yield beside / NEW
            if os.path.lexists(place):
                _check_ours(target, place, replace)  # it may have been filled meanwhile
            if inside:
                _fill(place, beside, replace or MARKER)
            else:
                _put(beside / NEW, place, beside / OLD)
        except OSError as error:
            raise InputError(f"could not write {target}: {_reason(error)}; nothing was kept; free space or pass -o") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _put(new: Path, place: Path, old: Path) -> None:
    """Rename ``new`` to ``place``; what was there goes to ``new`` or ``old``, and with the scratch directory they lie in."""
    if not os.path.lexists(place):
        os.replace(new, place)
        return
    if _exchange(new, place):
        return
    os.replace(place, old)
    try:
        os.replace(new, place)
    except OSError:
        os.replace(old, place)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where kernel or file system cannot, or something is wrong that two renames will say."""
    if sys.platform != "linux":
        return False
    import ctypes

    at_working_directory, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc 2.28, musl 1.2
    if renameat2 is None:
        return False
    paths = at_working_directory, os.fsencode(one), at_working_directory, os.fsencode(other)
    return bool(renameat2(*paths, ctypes.c_uint(rename_exchange)) == 0)


def _can_be_renamed(place: Path) -> bool:
    """Whether a directory may get another name: no mount point, not where we work, in a folder that we may change."""
    folder = place.parent
    if os.path.ismount(place) or os.path.realpath(place) in _mounted() or not os.access(folder, os.W_OK | os.X_OK):
        return False
    with contextlib.suppress(OSError):
        if Path.cwd().is_relative_to(os.path.realpath(place)):
            return False
    sticky, user = folder.stat().st_mode & stat.S_ISVTX, os.getuid() if hasattr(os, "getuid") else 0
    return not sticky or user in (0, folder.stat().st_uid, place.stat().st_uid)


def _mounted() -> set[str]:
    """Mount points as Linux lists them, bind mounts too, which look like any directory."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return {line.split()[4].replace(r"\040", " ").replace(r"\011", "\t").replace(r"\134", "\\") for line in lines}
    return set()


def _fill(place: Path, beside: Path, marker: str) -> None:
    """Move what ``place`` has out of it and what is new into it, the marker first and last."""
    try:
        (beside / PARTLY).mkdir()
        for name in sorted(_entries(place), key=lambda name: name != marker):
            os.replace(place / name, beside / PARTLY / name)
        os.replace(beside / PARTLY, beside / OLD)
        for name in sorted(os.listdir(beside / NEW), key=lambda name: name == marker):
            os.replace(beside / NEW / name, place / name)
    except BaseException:
        _undo(place, beside, marker)
        raise


def _undo(place: Path, beside: Path, marker: str) -> None:
    """Move back what :func:`_fill` had moved, unless it had come to its end."""
    if (beside / OLD).is_dir() and not (place / marker).exists():
        for name in _entries(place):
            if name in (*FILES, *CARDS, *FOLDERS):  # moved in already; nothing else is ours
                (beside / NEW).mkdir(exist_ok=True)
                os.replace(place / name, beside / NEW / name)
        os.replace(beside / OLD, beside / PARTLY)
    if (beside / PARTLY).is_dir():
        for name in sorted(os.listdir(beside / PARTLY), key=lambda name: name == marker):
            os.replace(beside / PARTLY / name, place / name)


def recover(place: Path) -> None:
    """Bring back an older result that a writer had moved aside when it died; wait a moment for one that lives.

    What cannot be written stays as it is: the reader will say that nothing is there.
    """
    with contextlib.suppress(OSError):
        place = Path(os.path.realpath(place))
        if place.is_dir():
            if not (place / MARKER).exists():
                for scratch in filter(abandoned, scratches(place, INSIDE)):
                    _undo(place, scratch, MARKER)
                    shutil.rmtree(scratch, ignore_errors=True)
        elif not os.path.lexists(place):
            _recover_beside(place)


def _recover_beside(place: Path) -> None:
    for scratch in reversed(scratches(place.parent, prefix_of(place))):
        until = time.monotonic() + PATIENCE
        while (scratch / OLD).is_dir() and not place.exists():
            if abandoned(scratch):
                os.replace(scratch / OLD, place)
                shutil.rmtree(scratch, ignore_errors=True)
            elif time.monotonic() > until:
                return
            else:
                time.sleep(0.02)
