"""The embedding set: what was learned, one safetensors file that explains itself.

The learned quantity is stored as a *delta* on the pretrained embedding, so an all-zero set is exactly the plain solver,
and the plan it was learned for travels in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.files import check_file, save_tensors
from mteo_deploy.manifest import SetHeader, convert
from mteo_deploy.plan import Plan
from mteo_deploy.reading import canonical, say_once, strict_json
from mteo_deploy.tensors import read_tensors

FORMAT = "mteo-deploy embedding set"
VERSION = 2
"""Since version 2 a set has a checksum of its tensors and its metadata."""
MOST = 2**31
"""Bytes of a file."""
WAY_OUT = "make the set again with: mteo-deploy distill"


@dataclass(frozen=True)
class EmbeddingSet:
    """Learned deltas for one backbone and one plan.

    Attributes:
        deltas: site name -> float32 ``[evaluations, width]``.
        plan: the plan the deltas belong to.
        backbone: fingerprint of the backbone they were learned for.
        training: what the training reported (free form, JSON).
    """

    deltas: Mapping[str, NDArray[np.float32]]
    plan: Plan
    backbone: str
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers were learned."""
        return sum(delta.size for delta in self.deltas.values())

    @property
    def plain_plan(self) -> Plan:
        """The plan before any of its numbers was learned."""
        return self.plan.before_learning(self.training)

    @property
    def guidance(self) -> tuple[float | None, int | None]:
        """Scale of classifier-free guidance and label of no class that the set was learned with; None for none."""
        found = self.training.get("guidance") or {}
        return found.get("scale"), found.get("null_class")

    @property
    def precision(self) -> tuple[str, tuple[str, ...]]:
        """Precision that the set was learned against, and the layers that were kept in float32, as patterns."""
        found = self.training.get("recipe") or {}
        return found.get("precision", "fp32"), tuple(found.get("keep", ()))

    def sha256(self) -> str:
        """Hash of names, shapes and values (not of the file's bytes)."""
        digest = hashlib.sha256(json.dumps(self.plan.to_json(), sort_keys=True).encode())
        for name in sorted(self.deltas):
            digest.update(f"{name}{self.deltas[name].shape}".encode())
            digest.update(np.ascontiguousarray(self.deltas[name], dtype="<f4").tobytes())
        return digest.hexdigest()

    @property
    def checksum(self) -> str:
        """Hash of everything in the file: names, shapes, values, and all that the metadata say."""
        header = {"backbone": self.backbone, "training": json.loads(json.dumps(self.training)), "tensors": self.sha256()}
        return hashlib.sha256(canonical(header)).hexdigest()

    def check(self, backbone: str, sites: Mapping[str, int]) -> None:
        """Check that the set fits a backbone.

        Args:
            backbone: the backbone's fingerprint.
            sites: site name -> width.

        Raises:
            InputError: when the set was made for another backbone or its shapes do not fit.
        """
        if self.backbone != backbone:
            raise InputError(
                f"expected an embedding set made for backbone {backbone[:12]}; found one made for {self.backbone[:12]}; "
                "learn one with: mteo-deploy distill --model DIR --steps N -o embeddings.safetensors"
            )
        expected = {name: (len(self.plan.evaluations), width) for name, width in sites.items()}
        found = {name: delta.shape for name, delta in self.deltas.items()}
        if expected != found:
            site = next(name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name))
            raise InputError(
                f"expected embeddings [evaluations, width] of shape {expected.get(site, 'none')} at site {site!r}; "
                f"found {found.get(site, 'none')}; learn a set with: mteo-deploy distill --model DIR --steps N -o FILE"
            )

    def save(self, path: Path | str) -> None:
        """Write the file whole or not at all.

        Raises:
            InputError: when it cannot be written; an older file is as it was.
        """
        header = {"format": FORMAT, "version": VERSION, "backbone": self.backbone, "training": self.training}
        metadata = {"mteo": json.dumps({**header, "plan": self.plan.to_json(), "checksum": self.checksum}, allow_nan=False)}
        deltas = {name: np.ascontiguousarray(delta, np.float32) for name, delta in self.deltas.items()}
        save_tensors(save_file, deltas, Path(path), metadata)

    @classmethod
    def load(cls, path: Path | str) -> EmbeddingSet:
        """Read a file written by :meth:`save`; a word where an older version wrote it, without a checksum.

        Raises:
            InputError: when the file is missing, altered, not an embedding set, or of a newer version.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(
                f"expected an embedding set (a .safetensors file) at {path}; found nothing there; "
                f"make one with: mteo-deploy distill -o {path}"
            )
        metadata, deltas = read_tensors(path, "an embedding set", WAY_OUT, InputError, most=MOST)
        try:
            header = strict_json(metadata.get("mteo", "{}"))
        except ValueError as error:
            raise InputError(f"{path}: bad metadata ({error}); {WAY_OUT}") from None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise InputError(f"expected an embedding set made by `mteo-deploy distill`; {path} holds no such metadata")
        if type(header.get("version")) is int and header["version"] > VERSION:
            raise InputError(
                f"expected embedding set version {VERSION} or older; {path} has {header['version']}; upgrade mteo-deploy"
            )
        try:
            fields: SetHeader = convert(header, SetHeader)
            found = cls(deltas, Plan.from_json(header["plan"]), fields.backbone, header["training"])
        except (ValueError, BundleError) as error:
            raise InputError(f"{path}: bad metadata ({error}); {WAY_OUT}") from None
        found._check_file(path, fields)
        return found

    def _check_file(self, path: Path, fields: SetHeader) -> None:
        evaluations = len(self.plan.evaluations)
        for name, delta in self.deltas.items():
            if delta.ndim != 2 or delta.shape[0] != evaluations or delta.shape[1] < 1:
                raise InputError(
                    f"expected [{evaluations}, width] at {name[:80]!r} of {path}; found {list(delta.shape)}; {WAY_OUT}"
                )
        if fields.checksum is None:
            if fields.version >= 2:
                raise InputError(f"expected a checksum in {path}; found none: the file was altered; {WAY_OUT}")
            say_once(f"{path} has no checksum, as sets of older versions; a damaged number in it would not be noticed")
        elif fields.checksum != self.checksum:
            raise InputError(f"{path} was altered: its checksum is another one; get it again, or {WAY_OUT}")


def merge(
    sets: Sequence[EmbeddingSet | Path | str], output: Path | str | None = None, weights: Sequence[float] | None = None
) -> EmbeddingSet:
    """The weighted sum of embedding sets of one backbone and plan.

    Sets that were learned apart err apart, and their mean may be nearer than each (weights averaged after training: Wortsman et
    al. 2022, arXiv 2203.05482). Weights that sum to less than 1 keep a part of the pretrained embeddings; with more than 1 they
    go further the way that was learned.

    Args:
        sets: sets or their files.
        output: the ``.safetensors`` file to write; None writes nothing.
        weights: one for each set; None for their mean.

    Returns:
        The set; its ``training`` holds the weight, the hash and the training of each (``merged``), and what a bundle asks a
        set for: guidance, precision and the plan before it was learned.

    Raises:
        InputError: for no set, weights that are not one finite number for each set, or sets of different backbones, plans,
            guidance or precision.
    """
    found = [one if isinstance(one, EmbeddingSet) else EmbeddingSet.load(Path(one)) for one in sets]
    if output is not None and Path(output).suffix != ".safetensors":
        raise InputError(f"expected an output file ending in .safetensors; found {output}")
    if output is not None:
        check_file(Path(output))
    if not found:
        raise InputError("expected one embedding set or more to merge; found none")
    weights = [1 / len(found)] * len(found) if weights is None else list(weights)
    if len(weights) != len(found) or not np.isfinite(weights).all():
        raise InputError(f"expected a finite weight for each of {len(found)} sets; found {', '.join(map(str, weights))}")
    first = found[0]
    for what in ("backbone", "plan", "guidance", "precision"):
        own = [getattr(one, what) for one in found]
        if any(one != own[0] for one in own):
            raise InputError(f"expected sets of one {what} to merge; found different ones; learn them with the same arguments")
    for one in found[1:]:
        one.check(first.backbone, {site: delta.shape[1] for site, delta in first.deltas.items()})
    pairs = list(zip(weights, found, strict=True))
    sums = {site: sum(w * one.deltas[site].astype(np.float64) for w, one in pairs) for site in first.deltas}
    deltas = {site: np.asarray(total, np.float32) for site, total in sums.items()}
    parts = [{"weight": w, "sha256": one.sha256(), "training": one.training} for w, one in pairs]
    precision, keep = first.precision
    training = {
        "merged": parts,
        "recipe": {"precision": precision, "keep": list(keep)},
        "guidance": first.training.get("guidance"),
        "parameters": first.training.get("parameters", first.parameters),
        "seconds": sum(one.training.get("seconds", 0.0) for one in found),
        **({"plain_plan": first.training["plain_plan"]} if "plain_plan" in first.training else {}),
    }
    merged = EmbeddingSet(deltas, first.plan, first.backbone, training)
    if output is not None:
        merged.save(output)
    return merged
