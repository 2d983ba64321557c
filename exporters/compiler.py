"""The compiler: one trace, then partial evaluation into step graphs and their realisations.

The backbone is traced once, as the *generic graph* with every site's embedding as an input. ``steps`` makes the step graphs
of a plan from it; here they become realisations, and files that share one weight file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors.numpy import save_file

from mteo_deploy.exporters import tensorrt, work
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.conditioned import conditioned_graph
from mteo_deploy.exporters.fuse import fuse
from mteo_deploy.exporters.lowering import Lowering, lowering
from mteo_deploy.exporters.options import Options
from mteo_deploy.exporters.passes.fix_batch import FixBatch
from mteo_deploy.exporters.passes.fold import Fold
from mteo_deploy.exporters.passes.runner import PassReport, Size, run_passes
from mteo_deploy.exporters.passes.share import Share, WeightFile, content_hash
from mteo_deploy.exporters.passes.views import Views
from mteo_deploy.exporters.steps import Steps
from mteo_deploy.exporters.tabulate import tabulate
from mteo_deploy.exporters.trace import trace_generic, trace_time_embedding
from mteo_deploy.files import save_tensors
from mteo_deploy.plan import Plan
from mteo_deploy.progress import Reporter
from mteo_deploy.realisations import NAMES

Array = NDArray[np.float32]
TABLES = "tables.safetensors"


@dataclass(frozen=True)
class CompiledGraph:
    """One graph of the bundle: what the passes did to it, weights it no longer has, what TensorRT would refuse,
    or may, and its work."""

    entry: dict[str, Any]
    passes: list[PassReport]
    removed: list[str] = field(default_factory=list)
    tensorrt: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    work: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        passes = [p.to_json() for p in self.passes]
        tensorrt = {"tensorrt": self.tensorrt, "tensorrt_unchecked": self.unchecked}
        return {**self.entry, "passes": passes, "removed_weights": self.removed, **tensorrt, "work": self.work}


@dataclass(frozen=True)
class Compiled:
    """Everything the compiler made.

    Attributes:
        realisations: the manifest's entries, by name.
        prelude: the request-time part of all evaluations; None when there is none.
        size: of the network with ordinary time conditioning, as traced.
        sites: what became of each site, per realisation.
        parts: graphs of the pipeline beside the backbone, by name.
        options: what it was asked for.
        precision: what lowering did and what it costs; empty in float32.
    """

    realisations: dict[str, Any]
    conditioned: CompiledGraph
    graphs: list[CompiledGraph]
    prelude: CompiledGraph | None
    size: Size
    sites: list[dict[str, Any]]
    parts: dict[str, CompiledGraph]
    options: Options
    precision: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        others = [*([self.prelude] if self.prelude else []), self.conditioned, *self.parts.values()]
        return {
            "time_conditioned": {"nodes": self.size.nodes, "parameters": self.size.parameters, "bytes": self.size.bytes},
            "graphs": [g.to_json() for g in [*self.graphs, *others]],
            "sites": self.sites,
            **({"precision": self.precision} if self.precision else {}),
        }


def compile_bundle(
    adapter: Adapter,
    plan: Plan,
    embeddings: Callable[[int], Mapping[str, Array]],
    directory: Path,
    options: Options,
    report: Reporter,
    height_width: tuple[int, ...],
    parts: Mapping[str, Callable[[], ir.Model]] = MappingProxyType({}),
) -> Compiled:
    """Trace, compile and write every graph below ``directory / "graphs"``.

    Args:
        embeddings: evaluation index -> site -> ``[1, width]``.
        height_width: a size that the graphs take; another one than the backbone's own where they are open.
        parts: of the pipeline beside the backbone: a graph's name -> what traces it.
    """
    (directory / "graphs").mkdir()
    task = report.task("tracing", 2)
    generic = trace_generic(adapter, options.dynamic, options.fixed_batch)
    if options.fixed_batch is not None:
        run_passes(generic, [FixBatch(options.fixed_batch)])
    report.advance(task)
    time_embedding, sites = trace_time_embedding(adapter)
    report.advance(task)
    task = report.task("compiling", 3 + len(options.realisations) + len(parts))
    conditioned = conditioned_graph(generic, time_embedding, sites)
    requests = [request.name for request in adapter.requests]
    steps = Steps(generic, plan, embeddings, options, requests, height_width, adapter.branches)
    report.advance(task, 1, "splitting")
    low = lowering(adapter, steps, options)
    told = low.report()  # before the graphs that it tells of are written: writing drops their types
    report.advance(task, 1, "lowering")
    weights = WeightFile(directory / "graphs" / "weights.bin")
    everything, size = _weights(conditioned), Size.of(conditioned)
    realisations: dict[str, Any] = {}
    graphs: list[CompiledGraph] = []

    def write(model: ir.Model, passes: list[PassReport], name: str, file: WeightFile = weights) -> CompiledGraph:
        passes = passes + run_passes(model, [Share(file)])
        backbone = model is not conditioned and name not in {f"{part}.onnx" for part in parts}
        removed = sorted(everything - set(model.graph.initializers)) if backbone else []
        refused, unknown = tensorrt.problems(model), tensorrt.unchecked(model)
        counted = work.count(model, options.fixed_batch or "dynamic")
        return CompiledGraph(_write(model, directory, name), passes, removed, refused, unknown, counted)

    if "table" in options.realisations:  # first: its weights then lie in the file where any other bundle's lie
        graphs.append(_write_table(steps, low, directory, write, weights))
        realisations["table"] = graphs[-1].entry
        report.advance(task, 1, "table")
    if "fused" in options.realisations:
        graphs.append(write(fuse([steps.from_prelude(i, model) for i, model in enumerate(low.baked()[0])]), [], "fused.onnx"))
        realisations["fused"] = graphs[-1].entry
        report.advance(task, 1, "fused")
    if "baked" in options.realisations:
        baked = [write(model, low.baked()[1][i], f"step_{i:02}.onnx") for i, model in enumerate(low.baked()[0])]
        graphs += baked
        realisations["baked"] = [{**graph.entry, "requests": steps.sources(i, graph.entry)} for i, graph in enumerate(baked)]
        report.advance(task, 1, "baked")
    prelude = _write_prelude(steps, steps.prelude, low, write) if steps.prelude else None
    only_here = WeightFile(directory / "graphs" / "conditioned.bin", parent=weights)
    passes = run_passes(conditioned, [Fold(), Views()]) + low.conditioned(conditioned)
    written = write(conditioned, passes, "conditioned.onnx", only_here)
    told |= {"conditioned": low.conditioned_errors} if low.conditioned_errors else {}
    report.advance(task, 1, "conditioned")
    others = {}
    for name, trace in parts.items():
        others[name] = _write_part(name, trace(), options, write)
        report.advance(task, 1, name)
    ordered = {name: realisations[name] for name in NAMES if name in realisations}
    return Compiled(ordered, written, graphs, prelude, size, steps.site_report(), others, options, told)


def _write_prelude(steps: Steps, model: ir.Model, low: Lowering, write: Callable[..., CompiledGraph]) -> CompiledGraph:
    return write(model, steps.prelude_passes + low.other(model), "prelude.onnx")


def _write_part(name: str, model: ir.Model, options: Options, write: Callable[..., CompiledGraph]) -> CompiledGraph:
    """Of the pipeline beside the backbone: it stays in float32 at every precision."""
    fixed = [] if options.fixed_batch is None else [FixBatch(options.fixed_batch)]
    return write(model, run_passes(model, [*fixed, Fold(), Views()]), f"{name}.onnx")


def _write_table(
    steps: Steps, low: Lowering, directory: Path, write: Callable[..., CompiledGraph], weights: WeightFile
) -> CompiledGraph:
    model, table = tabulate(steps.alike)
    passes = steps.alike_passes[0] + low.other(model)
    content = content_hash(model, weights)
    graph = write(model, passes, "table.onnx")
    save_tensors(save_file, {"table": table}, directory / TABLES)
    requests = [steps.sources(i, graph.entry) for i in range(len(table))]
    entry = {**graph.entry, "table": TABLES, "content": content, "requests": requests}
    return replace(graph, entry=entry)


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
