"""What several test files need: the torch sampler written out, copies of bundles, failed checks, faulty sessions, and errors
between arrays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mteo_deploy import plan as plans
from mteo_deploy.bundle import MANIFEST, write_manifest
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.engines.base import Session
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.manifest import digest
from mteo_deploy.report import Report

Array = NDArray[np.float32]


def network_of(adapter: Adapter, embeddings: EmbeddingSet) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """``(evaluation index, state) -> output``: pretrained embedding plus delta at every site, in torch."""

    def network(i: int, state: torch.Tensor) -> torch.Tensor:
        base = adapter.embeddings(torch.tensor([embeddings.plan.evaluations[i].timestep], dtype=torch.float32))
        deltas = [torch.from_numpy(embeddings.deltas[site.name][i : i + 1]) for site in adapter.sites]
        return adapter(state, *[one + delta for one, delta in zip(base, deltas, strict=True)])

    return network


@torch.no_grad()
def torch_states(adapter: Adapter, embeddings: EmbeddingSet, noise: Array) -> list[Array]:
    """The torch sampler: the state after every evaluation."""
    states = plans.run(embeddings.plan, torch.from_numpy(noise), network_of(adapter, embeddings))
    return [state.numpy() for state in states]


def relative(found: Array, expected: Array) -> float:
    """Euclidean norm of the difference over that of what was expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply ``change`` to the JSON object in a file; a manifest's digest is right again, as who alters one would make it."""
    data = json.loads(path.read_text())
    change(data)
    if path.name == MANIFEST and "digest" in data:
        data["digest"] = digest(data)
    path.write_text(json.dumps(data))


def altered(
    bundle: Path,
    target: Path,
    change: Callable[[dict[str, Any]], object] = lambda manifest: None,
    files: Callable[[Path], object] = lambda directory: None,
) -> Path:
    """A copy of a bundle without built engines, changed in its manifest and its files, all hashes right again."""
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns("engines"))
    manifest = json.loads((target / MANIFEST).read_text())
    change(manifest)
    files(target)
    write_manifest(target, manifest)
    return target


def unknown_operator(graph: Path) -> None:
    """Rename an operator, in an ONNX file that is whole, to one that no engine has."""
    content = graph.read_bytes()
    assert b"\x04Conv" in content
    graph.write_bytes(content.replace(b"\x04Conv", b"\x04Cunv"))


def failed(report: Report) -> set[str]:
    """Names of the checks that did not pass."""
    return {check.name for check in report.checks if not check.passed}


class Faulty:
    """A session whose next state goes through ``fault(next state, feeds)``; other outputs are left alone."""

    def __init__(self, session: Session, fault: Callable[[Array, Mapping[str, Array]], Array]) -> None:
        self.session, self.fault = session, fault

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        next_state, *others = self.session.run(feeds)
        return [self.fault(next_state, feeds).astype(np.float32), *others]
