"""The compiler: one trace, then partial evaluation into step graphs and their realisations.

The backbone is traced once, as the *generic graph* with every site's embedding as an input, and folded once. The part that
depends on embeddings and constants alone (time projections, modulation) is split off, as a graph of its own: evaluated on
an evaluation's embeddings it gives the few vectors that the rest takes in. So each further evaluation costs a copy of the
graph's structure, these vectors, and the passes that put them in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from safetensors.numpy import save_file

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.conditioned import conditioned_graph
from mteo_deploy.exporters.evaluate import evaluate
from mteo_deploy.exporters.fuse import fuse
from mteo_deploy.exporters.passes.absorb import Absorb
from mteo_deploy.exporters.passes.bind import Bind
from mteo_deploy.exporters.passes.fold import Fold
from mteo_deploy.exporters.passes.runner import PassReport, Size, run_passes
from mteo_deploy.exporters.passes.share import Share, WeightFile, content_hash
from mteo_deploy.exporters.passes.update import Update, keeps
from mteo_deploy.exporters.tabulate import tabulate
from mteo_deploy.exporters.trace import embedding_input, trace_generic, trace_time_embedding
from mteo_deploy.plan import Plan
from mteo_deploy.progress import Reporter
from mteo_deploy.realisations import NAMES

Array = NDArray[np.float32]
OPTIONAL = ("absorb",)
"""Passes that may be left out; the others make the graph what it is."""
TABLES = "tables.safetensors"


@dataclass(frozen=True)
class Options:
    """What to compile, and what to leave behind for people who debug.

    Attributes:
        realisations: which to write.
        passes: optional passes to run.
        dump_after: a pass after which each step graph is written to ``dump``.
    """

    realisations: Sequence[str] = NAMES
    passes: Collection[str] = OPTIONAL
    dump_after: str | None = None
    dump: Path | None = None

    def __post_init__(self) -> None:
        for what, found, known in (
            ("--realisation", self.realisations, NAMES),
            ("--passes", self.passes, OPTIONAL),
            ("--dump-after", [self.dump_after or "bind"], ("bind", "update", "absorb", "share")),
        ):
            for name in found:
                if name not in known:
                    raise InputError(f"expected {what} out of {', '.join(known)}; found {name!r}")
        if not self.realisations:
            raise InputError(f"expected at least one --realisation out of {', '.join(NAMES)}; found none")


@dataclass(frozen=True)
class CompiledGraph:
    """One graph of the bundle, what the passes did to it, and the weights it no longer has."""

    entry: dict[str, Any]
    passes: list[PassReport]
    removed: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**self.entry, "passes": [p.to_json() for p in self.passes], "removed_weights": self.removed}


@dataclass(frozen=True)
class Compiled:
    """Everything the compiler made.

    Attributes:
        realisations: the manifest's entries, by name.
        size: of the network with ordinary time conditioning, as traced.
        sites: what became of each site, per realisation.
    """

    realisations: dict[str, Any]
    conditioned: CompiledGraph
    graphs: list[CompiledGraph]
    size: Size
    sites: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {
            "time_conditioned": {"nodes": self.size.nodes, "parameters": self.size.parameters, "bytes": self.size.bytes},
            "graphs": [graph.to_json() for graph in [*self.graphs, self.conditioned]],
            "sites": self.sites,
        }


def compile_bundle(
    adapter: Adapter,
    plan: Plan,
    embeddings: Callable[[int], Mapping[str, Array]],
    directory: Path,
    options: Options,
    report: Reporter,
) -> Compiled:
    """Trace, compile and write every graph below ``directory / "graphs"``.

    Args:
        embeddings: evaluation index -> site -> ``[1, width]``.
    """
    (directory / "graphs").mkdir()
    task = report.task("tracing", 2)
    generic = trace_generic(adapter)
    report.advance(task)
    time_embedding = trace_time_embedding(adapter)
    report.advance(task)
    task = report.task("compiling", 2 + len(options.realisations))
    conditioned = conditioned_graph(generic, time_embedding, [site.name for site in adapter.sites])
    steps = Steps(generic, plan, embeddings, options)
    report.advance(task, 1, "splitting")
    weights = WeightFile(directory / "graphs" / "weights.bin")
    everything, size = _weights(conditioned), Size.of(conditioned)
    realisations: dict[str, Any] = {}
    graphs: list[CompiledGraph] = []

    def write(model: ir.Model, passes: list[PassReport], name: str, file: WeightFile = weights) -> CompiledGraph:
        passes = passes + run_passes(model, [Share(file)])
        removed = [] if model is conditioned else sorted(everything - set(model.graph.initializers))
        return CompiledGraph(_write(model, directory, name), passes, removed)

    if "table" in options.realisations:  # first: its weights then lie in the file where any other bundle's lie
        graphs.append(_write_table(steps, directory, write))
        realisations["table"] = graphs[-1].entry
        report.advance(task, 1, "table")
    if "fused" in options.realisations:
        graphs.append(write(fuse(steps.baked), [], "fused.onnx"))
        realisations["fused"] = graphs[-1].entry
        report.advance(task, 1, "fused")
    if "baked" in options.realisations:
        baked = [
            write(model, passes, f"step_{i:02}.onnx")
            for i, (model, passes) in enumerate(zip(steps.baked, steps.baked_passes, strict=True))
        ]
        graphs += baked
        realisations["baked"] = [graph.entry for graph in baked]
        report.advance(task, 1, "baked")
    only_here = WeightFile(directory / "graphs" / "conditioned.bin", parent=weights)
    written = write(conditioned, run_passes(conditioned, [Fold()]), "conditioned.onnx", only_here)
    report.advance(task, 1, "conditioned")
    ordered = {name: realisations[name] for name in NAMES if name in realisations}
    return Compiled(ordered, written, graphs, size, steps.site_report())


def _write_table(steps: Steps, directory: Path, write: Callable[..., CompiledGraph]) -> CompiledGraph:
    model, table = tabulate(steps.alike)
    content = content_hash(model)
    graph = write(model, steps.alike_passes[0], "table.onnx")
    save_file({"table": table}, directory / TABLES)
    (directory / TABLES).chmod(0o644)  # safetensors writes for the owner only
    return CompiledGraph({**graph.entry, "table": TABLES, "content": content}, graph.passes, graph.removed)


class Steps:
    """The step graphs of a plan, made when first asked for: ``baked``, and ``alike``, which differ in constants only."""

    def __init__(
        self, generic: ir.Model, plan: Plan, embeddings: Callable[[int], Mapping[str, Array]], options: Options
    ) -> None:
        self.template, self.plan, self.options = generic, plan, options
        run_passes(generic, [Fold()])
        names = [value.name or "" for value in generic.graph.inputs[1:]]
        self.time_part = split_time_part(generic, names)
        self.values = [self._evaluate(embeddings(i)) for i in range(len(plan.evaluations))]
        self.fates: dict[str, dict[str, str]] = {}
        self._made: dict[bool, tuple[list[ir.Model], list[list[PassReport]]]] = {}

    def _evaluate(self, embeddings: Mapping[str, Array]) -> dict[str, Array]:
        """What the network takes in of one evaluation's embeddings: input of the template -> constant."""
        feeds = {embedding_input(site): value for site, value in embeddings.items()}
        outputs = evaluate(self.time_part, feeds, reference=True)
        assert outputs is not None  # the reference evaluator takes every model
        names = [value.name or "" for value in self.time_part.graph.outputs]
        return dict(zip(names, outputs, strict=True))

    @property
    def baked(self) -> list[ir.Model]:
        return self._steps(alike=False)[0]

    @property
    def baked_passes(self) -> list[list[PassReport]]:
        return self._steps(alike=False)[1]

    @property
    def alike(self) -> list[ir.Model]:
        return self._steps(alike=True)[0]

    @property
    def alike_passes(self) -> list[list[PassReport]]:
        return self._steps(alike=True)[1]

    def _steps(self, alike: bool) -> tuple[list[ir.Model], list[list[PassReport]]]:
        if alike not in self._made:
            made = [self._step(i, alike) for i in range(len(self.plan.evaluations))]
            self._made[alike] = [model for model, _ in made], [passes for _, passes in made]
        return self._made[alike]

    def _step(self, index: int, alike: bool) -> tuple[ir.Model, list[PassReport]]:
        """Evaluation ``index``. Each pass is checked, numbers too, on the first one: the others differ in constants."""
        rows = self.plan.evaluations
        keep = any(keeps(rows, i) for i in range(len(rows))) if alike else keeps(rows, index)
        model = self.template.clone()
        passes: list[ir.passes.InPlacePass] = [Bind(self.values[index]), Update(rows[index], keep, rows if alike else ())]
        if "absorb" in self.options.passes:
            absorb = Absorb(linear=not alike, copy_share=1.0 if len(rows) == 1 else 1e-3)
            passes.append(absorb)
        first = index == 0
        reports = run_passes(model, passes, self._feeds(model) if first else None, self._dump(index, alike), each=first)
        if first:
            found = {name: fate.detail for name, fate in absorb.fates.items()} if "absorb" in self.options.passes else {}
            self.fates["table" if alike else "baked"] = found
        return model, reports

    def _feeds(self, model: ir.Model) -> dict[str, Array]:
        """Random values for the state and for any history, batch 2, beside this evaluation's constants."""
        shape = [d if isinstance(d, int) else 2 for d in model.graph.inputs[0].shape or ()]
        normal, lags = np.random.default_rng(0).standard_normal, range(1, self.plan.history + 1)
        names = ["state", *(f"history_{lag}" for lag in lags)]
        return self.values[0] | {name: normal(shape, dtype=np.float32) for name in names}

    def _dump(self, index: int, alike: bool) -> Callable[[str, ir.Model], object] | None:
        target, after = self.options.dump, self.options.dump_after
        if target is None or after is None:
            return None

        def dump(name: str, model: ir.Model) -> None:
            if name == after:
                target.mkdir(parents=True, exist_ok=True)
                graph = f"{'table' if alike else 'step'}_{index:02}"
                copy = model.clone()
                Share(WeightFile(target / f"{graph}.bin"))(copy)
                ir.save(copy, target / f"{graph}.onnx")

        return dump

    def site_report(self) -> list[dict[str, Any]]:
        """Per site: the constants it became, and where each of them is, per realisation."""
        by_site = sites_of(self.time_part)
        return [
            {
                "site": site,
                "constants": {
                    name: {kind: fates.get(name, "stays an operand") for kind, fates in self.fates.items()} for name in names
                },
            }
            for site, names in by_site.items()
        ]


def split_time_part(generic: ir.Model, names: Sequence[str]) -> ir.Model:
    """Take out of ``generic``, in place, what depends on the inputs ``names`` and constants alone.

    Returns:
        the time part: ``names -> constants``; ``generic`` takes its outputs instead of ``names``.
    """
    graph = generic.graph
    inputs = [value for value in graph.inputs if value.name in names]
    frontier = _frontier(graph, set(inputs))
    time_part = ir.Model(ir.convenience.extract(graph, inputs, frontier), ir_version=generic.ir_version)
    for value in frontier:
        taken = ir.Value(name=value.name, type=value.type, shape=value.shape)
        value.replace_all_uses_with(taken)
        value.name = f"{value.name}/before"
        graph.inputs.append(taken)
    for value in inputs:
        graph.inputs.remove(value)
    common.RemoveUnusedNodesPass()(generic)
    return time_part


def _frontier(graph: ir.Graph, early: set[ir.Value]) -> list[ir.Value]:
    """Values known with ``early`` (and constants) that a node known later reads, in the graph's order."""
    crossing: dict[ir.Value, None] = {}
    for node in graph:
        used = [value for value in node.inputs if value is not None]
        if any(v in early for v in used) and all(v in early or v.is_initializer() for v in used):
            early.update(node.outputs)
        else:
            crossing |= dict.fromkeys(v for v in used if v in early)
    return list(crossing)


def sites_of(time_part: ir.Model) -> dict[str, list[str]]:
    """Site -> the outputs of the time part that depend on it."""
    prefix = embedding_input("")
    reach: dict[str, set[str]] = {value.name or "": {value.name or ""} for value in time_part.graph.inputs}
    for node in time_part.graph:
        found = set().union(*(reach.get(v.name or "", set()) for v in node.inputs if v is not None))
        reach |= {output.name or "": found for output in node.outputs}
    outputs = [value.name or "" for value in time_part.graph.outputs]
    sites = [value.name or "" for value in time_part.graph.inputs]
    return {site.removeprefix(prefix): [name for name in outputs if site in reach[name]] for site in sites}


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
