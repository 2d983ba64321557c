"""``export``: backbone and embedding set to a bundle."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.numpy import save_file

import mteo_deploy
from mteo_deploy import assets
from mteo_deploy.bundle import MANIFEST, SCHEMA, Bundle, whole_directory, write_manifest
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone, site_dict
from mteo_deploy.exporters.conditioned import conditioned_graph
from mteo_deploy.exporters.passes.bind import Bind
from mteo_deploy.exporters.passes.fold import Fold
from mteo_deploy.exporters.passes.runner import PassReport, Size, run_passes
from mteo_deploy.exporters.passes.share import Share, WeightFile
from mteo_deploy.exporters.passes.update import Update
from mteo_deploy.exporters.trace import embedding_input, trace_generic, trace_time_embedding
from mteo_deploy.plan import Plan, compile_plan, default_substeps, reference_plan, run
from mteo_deploy.progress import Reporter, reporter
from mteo_deploy.sampler import noise_for
from mteo_deploy.solvers import canonical

REFERENCE_SEED, REFERENCE_COUNT = 20260322, 4


@dataclass(frozen=True)
class _Compiled:
    """One graph of the bundle and what the passes did to it."""

    entry: dict[str, Any]
    passes: list[PassReport]
    removed: list[str]

    def to_json(self) -> dict[str, Any]:
        return {**self.entry, "passes": [p.to_json() for p in self.passes], "removed_weights": self.removed}


def pretrained_set(adapter: Adapter, steps: int, solver: str, schedule: str = "polynomial") -> EmbeddingSet:
    """The embedding set of zero deltas: the plain solver."""
    plan = compile_plan(adapter.levels, steps=steps, solver=solver, schedule=schedule, prediction_type=adapter.prediction_type)
    deltas = {site.name: np.zeros((len(plan.evaluations), site.width), np.float32) for site in adapter.sites}
    return EmbeddingSet(deltas, plan, adapter.fingerprint())


def _embeddings_at(adapter: Adapter, embeddings: EmbeddingSet, index: int) -> dict[str, np.ndarray]:
    """Pretrained embedding at this evaluation's time plus the learned delta: site -> ``[1, width]``."""
    with torch.no_grad():
        base = adapter.embedding(torch.tensor([embeddings.plan.evaluations[index].timestep], dtype=torch.float32)).numpy()
    return {site.name: base + embeddings.deltas[site.name][index : index + 1] for site in adapter.sites}


def _entry(model: ir.Model, graph: str) -> dict[str, Any]:
    return {
        "graph": graph,
        "inputs": [value.name for value in model.graph.inputs],
        "outputs": [value.name for value in model.graph.outputs],
    }


def _write(model: ir.Model, directory: Path, name: str) -> dict[str, Any]:
    """Save a graph without the shapes inside it: every engine infers them again, and they are a third of the file."""
    inner = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    for value in [*inner, *model.graph.initializers.values()]:
        value.type, value.shape = None, None
        value.metadata_props.clear()
    ir.save(model, directory / "graphs" / name)
    return _entry(model, f"graphs/{name}")


def _weights(model: ir.Model) -> set[str]:
    """Names of the initialisers that are weights: floating point, more than one number."""
    values = model.graph.initializers.values()
    return {
        v.name or "" for v in values if v.const_value is not None and v.dtype == ir.DataType.FLOAT and v.const_value.size > 1
    }


def _compile(
    adapter: Adapter, embeddings: EmbeddingSet, directory: Path, report: Reporter
) -> tuple[list[_Compiled], _Compiled, Size]:
    """Trace once, then make every graph of the bundle by rewriting."""
    plan = embeddings.plan
    (directory / "graphs").mkdir()
    task = report.task("tracing", 2)
    generic = trace_generic(adapter)
    report.advance(task)
    time_embedding = trace_time_embedding(adapter)
    report.advance(task)
    task = report.task("compiling", len(plan.evaluations) + 1)
    weights = WeightFile(directory / "graphs" / "weights.bin")
    model = conditioned_graph(generic, time_embedding, [site.name for site in adapter.sites])
    size, everything = Size.of(model), _weights(model)
    steps = []
    for i, evaluation in enumerate(plan.evaluations):
        step = generic.clone()
        values = {embedding_input(site): value for site, value in _embeddings_at(adapter, embeddings, i).items()}
        keep = any(len(later.weights) > j for j, later in enumerate(plan.evaluations[i + 1 :], start=1))
        passes = run_passes(step, [Bind(values), Update(evaluation, keep), Fold(), Share(weights)])
        removed = sorted(everything - set(step.graph.initializers))
        steps.append(_Compiled(_write(step, directory, f"step_{i:02}.onnx"), passes, removed))
        report.advance(task)
    only_here = WeightFile(directory / "graphs" / "conditioned.bin", parent=weights)
    passes = run_passes(model, [Fold(), Share(only_here)])
    conditioned = _Compiled(_write(model, directory, "conditioned.onnx"), passes, [])
    report.advance(task)
    return steps, conditioned, size


@torch.no_grad()
def _reference(adapter: Adapter, embeddings: EmbeddingSet, path: Path) -> None:
    """Store noise and the torch sampler's states, for verification without torch."""
    noise = torch.from_numpy(noise_for(adapter.sample_shape, REFERENCE_SEED, range(REFERENCE_COUNT)))
    plan, kept = embeddings.plan, []

    def network(i: int, state: torch.Tensor) -> torch.Tensor:
        values = _embeddings_at(adapter, embeddings, i)
        output = adapter(state, *[torch.from_numpy(values[site.name]) for site in adapter.sites])
        row = plan.evaluations[i]
        kept.append(row.keep_output * output + row.keep_state * state)
        return output

    states = run(plan, noise, network)
    path.parent.mkdir()
    save_file({"noise": noise.numpy(), "states": torch.stack(list(states)).numpy(), "kept": torch.stack(kept).numpy()}, path)
    path.chmod(0o644)  # safetensors writes for the owner only


def _versions() -> dict[str, str]:
    packages = ("torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "numpy", "safetensors")
    return {
        "mteo-deploy": mteo_deploy.__version__,
        "python": platform.python_version(),
        **{p: metadata.version(p) for p in packages},
    }


def _manifest(
    adapter: Adapter, embeddings: EmbeddingSet, steps: list[_Compiled], conditioned: _Compiled, size: Size, source: str
) -> dict[str, Any]:
    plan = embeddings.plan
    return {
        "schema": SCHEMA,
        "kind": "mteo-deploy bundle",
        "versions": _versions(),
        "backbone": {
            "source": source,
            "family": adapter.family,
            "fingerprint": embeddings.backbone,
            "parameters": adapter.parameter_count,
            "sample_shape": list(adapter.sample_shape),
            "prediction_type": adapter.prediction_type,
        },
        "embeddings": {
            "file": "embeddings.safetensors",
            "sha256": embeddings.sha256(),
            "parameters": embeddings.parameters,
            "sites": site_dict(adapter.sites),
            "training": embeddings.training,
        },
        "plan": plan.to_json(),
        "precision": "float32",
        "batch": "dynamic",
        "realisations": {"baked": [step.entry for step in steps]},
        "conditioned": conditioned.entry,
        "reference": {
            "file": "reference/reference.safetensors",
            "seed": REFERENCE_SEED,
            "count": REFERENCE_COUNT,
            "plan": _reference_plan(adapter, plan).to_json(),
        },
        "compiler": {
            "time_conditioned": {"nodes": size.nodes, "parameters": size.parameters, "bytes": size.bytes},
            "graphs": [graph.to_json() for graph in [*steps, conditioned]],
        },
    }


def _reference_plan(adapter: Adapter, plan: Plan) -> Plan:
    return reference_plan(plan, adapter.levels, default_substeps(plan))


def _choose(
    model: Path | None,
    embeddings: Path | EmbeddingSet | None,
    steps: int | None,
    solver: str | None,
    plain: bool,
    adapter: Adapter,
) -> EmbeddingSet:
    if plain and embeddings is not None:
        raise InputError("expected --embeddings FILE or --plain (nothing learned); found both; leave one out")
    if plain:
        chosen = pretrained_set(adapter, 4 if steps is None else steps, solver or "euler")
    elif isinstance(embeddings, EmbeddingSet):
        chosen = embeddings
    elif embeddings is not None:
        chosen = EmbeddingSet.load(embeddings)
    elif model is None:
        chosen = EmbeddingSet.load(assets.embeddings(4 if steps is None else steps, solver or "euler"))
    else:
        raise InputError(
            f"expected an embedding set for {model}; pass --embeddings FILE, make one with: mteo-deploy distill --model "
            f"{model} --steps {steps or 4} -o embeddings.safetensors; or pass --plain for the pretrained embeddings"
        )
    if steps is not None and chosen.plan.steps != steps:
        raise InputError(
            f"expected an embedding set for --steps {steps}; found one for {chosen.plan.steps}; "
            f"make one with: mteo-deploy distill --steps {steps} -o embeddings.safetensors"
        )
    if solver is not None and chosen.plan.solver != canonical(solver):
        raise InputError(
            f"expected an embedding set for --solver {solver}; found one for {chosen.plan.solver}; "
            f"make one with: mteo-deploy distill --solver {solver} -o embeddings.safetensors"
        )
    return chosen


def export(
    output: Path | str,
    *,
    model: Path | str | None = None,
    embeddings: Path | str | EmbeddingSet | None = None,
    steps: int | None = None,
    solver: str | None = None,
    plain: bool = False,
    quiet: bool = False,
) -> Bundle:
    """Bake an embedding set into per-evaluation ONNX graphs and write a bundle.

    Args:
        output: directory to write; an older bundle there is replaced, anything else is refused.
        model: diffusers pipeline directory; None for the packaged backbone.
        embeddings: embedding set or its file; None for the packaged set of ``steps`` and ``solver``.
        steps: step count; None for the set's own (4 for the packaged sets).
        solver: which packaged set, or the plain solver; None for the set's own (Euler for the packaged sets).
        plain: use the pretrained embeddings unchanged (the plain solver).

    Returns:
        The bundle, opened.

    Raises:
        InputError: for a model that is not supported or an embedding set that does not fit.
    """
    if steps is not None and steps < 1:
        raise InputError(f"expected --steps of 1 or more; found {steps}")
    model = None if model is None else Path(model)
    if isinstance(embeddings, str):
        embeddings = Path(embeddings)
    if model is None and embeddings is None and not plain:
        assets.embeddings(4 if steps is None else steps, solver or "euler")  # a clear error before the model is loaded
    adapter = load_backbone(assets.MODEL if model is None else model)
    chosen = _choose(model, embeddings, steps, solver, plain, adapter)
    sites: Mapping[str, int] = site_dict(adapter.sites)
    chosen.check(adapter.fingerprint(), sites)
    clock = time.monotonic()
    with reporter(quiet) as report, whole_directory(Path(output), replace=MANIFEST) as directory:
        compiled = _compile(adapter, chosen, directory, report)
        chosen.save(directory / "embeddings.safetensors")
        _reference(adapter, chosen, directory / "reference" / "reference.safetensors")
        manifest = _manifest(adapter, chosen, *compiled, "packaged" if model is None else model.name)
        manifest["export_seconds"] = round(time.monotonic() - clock, 2)
        write_manifest(directory, manifest)
    return Bundle.open(output)
