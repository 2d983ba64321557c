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
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import backend
from mteo_deploy.engines.base import OpenGraph, Session
from mteo_deploy.engines.cache import Built
from mteo_deploy.errors import MissingPackageError
from mteo_deploy.numerics import TOLERANCE, evaluation_outputs, relative_error, teacher_forced, worst_place
from mteo_deploy.realisations import Stepwise
from mteo_deploy.sampler import Sampler

Tensor = NDArray[Any]
CANCELLED = 1e-3
"""Errors are relative to a tensor's RMS, or to this part of its node's largest input's: less is what a cancellation left."""


@dataclass(frozen=True)
class Departure:
    """The node whose inputs agree and whose output departs.

    Attributes:
        module: the backbone's module whose parameters it takes, or the nearest one before it.
        position, of: its place in the graph, and how many nodes there are.
        error, inputs: relative error of its output, and the largest of its inputs'.
        opens_alone: does the engine open the node in a graph of its own?
        alone: its relative error there, on the inputs it should get.
        region: where in its output most of the error is.
    """

    node: str
    operator: str
    tensor: str
    module: str
    position: int
    of: int
    error: float
    inputs: float
    opens_alone: bool
    alone: float
    region: str


@dataclass(frozen=True)
class Bisection:
    """What was found.

    Attributes:
        verdict: ``nothing`` departs; the ``graph`` itself departs from torch; the stored files of the ``built engine`` do and
            the engine opened afresh does not; a ``node``; a ``fusion`` of several.
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

    def run(self, feeds: Mapping[str, Tensor]) -> list[NDArray[np.float32]]:
        self.session, self.feeds = self.session or self.open_graph(self.graph), dict(feeds)
        return self.session.run(feeds)

    def save(self, directory: Path, graph: str) -> None:
        """Nothing: it is thrown away after use."""


def check_possible(sampler: Sampler) -> None:
    """Check that a sampler can be bisected, before long work.

    Raises:
        InputError: for a sampler without a built engine.
        MissingPackageError: without the packages onnx and onnxruntime.
    """
    sampler.built_engine("--bisect")
    _onnx()
    backend("onnxruntime").version()


def bisect(sampler: Sampler) -> Bisection:
    """Find the first layer at which a sampler's engine departs from its graphs.

    Raises:
        InputError, MissingPackageError: as :func:`check_possible`.
    """
    check_possible(sampler)
    built = sampler.built_engine("--bisect")
    tolerance = TOLERANCE[sampler.precision]["evaluation" if isinstance(sampler.loop, Stepwise) else "trajectory"]
    evaluation, error = _worst(sampler)
    nothing = Bisection("nothing", "", evaluation, tolerance, error)
    if error <= tolerance:
        return nothing
    recorded, graph_error = as_written(sampler, evaluation)
    found = replace(nothing, graph_error=graph_error)
    for one in recorded:
        with _Probes(sampler.bundle, built, one.graph, one.feeds) as probes:
            engine_error = probes.final_error()
            found = replace(found, graph=one.graph, engine_error=max(found.engine_error, engine_error))
            if engine_error > tolerance:
                return _search(replace(found, engine_error=engine_error), probes)
            found = replace(found, probes=found.probes + probes.opened)
    return replace(found, verdict="graph" if graph_error > tolerance else "built engine")


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
        recorders.append(Recorder(lambda name: engine.open(bundle, name, "cpu", {"unoptimised": True}), graph))
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


def _search(found: Bisection, probes: _Probes) -> Bisection:
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
        ends = [_name(probes.nodes[low + 1]), _name(probes.nodes[high])]
        return replace(found, verdict="fusion", between=ends, probes=found.probes + probes.opened)
    return replace(found, verdict="node", departure=probes.departure(high), probes=found.probes + probes.opened)


class _Probes:
    """Copies of one graph with more outputs, in the engine under test and as written, on the same inputs."""

    def __init__(self, bundle: Bundle, built: Built, graph: str, feeds: Mapping[str, Tensor]) -> None:
        self.bundle, self.built, self.graph, self.feeds = bundle, built, graph, dict(feeds)
        self.model = _onnx().load(bundle.file(graph), load_external_data=False)
        self.nodes = list(self.model.graph.node)
        self.outputs = [value.name for value in self.model.graph.output]
        self.constants = {value.name: value for value in self.model.graph.initializer}
        self.made = {name: k for k, node in enumerate(self.nodes) for name in node.output if name}
        last = {name: k for k, node in enumerate(self.nodes) for name in node.input if name}
        self.last = last | dict.fromkeys(self.outputs, len(self.nodes))
        self.errors: dict[str, float] = {}
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self.opened = 0

    def __enter__(self) -> _Probes:
        self._context = _beside(self.bundle, self.graph, self.model)
        self.copy = self._context.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)

    def cut(self, k: int) -> list[str]:
        """Tensors that nodes up to ``k`` make and that are taken later."""
        return [name for name, maker in self.made.items() if maker <= k < self.last.get(name, -1)]

    def final_error(self) -> float:
        """Relative error of the graph's own outputs."""
        self.look([])
        return max(self.errors[name] for name in self.outputs)

    def departs(self, k: int, tolerance: float) -> bool | None:
        """Does the cut after node ``k`` depart? None when looking there makes the fault at the end go away."""
        names = self.cut(k)
        departs = self._looked(names, tolerance)
        if departs is None and len(names) > 1:  # one of them hides it; another may show it
            return True if any(self._looked([name], tolerance) for name in names) else None
        return departs

    def _looked(self, names: list[str], tolerance: float) -> bool | None:
        self.look(names)
        if max((self.errors[name] for name in names), default=0.0) > tolerance:
            return True
        return False if max(self.errors[name] for name in self.outputs) > tolerance else None

    def look(self, names: Iterable[str]) -> None:
        """Open the graph with these outputs more, and note their errors and those of its own outputs."""
        seen = list(dict.fromkeys([*self.outputs, *names]))
        takes = {name for one in seen for name in self.nodes[self.made[one]].input if name in self.made or name in self.feeds}
        written = self._as_written([*seen, *sorted(takes - set(seen) - set(self.feeds))]) | self.feeds
        found = self._run(self.built.options, self.built, self._with_outputs(seen[len(self.outputs) :]))
        self.found = {name: (value, written[name]) for name, value in zip(seen, found, strict=True)}
        for name, pair in self.found.items():
            self.errors[name] = self._error(name, *pair, written)

    def _error(self, name: str, found: Tensor, expected: Tensor, written: Mapping[str, Tensor]) -> float:
        if found.shape != expected.shape:
            return float("inf")
        error, size = relative_error(found, expected), _rms(expected)
        inputs = [_rms(written[one]) for one in self.nodes[self.made[name]].input if one in written]
        floor = CANCELLED * max(inputs, default=0.0)
        return error * size / floor if 0 < size < floor and name not in self.outputs else error

    def departure(self, k: int) -> Departure:
        """The node after a cut that agrees, whose own output departs."""
        node = self.nodes[k]
        before = [self.errors.get(name, 0.0) for name in node.input if name in self.made]
        outputs = [name for name in node.output if name in self.last]
        self.look(outputs)
        tensor = max(outputs, key=self.errors.__getitem__)
        alone = self._alone(k, tensor)
        return Departure(
            node=_name(node),
            operator=node.op_type,
            tensor=tensor,
            module=self._module(k),
            position=k,
            of=len(self.nodes),
            error=self.errors[tensor],
            inputs=max(before, default=0.0),
            opens_alone=alone is not None,
            alone=0.0 if alone is None else alone,
            region=worst_place(*self.found[tensor]) if self.found[tensor][0].shape == self.found[tensor][1].shape else "",
        )

    def _alone(self, k: int, tensor: str) -> float | None:
        """Relative error of one node in a graph of its own, on the inputs it gets in the graph as written."""
        helper, node = _onnx().helper, self.nodes[k]
        inputs = list(dict.fromkeys(name for name in node.input if name and name not in self.constants))
        written = self._as_written([*(name for name in inputs if name in self.made), tensor]) | self.feeds

        def value(name: str) -> Any:
            kind = helper.np_dtype_to_tensor_dtype(written[name].dtype)
            return helper.make_tensor_value_info(name, kind, written[name].shape)

        constants = [self.constants[name] for name in dict.fromkeys(node.input) if name in self.constants]
        graph = helper.make_graph([node], "alone", [value(name) for name in inputs], [value(tensor)], constants)
        model = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        options = {name: option for name, option in self.built.options.items() if name != "batch"}
        try:
            (found,) = self._run(options, self.built, model, {name: written[name] for name in inputs})
        except Exception:  # an engine need not take a single node; the answer does without
            return None
        return relative_error(found, written[tensor]) if found.shape == written[tensor].shape else float("inf")

    def _module(self, k: int) -> str:
        """The module whose parameters node ``k`` takes; else the nearest one before it, along first inputs."""
        before = ""
        while True:
            names = [name for name in self.nodes[k].input if name in self.constants and "." in name and "/" not in name]
            if names:
                return before + names[0].rpartition(".")[0]
            makers = [self.made[name] for name in self.nodes[k].input if name in self.made]
            if not makers:
                return ""
            k, before = max(makers), "after "

    def _as_written(self, names: list[str]) -> dict[str, Tensor]:
        more = [name for name in names if name not in self.outputs]
        found = self._run({"unoptimised": True}, None, self._with_outputs(more))
        return dict(zip([*self.outputs, *more], found, strict=True))

    def _with_outputs(self, names: Iterable[str]) -> Any:
        model = type(self.model)()
        model.CopyFrom(self.model)
        model.graph.output.extend(_onnx().ValueInfoProto(name=name) for name in names)
        return model

    def _run(
        self, options: Mapping[str, Any], built: Built | None, model: Any, feeds: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        self.copy.file(self.graph).write_bytes(model.SerializeToString())
        engine, device = (built.backend, built.device) if built else (backend("onnxruntime"), "cpu")
        self.opened += built is not None
        return list(engine.open(self.copy, self.graph, device, options).run(self.feeds if feeds is None else feeds))


@contextmanager
def _beside(bundle: Bundle, graph: str, model: Any) -> Iterator[Bundle]:
    """A directory that is a bundle as far as opening one graph goes: its weights copied, the graph left to be written.

    It lies among the built engines, where ``cache clean`` finds what a killed run leaves. Copied, because readers of ONNX
    refuse weights that lie elsewhere, by symbolic and by hard links too; every probe reads the weights anyway.
    """
    (bundle.path / "engines").mkdir(exist_ok=True)
    places = {entry.value for value in model.graph.initializer for entry in value.external_data if entry.key == "location"}
    with tempfile.TemporaryDirectory(prefix=".bisect.", suffix=".tmp", dir=bundle.path / "engines") as directory:
        folder = (Path(directory) / graph).parent
        folder.mkdir(parents=True)
        for place in places:
            shutil.copyfile(bundle.file(str(PurePosixPath(graph).parent / place)), folder / place)
        yield Bundle(Path(directory), bundle.manifest)


def _onnx() -> Any:
    try:
        import onnx
    except ImportError:
        raise MissingPackageError("--bisect changes graphs and needs onnx; run: pip install 'mteo-deploy[train]'") from None
    return onnx


def _name(node: Any) -> str:
    return str(node.name or node.output[0])


def _rms(values: Tensor) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2))) if values.size else 0.0


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
    allowed, written, engine = (_said(found[name]) for name in ("tolerance", "graph_error", "engine_error"))
    head = f"bisect: {where}, relative error {_said(found['error'])} against torch (allowed {allowed})"
    verdict, node = found["verdict"], found["departure"]
    if verdict == "nothing":
        return [f"bisect: nothing departs; worst is {where}, relative error {_said(found['error'])} (allowed {allowed})"]
    if verdict == "graph":
        why = f"the graph as written departs from torch as much ({written}) and the engine follows it ({engine})"
        return [head, f"{why}: the fault is in the bundle, not in the engine; export again, or see inspect --diff"]
    if verdict == "built engine":
        why = f"the engine opened afresh does what {found['graph']} says ({engine})"
        return [head, f"{why}: the fault is in what the built engine stored, or in its session; run: mteo-deploy build"]
    head += f"; {found['graph']}, {found['probes']} probes"
    if verdict == "fusion":
        first, last = found["between"]
        return [head, f"the fault goes away where the engine may not fuse {first} to {last}: look at its fusions there"]
    alone = f"; by itself on the right inputs {_said(node['alone'])}" if node["opens_alone"] else ""
    return [
        head,
        f"first at {node['operator']} {node['node']}, node {node['position']} of {node['of']}, {node['module'] or 'no module'}",
        f"its inputs are off by {_said(node['inputs'])} at most, its output {node['tensor']} by {_said(node['error'])}{alone}; "
        f"most of it in {node['region']}",
    ]
