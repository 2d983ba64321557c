"""Where ``sample`` puts images: as they are made, so that whoever interrupts it keeps what is done, and resumes.

A folder grows file by file. A single file grows as the directory ``NAME.partial``, which holds its images as plain numbers, and
takes its name when all of them are there. Both keep the settings they were begun with: the same command goes on where it was,
and other settings are refused rather than mixed. Batches are made whole, with the same companions: what an engine computes may
depend in its last bits on what else is in a batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mteo_deploy import images
from mteo_deploy.bundle import MANIFEST, sha256_file
from mteo_deploy.errors import InputError
from mteo_deploy.files import LOCK, Scratch, check_folder, destination, hold, sweep, written
from mteo_deploy.prompts import Texts
from mteo_deploy.sample_request import Array, SampleRequest
from mteo_deploy.sampler import Sampler

RECORD, DATA, SCRATCH = ".mteo-sample.json", "images", ".mteo-sample."
HASHED = {"bundle": "another bundle", "tables": "another bundle's tables", "requests": "other prompts or request inputs"}
"""Settings that are hashes, and what is said where they differ."""
PNG_BEGINS, PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
CHUNK = 1 << 18


@dataclass(frozen=True)
class Sampling:
    """What is sampled, and the settings (JSON) beside ``num`` that its images depend on."""

    asked: SampleRequest
    settings: Mapping[str, Any]

    @property
    def num(self) -> int:
        return self.asked.num

    def to_json(self) -> dict[str, Any]:
        return {"format": "mteo-deploy sample", "version": 1, "num": self.num, **self.settings}


def settings_of(sampler: Sampler, asked: SampleRequest, tables: Path | None = None) -> dict[str, Any]:
    """What images depend on beside their number, as JSON: what is large as a hash of it."""
    found: dict[str, Any] = {
        "bundle": sha256_file(sampler.bundle.path / MANIFEST),
        "engine": None if sampler.built is None else sampler.built.directory.name,
        "realisation": sampler.loop.name,
        "tables": None if tables is None else sha256_file(tables / MANIFEST),
        "seed": asked.seed,
        "batch": asked.batch,
        "size": None if asked.size is None else list(asked.size),
        "latents": asked.latents,
        "tile": asked.tile,
    }
    digest = hashlib.sha256(json.dumps([_plain(asked.prompt), _plain(asked.negative_prompt)]).encode())
    for name, value in sorted((asked.requests or {}).items()):
        array = np.asarray(value)
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return {**found, "requests": digest.hexdigest()}


def _plain(texts: Texts | None) -> list[str] | None:
    return None if texts is None else [texts] if isinstance(texts, str) else list(texts)


def draw_into(
    path: Path,
    asked: SampleRequest,
    settings: Mapping[str, Any],
    draw: Callable[[int], Array],
    progress: Callable[[int], None] = lambda count: None,
    folder: bool = False,
) -> int:
    """Draw what is not there yet, batch by batch, to where it goes.

    Args:
        path: as :func:`mteo_deploy.images.check_output` takes it, and ``folder``.
        settings: as :func:`settings_of` gives them.
        draw: from the first image of a batch to the batch's images.
        progress: called with the number of images finished.

    Returns:
        How many were there.

    Raises:
        InputError: for a place that was begun with other settings, or by nobody, or that another process is writing; when the
            disk cannot take them.
    """
    output = output_of(path, Sampling(asked, settings), folder)
    try:
        there = asked.num - sum(len(asked.rows(start)) for start in output.starts)
        progress(there)
        for start in output.starts:
            output.add(start, draw(start))
            progress(len(asked.rows(start)))
        output.finish()
    finally:
        output.close()
    return there


class Output(Protocol):
    """Where images go.

    Attributes:
        starts: the first image of each batch that is still to be made.
    """

    starts: list[int]

    def add(self, start: int, drawn: Array) -> None:
        """Keep the images of the batch that begins with image ``start``."""

    def finish(self) -> None:
        """All of them are there."""

    def close(self) -> None:
        """Let go of it, whole or not."""


def output_of(path: Path, sampling: Sampling, folder: bool = False) -> Output:
    """Where a sampling goes, and what of it is there already.

    Args:
        path: as :func:`mteo_deploy.images.check_output` takes it.
        folder: it is one, whatever its name.

    Raises:
        InputError: for a place that was begun with other settings, or by nobody, or that another process is writing.
    """
    place = destination(path)
    return Folder(path, place, sampling) if images.kind_of(path, folder) == "folder" else SingleFile(path, place, sampling)


class Folder:
    """A PNG file for each image, ``00000.png`` on, and a record of the settings."""

    def __init__(self, path: Path, place: Path, sampling: Sampling) -> None:
        self.path, self.place, self.sampling = path, place, sampling
        self._scratch: Scratch | None = None
        sweep(place, SCRATCH)
        older = _read(place / RECORD)
        known = 0 if older is None else older["num"]
        if older is not None:
            _check_same(path, older, sampling, f"delete its images and its {RECORD}")
        if known > sampling.num:
            raise InputError(f"expected --num {known} or more, as {path} was begun with; found {sampling.num}; pass another -o")
        if taken := [name for i in range(known, sampling.num) if os.path.lexists(place / (name := _name(i)))]:
            raise InputError(
                f"expected no images in {path} but the {known} of its {RECORD}; found {taken[0]}; move such "
                "files away, or pass another -o/--output"
            )
        self.starts = [
            start for start in sampling.asked.starts if not all(_is_whole(place / _name(i)) for i in sampling.asked.rows(start))
        ]

    def add(self, start: int, drawn: Array) -> None:
        try:
            scratch = self._begun()
            for i, pixels in enumerate(images.to_uint8(drawn), start):
                (scratch / "new.png").write_bytes(images.png(pixels))
                os.replace(scratch / "new.png", self.place / _name(i))
        except OSError as error:
            raise _stopped(self.path, error) from error

    def _begun(self) -> Path:
        if self._scratch is None:
            self.place.mkdir(parents=True, exist_ok=True)
            self._scratch = Scratch(SCRATCH, self.place)
            _write_record(self._scratch.path / RECORD, self.sampling.to_json())
            os.replace(self._scratch.path / RECORD, self.place / RECORD)
        return self._scratch.path

    def finish(self) -> None:
        """Nothing is left to be done."""

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.close()


class SingleFile:
    """An ``.npz`` of float32 images, or one PNG that shows them all."""

    def __init__(self, path: Path, place: Path, sampling: Sampling) -> None:
        self.path, self.place, self.sampling = path, place, sampling
        self.partial = place.with_name(f"{place.name}.partial")
        if not os.path.lexists(self.partial):
            check_folder(self.partial)  # its name is longer
        self._only: Array | None = None
        self._lock: Any = None
        older = self._older()
        self.done = 0 if older is None else self._count(older)
        self.starts = [start for start in sampling.asked.starts if start >= self.done]

    def _older(self) -> dict[str, Any] | None:
        if not os.path.lexists(self.partial):
            return None
        older = _read(self.partial / RECORD)
        if not self.partial.is_dir() or self.partial.is_symlink() or (older is None and not self._is_empty()):
            raise InputError(f"expected nothing, or what a sampling left, at {self.partial}; found something else; delete it")
        if older is None:
            return None
        self._take()
        try:
            _check_same(self.partial, older, self.sampling, f"delete {self.partial}")
            if (num := older["num"]) != self.sampling.num:
                was = f"expected --num {num}, as {self.partial} was begun with; found {self.sampling.num}"
                raise InputError(f"{was}; delete it, or pass another -o/--output")
        except InputError:
            self.close()
            raise
        return older

    def _is_empty(self) -> bool:
        return {path.name for path in self.partial.iterdir()} <= {LOCK, f"{RECORD}.new"}

    def _take(self) -> None:
        self._lock = hold(self.partial)
        if self._lock is None:
            raise InputError(f"{self.path} is being written by another process; wait for it, or pass another -o/--output")

    def _count(self, older: Mapping[str, Any]) -> int:
        """Images of whole batches; what is behind them is cut off."""
        data = self.partial / DATA
        each = int(np.prod(older["shape"])) * np.dtype(older["dtype"]).itemsize
        there = data.stat().st_size // each if data.exists() else 0
        whole = there if there >= self.sampling.num else there // self.sampling.asked.batch * self.sampling.asked.batch
        if data.exists():
            os.truncate(data, min(whole, self.sampling.num) * each)
        return min(whole, self.sampling.num)

    def add(self, start: int, drawn: Array) -> None:
        values: NDArray[Any] = drawn if images.kind_of(self.path) == "npz" else images.to_uint8(drawn)
        if self.sampling.num <= self.sampling.asked.batch and self._lock is None:
            self._only = values
            return
        try:
            if self._lock is None:
                self._begin(values)
            with (self.partial / DATA).open("ab") as file:
                file.write(np.ascontiguousarray(values).data)
        except OSError as error:
            raise _stopped(self.partial, error) from error

    def _begin(self, values: NDArray[Any]) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        self._take()
        record = {**self.sampling.to_json(), "shape": list(values.shape[1:]), "dtype": values.dtype.name}
        _write_record(self.partial / f"{RECORD}.new", record)
        os.replace(self.partial / f"{RECORD}.new", self.partial / RECORD)

    def finish(self) -> None:
        values = self._only
        if values is None:
            record = json.loads((self.partial / RECORD).read_text(encoding="utf-8"))
            shape = (self.sampling.num, *record["shape"])
            values = np.memmap(self.partial / DATA, np.dtype(record["dtype"]), "r", shape=shape)
        with written(self.path) as new:
            if images.kind_of(self.path) == "npz":
                _write_npz(values, new)
            else:
                new.write_bytes(images.png(images.tiled(np.asarray(values, np.uint8)), scale=2))
        if self._lock is not None:
            del values
            shutil.rmtree(self.partial, ignore_errors=True)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release(force=True)


def _write_npz(values: NDArray[Any], path: Path) -> None:
    """As ``numpy.savez_compressed(path, images=values)``, in pieces."""
    header = {"descr": np.lib.format.dtype_to_descr(values.dtype), "fortran_order": False, "shape": values.shape}
    flat = values.reshape(-1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, flat.size, CHUNK):
            file.write(np.ascontiguousarray(flat[start : start + CHUNK]).data.cast("B"))


def _name(index: int) -> str:
    return f"{index:05}.png"


def _is_whole(path: Path) -> bool:
    """Whether a PNG file begins and ends as one."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        begins = file.read(len(PNG_BEGINS))
        file.seek(-len(PNG_ENDS), os.SEEK_END)
        return begins == PNG_BEGINS and file.read() == PNG_ENDS
    return False


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("num"), int) and found.get("format") == "mteo-deploy sample":
            return found
    return None


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _check_same(path: Path, older: Mapping[str, Any], sampling: Sampling, remedy: str) -> None:
    now = sampling.to_json()
    names = [name for name in now if name != "num" and older.get(name) != now[name]]
    if names:
        said = [HASHED.get(name) or f"{name} {_short(older.get(name))} then, {_short(now[name])} now" for name in names]
        raise InputError(
            f"expected the settings that {path} was begun with; found {'; '.join(said)}; {remedy}, or pass another -o/--output"
        )


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _stopped(path: Path, error: OSError) -> InputError:
    return InputError(
        f"could not write {path}: {error.strerror or error}; what is done stays; free space, and the same command goes on"
    )
