"""The bundle: the directory that ships. Written whole or not at all, and checked before a byte of it is used.

The graphs and their weight file lie in one folder, because ONNX readers refuse external data outside the graph's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.directories import recover, whole_directory
from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.plan import Plan
from mteo_deploy.requests import Request

SCHEMA = 1
MANIFEST = "manifest.json"
__all__ = ["MANIFEST", "SCHEMA", "Bundle", "sha256_file", "whole_directory", "write_manifest"]
PARTS = ("plan", "realisations", "conditioned", "reference", "backbone", "embeddings", "precision")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files have been checked against the manifest."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Read the manifest and check every file's size and SHA-256.

        Raises:
            BundleError: when something is missing, altered, of a newer schema, or points outside the bundle.
        """
        path = Path(os.fspath(path))
        recover(path)
        if not (path / MANIFEST).is_file():
            raise BundleError(
                f"expected a bundle (a directory with {MANIFEST}) at {path}; make one with: mteo-deploy export -o DIR"
            )
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            schema, files = manifest["schema"], manifest["files"]
            entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path / MANIFEST} is not a bundle manifest ({error!r}); export again") from None
        if not isinstance(schema, int) or schema > SCHEMA:
            raise BundleError(f"expected bundle schema {SCHEMA} or older; found {schema}; upgrade mteo-deploy")
        missing = [part for part in PARTS if part not in manifest]
        if missing:
            raise BundleError(f"{path / MANIFEST} lacks {', '.join(missing)}; export again")
        bundle = cls(path, manifest)
        for used in [
            *(entry["graph"] for entry in bundle.graphs),
            *bundle.tables,
            *bundle.tokenizers,
            manifest["reference"]["file"],
        ]:
            if used not in files:
                raise BundleError(f"{path}: no hash covers {used}; export again")
        for name, size, digest in entries:
            file = bundle.file(name)
            if not file.is_file():
                raise BundleError(f"{path}: {name} is missing; export again")
            if file.stat().st_size != size:
                raise BundleError(f"{path}: {name} has {file.stat().st_size} bytes, expected {size} (truncated?); export again")
            if sha256_file(file) != digest:
                raise BundleError(f"{path}: {name} was altered (its SHA-256 differs from the manifest's); export again")
        return bundle

    def file(self, name: str) -> Path:
        """Path of a file named in the manifest.

        Raises:
            BundleError: when the name leaves the bundle.
        """
        pure = PurePosixPath(name)
        path = self.path / pure
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or not path.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{self.path}: the manifest names {name!r}, which leaves the bundle; do not trust this bundle")
        return path

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
        stored = self._arrays(self.manifest["reference"]["file"], "reference")
        return {r.name: np.resize(stored[f"request/{r.name}"], (count, *r.shape)) for r in self.requests}

    def reference_tokens(self, count: int) -> dict[str, NDArray[np.int64]]:
        """Inputs of the text encoder by name, ``[count, length]``: of the stored prompts, over and over; empty without one."""
        if self.text_encoder is None:
            return {}
        stored = self._arrays(self.manifest["reference"]["file"], "reference")
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
        return self._arrays(self.tables[0], "table")["table"]

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
        return self._arrays(self.manifest["reference"]["file"], "reference")

    def _arrays(self, name: str, what: str) -> dict[str, NDArray[np.float32]]:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(self.file(name))
        except SafetensorError as error:
            raise BundleError(f"{self.path}: the stored {what} cannot be read ({error}); export again") from None


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Hash every file below ``directory`` into ``manifest["files"]`` and write the manifest."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest["files"] = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
