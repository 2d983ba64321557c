"""``verify --bisect``: the first layer at which an engine departs from what the graph says.

What a graph says is ONNX Runtime's answer on the CPU with graph optimisation off: node after node, as written. It needs no
torch, and the inputs are torch's own, of the evaluation that is off most. To see inside the engine under test, a copy of the
graph with a few more outputs is opened in it. All of them at once would stop the engine from fusing anything and could hide
the fault, so the search adds few and halves what is left.

A *cut* after node ``k`` is the set of tensors that nodes up to ``k`` make and later ones (or the caller) take: everything that
the rest of the graph knows of the beginning. A cut departs when one of its tensors does. Before the first node nothing departs,
after the last one something does, so between any cut that agrees and any later one that departs there are two neighbours of
which the first agrees and the second departs. The node between them got inputs that agree and gave an output that departs. That
holds however the error grows, shrinks and grows again on the way, and for branches that lie between in the file and are
right: what is found is always such a node, if not always the only one.

A cut that makes the fault go away, because the engine now may not fuse across it, is looked at tensor by tensor. Where none
of them shows the fault, it tells nothing: its neighbours are asked instead, and where none is left, the answer is the range of
nodes that the engine fuses wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy.engines import backend
from mteo_deploy.engines.base import OpenGraph, Session
from mteo_deploy.engines.device import Values
from mteo_deploy.errors import InputError
from mteo_deploy.numerics import evaluation_outputs, relative_error, teacher_forced, tolerance_of
from mteo_deploy.probes import UNOPTIMISED, Departure, Probes, Tensor, node_name, onnx_package
from mteo_deploy.realisations import Stepwise
from mteo_deploy.sampler import Sampler


@dataclass(frozen=True)
class Bisection:
    """What was found.

    Attributes:
        verdict: ``nothing`` departs; the ``graph`` itself departs from torch; the stored files of the ``built engine`` do and
            the engine opened afresh does not; neither does alone but the ``sum`` of both; a ``node``; a ``fusion`` of several.
        evaluation: the one that is off most, teacher-forced; None where the realisation has no single ones.
        error: of the engine against torch, on that evaluation.
        graph_error: of the graph as written against torch.
        engine_error: of the engine, opened afresh, against the graph as written.
        between: with ``fusion``, the first and last node of the range.
        probes: how many graphs were opened in the engine.
    """

    verdict: str
    graph: str
    evaluation: int | None
    tolerance: float
    error: float
    graph_error: float = 0.0
    engine_error: float = 0.0
    departure: Departure | None = None
    between: list[str] | None = None
    probes: int = 0


@dataclass
class Recorder:
    """A session that is opened when it runs first, and remembers what it was given."""

    open_graph: OpenGraph
    graph: str
    feeds: dict[str, Tensor] = field(default_factory=dict)
    session: Session | None = None

    def run(self, feeds: Values) -> list[Any]:
        self.feeds = {name: np.asarray(value) for name, value in feeds.items()}
        self.session = self.session or self.open_graph(self.graph)
        return self.session.run(self.feeds)

    def save(self, directory: Path, graph: str) -> None:
        """Nothing: it is thrown away after use."""

    def close(self) -> None:
        if self.session is not None:
            self.session.close()


def check_possible(sampler: Sampler) -> None:
    """Check that a sampler can be bisected, before long work.

    Raises:
        InputError: for a sampler without a built engine.
        MissingPackageError: without the packages onnx and onnxruntime.
    """
    sampler.built_engine("--bisect")
    onnx_package()
    reference = backend("onnxruntime")
    reference.version()
    if sampler.bundle.manifest["precision"] not in reference.runs("cpu"):
        raise InputError(
            f"expected graphs that onnxruntime runs on the CPU, {', '.join(reference.runs('cpu'))}, for --bisect; found "
            f"{sampler.bundle.manifest['precision']}; leave --bisect out"
        )


def bisect(sampler: Sampler) -> Bisection:
    """Find the first layer at which a sampler's engine departs from its graphs.

    Raises:
        InputError, MissingPackageError: as :func:`check_possible`.
    """
    check_possible(sampler)
    built = sampler.built_engine("--bisect")
    tolerance = tolerance_of(sampler.precision)["evaluation" if isinstance(sampler.loop, Stepwise) else "trajectory"]
    evaluation, error = _worst(sampler)
    nothing = Bisection("nothing", "", evaluation, tolerance, error)
    if error <= tolerance:
        return nothing
    recorded, graph_error = as_written(sampler, evaluation)
    found = replace(nothing, graph_error=graph_error)
    for one in recorded:
        with Probes(sampler.bundle, built, one.graph, one.feeds) as probes:
            engine_error = probes.final_error()
            found = replace(found, graph=one.graph, engine_error=max(found.engine_error, engine_error))
            if engine_error > tolerance:
                return _search(replace(found, engine_error=engine_error), probes)
            found = replace(found, probes=found.probes + probes.opened)
    return replace(found, verdict=_without_a_node(found))


def _without_a_node(found: Bisection) -> str:
    """The verdict where the engine, opened afresh, follows the graph.

    By the triangle inequality its error is the sum of the graph's and its own at most; more than that comes from elsewhere.
    """
    if found.graph_error > found.tolerance:
        return "graph"
    return "built engine" if found.error > 1.1 * (found.graph_error + found.engine_error) else "sum"


def _worst(sampler: Sampler) -> tuple[int | None, float]:
    """The evaluation that is off most and its error; None where there are no single ones, with the trajectory's."""
    errors = [max(relative_error(*pair) for pair in one.values()) for one in evaluation_outputs(sampler)]
    if errors:
        return int(np.argmax(errors)), max(errors)
    reference = sampler.bundle.reference()
    states = sampler.states(reference["noise"], sampler.bundle.reference_requests(len(reference["noise"])))
    return None, max(relative_error(*pair) for pair in zip(states, reference["states"], strict=True))


def as_written(sampler: Sampler, evaluation: int | None) -> tuple[list[Recorder], float]:
    """Run one evaluation, teacher-forced, as its graphs are written.

    Args:
        evaluation: None for the whole loop of the realisation ``fused``.

    Returns:
        the graphs that ran, with their inputs, in order; and the relative error against torch.
    """
    bundle, engine, recorders = sampler.bundle, backend("onnxruntime"), []

    def open_graph(graph: str) -> Session:
        recorders.append(Recorder(lambda name: engine.open(bundle, name, "cpu", UNOPTIMISED), graph))
        return recorders[-1]

    reference, count = bundle.reference(), _batch(sampler)
    written = Sampler(bundle, open_graph, sampler.loop.name)
    requests = bundle.reference_requests(count)
    if evaluation is None:
        states = written.states(_rows(reference["noise"], count), requests)
        pairs = list(zip(states, [_rows(state, count) for state in reference["states"]], strict=True))
    else:
        state, history = teacher_forced(bundle.plan, reference, evaluation)
        given = [_rows(value, count) for value in (state, *history)]
        found, kept = written.step(evaluation, given[0], given[1:], written.prepare(requests))
        pairs = [(found, _rows(reference["states"][evaluation], count))]
        pairs += [] if kept is None else [(kept, _rows(reference["kept"][evaluation], count))]
    ran = [one for one in recorders if one.session is not None]
    ran.sort(key=lambda one: one.graph != (bundle.manifest.get("prelude") or {}).get("graph"))  # in the order they run
    return ran, max(relative_error(*pair) for pair in pairs)


def _batch(sampler: Sampler) -> int:
    """A batch size that the engine takes without cutting or filling up: the reference's own, or one it was built for."""
    fixed = sampler.bundle.manifest["batch"]
    sizes = [fixed] if fixed != "dynamic" else (sampler.built.options.get("batch") if sampler.built else None)
    count = int(sampler.bundle.manifest["reference"]["count"])
    return count if not sizes or count in sizes else int(min(sizes))


def _rows(values: Tensor, count: int) -> Tensor:
    return np.resize(values, (count, *values.shape[1:]))


def _search(found: Bisection, probes: Probes) -> Bisection:
    """Halve the range between a cut that agrees and one that departs until they are neighbours."""
    low, high = -1, len(probes.nodes) - 1
    while True:
        for cut in sorted(range(low + 1, high), key=lambda k: abs(2 * k - low - high)):  # from the middle outwards
            departs = probes.departs(cut, found.tolerance)
            if departs is not None:
                low, high = (low, cut) if departs else (cut, high)
                break
        else:
            break
    if high - low > 1:
        ends = [node_name(probes.nodes[low + 1]), node_name(probes.nodes[high])]
        return replace(found, verdict="fusion", between=ends, probes=found.probes + probes.opened)
    return replace(found, verdict="node", departure=probes.departure(high), probes=found.probes + probes.opened)


def to_json(found: Bisection) -> dict[str, Any]:
    """Plain data, as :attr:`Report.bisection` holds it; an error that is not finite is None, which JSON knows."""

    def finite(values: dict[str, Any]) -> dict[str, Any]:
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}

    departure = None if found.departure is None else finite(asdict(found.departure))
    return {**finite(asdict(found)), "departure": departure}


def _said(error: float | None) -> str:
    return "infinity" if error is None else f"{error:.1e}"


def lines(found: Mapping[str, Any]) -> list[str]:
    """A bisection in words, from what :func:`to_json` gives; empty when there is none."""
    if not found:
        return []
    where = "the whole loop" if found["evaluation"] is None else f"evaluation {found['evaluation']}"
    error, allowed, written, engine = (_said(found[name]) for name in ("error", "tolerance", "graph_error", "engine_error"))
    if found["verdict"] == "nothing":
        return [f"bisect: nothing departs; worst is {where}, relative error {error} (allowed {allowed})"]
    head = (
        f"bisect: {where}, relative error {error} against torch (allowed {allowed}); {found['graph']}, {found['probes']} probes"
    )
    first, last = found["between"] or ("", "")
    why = {
        "graph": f"the graph as written departs from torch as much ({written}) and the engine follows it ({engine}): the fault "
        "is in the bundle, not in the engine; export again, or see inspect --diff",
        "built engine": f"the engine opened afresh does what the graph says ({engine}): the fault is in what the built engine "
        "stored, or in its session; run: mteo-deploy build",
        "sum": f"neither the graph's part of it ({written}) nor the engine's ({engine}) is over the limit: no layer is",
        "fusion": f"the fault goes away where the engine may not fuse {first} to {last}: look at its fusions there",
    }
    if found["verdict"] in why:
        return [head, why[found["verdict"]]]
    node = found["departure"]
    alone = f"; by itself on the right inputs {_said(node['alone'])}" if node["opens_alone"] else ""
    return [
        head,
        f"first at {node['operator']} {node['node']}, node {node['position']} of {node['of']}, {node['module'] or 'no module'}",
        f"its inputs are off by {_said(node['inputs'])} at most, its output {node['tensor']} by {_said(node['error'])}{alone}; "
        f"most of it in {node['region']}",
    ]
