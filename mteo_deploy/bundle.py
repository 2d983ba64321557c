"""The bundle: the directory that ships. Written whole or not at all, and checked before a byte of it is used.

The graphs and their weight file lie in one folder, because ONNX readers refuse external data outside the graph's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy import manifest as records
from mteo_deploy.directories import recover, whole_directory
from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.graph_files import GraphError, Reached, reached
from mteo_deploy.plan import Plan
from mteo_deploy.reading import CheckedFile, UnreadableError, locate, read_regular, say_once, together
from mteo_deploy.requests import Request
from mteo_deploy.tensors import read_tensors

MANIFEST = "manifest.json"
SCHEMA = records.SCHEMA
__all__ = ["MANIFEST", "SCHEMA", "Bundle", "sha256_file", "whole_directory", "write_manifest"]
TOTAL, OTHER, GRAPH = 2**43, 2**32, 2**30
"""Bytes of all files of a bundle, of one that holds no weights, and of a graph, whose weights are beside it; at most."""
ARRAYS = ("F32", "F16", "F64", "I32", "I64", "BOOL")
"""Types of what a stored reference holds, as safetensors names them."""
SLACK = 2**20
"""Bytes of a weight file behind what graphs reach of it: room for alignment."""


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files have been checked against the manifest.

    Attributes:
        path: its directory.
        manifest: as :class:`mteo_deploy.manifest.Manifest` holds it to be.
        checked: every file of the manifest as it was when its hash was found right; empty for files that were never checked,
            of a bundle that is being made.
        external: graph -> the files beside it that hold its tensors.
    """

    path: Path
    manifest: dict[str, Any]
    checked: dict[str, CheckedFile] = field(default_factory=dict, repr=False, compare=False)
    external: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Read the manifest, and check every file's size and SHA-256 and what each graph reaches.

        Raises:
            BundleError: when something is missing, altered, of a newer schema, points outside the bundle, or is not what this
                version of a bundle has.
        """
        path = Path(os.fspath(path))
        recover(path)
        manifest = _read_manifest(path)
        sizes = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if (total := sum(size for size, _ in sizes.values())) > TOTAL:
            raise BundleError(f"{path}: expected {TOTAL:,} bytes in all files at most; the manifest says {total:,}")
        checked: dict[str, CheckedFile] = {}
        reach: dict[str, Reached] = {}
        name = MANIFEST
        try:
            for name in (*sizes, MANIFEST):
                locate(path, name)
            for name in sorted(sizes, key=lambda name: not name.endswith(".onnx")):  # graphs say how long weights may be
                _check_length(name, sizes[name][0], reach)
                checked[name], content = CheckedFile.check(path, name, *sizes[name])
                if content is not None:
                    reach[name] = reached(content)
        except UnreadableError as error:
            raise BundleError(f"{path}: {name} {error}") from None
        except GraphError as error:
            raise BundleError(f"{path}: {name} {error}; export again") from None
        external = {graph: tuple(_beside(graph, found.ends())) for graph, found in reach.items()}
        bundle = cls(path, manifest, checked, external)
        bundle._check_graphs(reach)
        return bundle

    def _check_graphs(self, reach: Mapping[str, Reached]) -> None:
        """That each graph's weights are listed files that are long enough, and that it is the graph the manifest describes."""
        for graph, found in reach.items():
            for name, end in zip(self.external[graph], found.ends().values(), strict=True):
                if name not in self.checked:
                    raise BundleError(f"{self.path}: no hash covers {name}, which {graph} takes weights from; export again")
                if end > self.checked[name].size:
                    raise BundleError(f"{self.path}: {graph} takes bytes behind the end of {name}; export again")
        for entry in self.graphs:
            found = reach[entry["graph"]]
            if [found.inputs, found.outputs] != [entry["inputs"], entry["outputs"]]:
                raise BundleError(
                    f"{self.path}: expected {entry['graph']} with the inputs and outputs of the manifest, "
                    f"{entry['inputs']} and {entry['outputs']}; found {found.inputs} and {found.outputs}; export again"
                )

            self._check_shapes(entry, found)

    def _check_shapes(self, entry: Mapping[str, Any], found: Reached) -> None:
        """That a graph's inputs have the shapes that the manifest says, where they are fixed."""
        shapes: dict[str, tuple[int, ...]] = {request.name: request.shape for request in self.requests}
        shapes |= {name: self.sample_shape for name in entry["inputs"] if name == "state" or name.startswith("history_")}
        for name in entry["inputs"]:
            shape = found.shapes.get(name)
            if name not in shapes or shape is None:
                continue
            if len(shape) != 1 + len(shapes[name]) or any(
                a not in (None, b) for a, b in zip(shape[1:], shapes[name], strict=True)
            ):
                raise BundleError(
                    f"{self.path}: expected {name} of {entry['graph']} with the manifest's shape [batch, "
                    f"{', '.join(map(str, shapes[name]))}]; found {shape}; export again"
                )

    def file(self, name: str) -> Path:
        """Path of a file named in the manifest, with every link resolved: as it was checked, hashed again if it looks changed.

        Raises:
            BundleError: when the manifest does not name it, or its content is another one now.
        """
        if name == MANIFEST or not self.checked:
            return self.path / name
        return self._checked(name).path

    def _checked(self, name: str) -> CheckedFile:
        try:
            found = self.checked[name] = self.checked[name].again()  # what was hashed again is not hashed a third time
            return found
        except KeyError:
            raise BundleError(f"{self.path}: the manifest names no file {name!r}; export again") from None
        except UnreadableError as error:
            raise BundleError(f"{self.path}: {name} {error}") from None

    @contextlib.contextmanager
    def opened(self, graph: str) -> Iterator[Path]:
        """The path from which an engine opens a graph now: the graph and its weights, as they were checked, lie there.

        Engines refuse weights that are links to somewhere else, as all files are in the cache of the Hugging Face Hub. Such a
        graph is opened in a directory of hard links to what the links lead to (copies where the file system has none), which is
        gone when the block ends; an engine keeps what it has mapped.

        Raises:
            BundleError: when one of the files is another one now.
        """
        files = [self._checked(name) for name in (graph, *self.external.get(graph, ()))] if self.checked else []
        if not any(file.linked for file in files):
            yield self.path / graph
            return
        try:
            directory = together(files, self.path / "engines")
        except UnreadableError as error:
            raise BundleError(f"{self.path}: {graph} {error}") from None
        try:
            with directory:
                yield Path(directory.name, PurePosixPath(graph).name)
        finally:
            self.checked.update({file.name: file.linked_elsewhere() for file in files})

    @cached_property
    def plan(self) -> Plan:
        return Plan.from_json(self.manifest["plan"])

    @cached_property
    def plain_plan(self) -> Plan:
        """The plan before any of its numbers was learned: the plain solver, on the backbone with ordinary time conditioning."""
        return self.plan.before_learning(self.manifest["embeddings"]["training"])

    @cached_property
    def reference_plan(self) -> Plan:
        """The plan of the reference trajectory, to be run on the backbone with ordinary time conditioning."""
        return Plan.from_json(self.manifest["reference"]["plan"])

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, ``(channels, height, width)``; of a video ``(frames, channels, height, width)``."""
        return tuple(self.manifest["backbone"]["sample_shape"])

    def shape_at(self, size: tuple[int, int] | None) -> tuple[int, ...]:
        """Shape of one sample of another ``(height, width)``; None for the backbone's own.

        Raises:
            InputError: for a size that the bundle does not take.
        """
        own = self.sample_shape[-2:]
        if size is None:
            return self.sample_shape
        backbone, opened = self.manifest["backbone"], self.manifest.get("dynamic", [])
        multiple = backbone.get("size_multiple")
        fixed = [axis for axis, n, only in zip(("height", "width"), size, own, strict=True) if n != only and axis not in opened]
        asked, native = "x".join(map(str, size)), "x".join(map(str, own))
        if fixed:
            way_out = "export again with --dynamic batch,height,width" if multiple else f"{backbone['family']} takes no other"
            raise InputError(
                f"expected --size {native}, since {' and '.join(fixed)} of this bundle are fixed; found {asked}; {way_out}"
            )
        if size != own and any(n < 1 or n % multiple for n in size):
            near = "x".join(str(max(1, round(n / multiple)) * multiple) for n in size)
            raise InputError(f"expected --size in multiples of {multiple}; found {asked}; the nearest is {near}")
        return (*self.sample_shape[:-2], *size)

    @property
    def batches(self) -> list[int]:
        """Batch sizes that the bundle was exported for; none for any."""
        return [int(size) for size in self.manifest.get("batches", [])]

    @property
    def realisations(self) -> dict[str, Any]:
        """Realisations the bundle has: ``baked`` (a list, see :attr:`step_graphs`), ``table`` and ``fused`` (one entry)."""
        found: dict[str, Any] = self.manifest["realisations"]
        return found

    @property
    def graphs(self) -> list[dict[str, Any]]:
        """Every graph: ``graph`` (file), ``inputs`` and ``outputs`` (tensor names, in order)."""
        entries = [entry for one in self.realisations.values() for entry in (one if isinstance(one, list) else [one])]
        others = [self.manifest.get("prelude"), self.decoder, self.text_encoder]
        return [*entries, self.manifest["conditioned"], *(entry for entry in others if entry)]

    @property
    def decoder(self) -> dict[str, Any] | None:
        """The VAE's decoder: its graph as in :attr:`graphs`, and its ``class``, ``channels``, ``scale`` of sizes and
        ``parameters``; None for a backbone whose samples are images, and for a pipeline whose VAE is not in the bundle."""
        found: dict[str, Any] | None = self.manifest.get("decoder")
        return found

    @property
    def text_encoder(self) -> dict[str, Any] | None:
        """What makes request inputs of prompts: its graph as in :attr:`graphs`, whose inputs are token ids and masks and whose
        outputs request inputs; its ``tokenizers``, ``templates``, the ``tokens`` that a prompt has then, and the request input
        that is the ``mask``; ``scale`` and ``zero_negative`` as :func:`mteo_deploy.prompts.request_inputs` takes them; None for
        a bundle without."""
        found: dict[str, Any] | None = self.manifest.get("text_encoder")
        return found

    def image_shape_at(self, size: tuple[int, int] | None) -> tuple[int, ...]:
        """Shape of one image of :meth:`shape_at`: that of a sample, decoded where the bundle has a decoder."""
        shape = self.shape_at(size)
        if self.decoder is None:
            return shape
        return (self.decoder["channels"], *(n * self.decoder["scale"] for n in shape[1:]))

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """What is given once per request, beside the noise."""
        return tuple(Request.from_json(data) for data in self.manifest.get("requests", []))

    def reference_requests(self, count: int) -> dict[str, NDArray[Any]]:
        """Request inputs for ``count`` images: those of the stored reference, over and over."""
        if not self.requests:
            return {}
        stored = self.reference()
        return {r.name: np.resize(stored[f"request/{r.name}"], (count, *r.shape)) for r in self.requests}

    def reference_tokens(self, count: int) -> dict[str, NDArray[np.int64]]:
        """Inputs of the text encoder by name, ``[count, length]``: of the stored prompts, over and over; empty without one."""
        if self.text_encoder is None:
            return {}
        stored = self.reference()
        found = {name: stored[f"text/{name}"].astype(np.int64) for name in self.text_encoder["inputs"]}
        return {name: np.resize(values, (count, *values.shape[1:])) for name, values in found.items()}

    @property
    def tokenizers(self) -> list[str]:
        """The files of the text encoder's tokenizers; none without one."""
        return list(self.text_encoder["tokenizers"]) if self.text_encoder else []

    @property
    def tables(self) -> list[str]:
        """The file of the table, in a list that is empty when the bundle has none."""
        return [self.realisations["table"]["table"]] if "table" in self.realisations else []

    def table(self) -> NDArray[np.float32]:
        """What differs between evaluations, ``[evaluations, numbers]``, for the realisation ``table``."""
        found = self._arrays(self.tables[0], "table", ("F32",)).get("table", np.zeros(0, np.float32))
        if found.ndim != 2 or len(found) != len(self.plan.evaluations):
            raise BundleError(
                f"{self.path}: expected a table of {len(self.plan.evaluations)} rows; found {list(found.shape)}; export again"
            )
        return found

    @property
    def step_graphs(self) -> list[dict[str, Any]]:
        """Per evaluation: ``graph`` (file), ``inputs`` and ``outputs`` (tensor names, in order)."""
        graphs = self.realisations["baked"]
        if len(graphs) != len(self.plan.evaluations):
            raise BundleError(
                f"{self.path}: {len(graphs)} step graphs for {len(self.plan.evaluations)} evaluations; export again"
            )
        return list(graphs)

    @property
    def graph_hash(self) -> str:
        """One hash over all graphs and their external data."""
        files = self.manifest["files"]
        lines = sorted(f"{name} {entry['sha256']}" for name, entry in files.items() if name.startswith("graphs/"))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def reference(self) -> dict[str, NDArray[np.float32]]:
        """The torch reference: ``noise`` ``[count, ...]``, ``states`` and ``kept`` ``[evaluations, count, ...]``.

        Where height or width are open, ``other/noise``, ... at another size too.
        """
        found = self._arrays(self.manifest["reference"]["file"], "reference")
        for name, shape in self._reference_shapes(found).items():
            have = found[name].shape if name in found else None
            if have is None or (shape and have != shape) or not found[name].size:
                raise BundleError(
                    f"{self.path}: expected {name} of shape {list(shape) or 'any'} in the stored reference; found "
                    f"{'none' if have is None else list(have)}; export again"
                )
        return found

    def _reference_shapes(self, found: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
        """Names that the reference must have, and their shapes; ``()`` for any."""
        entry, evaluations = self.manifest["reference"], len(self.plan.evaluations)
        shapes = {f"request/{request.name}": (entry["count"], *request.shape) for request in self.requests}
        noises = {"": (entry["count"], *self.sample_shape)}
        if {"height", "width"} & {*self.manifest.get("dynamic", [])}:
            other = found["other/noise"].shape if "other/noise" in found else ()
            noises["other/"] = other if len(other) == len(self.sample_shape) + 1 else noises[""]
        for size, noise in noises.items():
            shapes |= {f"{size}noise": noise, f"{size}states": (evaluations, *noise), f"{size}kept": (evaluations, *noise)}
        if self.decoder is not None:
            shapes |= {f"{size}images": () for size in noises}
        if self.text_encoder is not None:
            names = [*self.text_encoder["inputs"], *self.text_encoder["outputs"]]
            shapes |= {f"text/{name}": () for name in names}
        return shapes

    def _arrays(self, name: str, what: str, dtypes: tuple[str, ...] = ARRAYS) -> dict[str, NDArray[Any]]:
        return read_tensors(self.file(name), f"the stored {what}", "export again", BundleError, dtypes)[1]


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the bundle at ``path``, its structure and numbers checked; a word where no digest covers these."""
    place = path / MANIFEST
    try:
        text = read_regular(place, records.MOST)
    except (OSError, UnreadableError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError | NotADirectoryError) else f"; it cannot be read: {error}"
        raise BundleError(
            f"expected a bundle (a directory with {MANIFEST}) at {path}{reason}; make one with: mteo-deploy export -o DIR"
        ) from None
    try:
        manifest = records.read(text)
    except records.NewerSchemaError as error:
        raise BundleError(str(error)) from None
    except ValueError as error:
        raise BundleError(f"{place} is not a bundle manifest ({error}); export again") from None
    if "digest" not in manifest:
        say_once(
            f"{path} is of schema {manifest['schema']}: nothing covers the numbers in its manifest; export again for a digest"
        )
    return manifest


def _beside(graph: str, names: Iterable[str]) -> Iterator[str]:
    folder = PurePosixPath(graph).parent
    return (str(folder / name) for name in names)


def _check_length(name: str, size: int, reach: Mapping[str, Reached]) -> None:
    """That a weight file is no longer than what graphs take of it, and another file than :data:`OTHER`: a sparse file of
    terabytes would be hashed for hours.

    Raises:
        UnreadableError: when it is.
    """
    if name.endswith(".onnx") or not name.startswith("graphs/"):
        if size > (most := GRAPH if name.endswith(".onnx") else OTHER):
            raise UnreadableError(f"has {size:,} bytes; expected {most:,} at most")
        return
    ends = (dict(zip(_beside(graph, found.ends()), found.ends().values(), strict=True)) for graph, found in reach.items())
    most = max((found.get(name, 0) for found in ends), default=0) + SLACK
    if size > most:
        raise UnreadableError(f"has {size:,} bytes, of which graphs take {most - SLACK:,} at most; export again")


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Hash every file below ``directory`` into ``manifest["files"]``, all of that into its digest, and write the manifest."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest["files"] = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files
    }
    plain = json.loads(json.dumps(manifest, allow_nan=False))  # as it will be read: tuples are lists there
    if plain["schema"] >= 2:
        plain["digest"] = manifest["digest"] = records.digest(plain)
    (directory / MANIFEST).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
