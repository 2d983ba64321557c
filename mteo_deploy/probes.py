"""Looking inside a graph while an engine runs it: copies with a few outputs more, compared with the graph as written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import backend
from mteo_deploy.engines.cache import Built, scratch
from mteo_deploy.errors import MissingPackageError
from mteo_deploy.numerics import relative_error, worst_place

Tensor = NDArray[Any]
UNOPTIMISED = {"engine_options": {"optimization": "off"}}
"""Options of ONNX Runtime that run a graph as it is written."""

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


class Probes:
    """Copies of one graph with more outputs, in the engine under test and as written, on the same inputs."""

    def __init__(self, bundle: Bundle, built: Built, graph: str, feeds: Mapping[str, Tensor]) -> None:
        self.bundle, self.built, self.graph, self.feeds = bundle, built, graph, dict(feeds)
        self.model = onnx_package().load(bundle.file(graph), load_external_data=False)
        self.nodes = list(self.model.graph.node)
        self.outputs = [value.name for value in self.model.graph.output]
        self.constants = {value.name: value for value in self.model.graph.initializer}
        self.made = {name: k for k, node in enumerate(self.nodes) for name in node.output if name}
        last = {name: k for k, node in enumerate(self.nodes) for name in node.input if name}
        self.last = last | dict.fromkeys(self.outputs, len(self.nodes))
        self.errors: dict[str, float] = {}
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self.opened = 0

    def __enter__(self) -> Probes:
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
            node=node_name(node),
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
        helper, node = onnx_package().helper, self.nodes[k]
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
        found = self._run(UNOPTIMISED, None, self._with_outputs(more))
        return dict(zip([*self.outputs, *more], found, strict=True))

    def _with_outputs(self, names: Iterable[str]) -> Any:
        model = type(self.model)()
        model.CopyFrom(self.model)
        model.graph.output.extend(onnx_package().ValueInfoProto(name=name) for name in names)
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
    places = {entry.value for value in model.graph.initializer for entry in value.external_data if entry.key == "location"}
    with scratch(bundle, "bisect") as directory:
        folder = (directory / graph).parent
        folder.mkdir(parents=True)
        for place in places:
            shutil.copyfile(bundle.file(str(PurePosixPath(graph).parent / place)), folder / place)
        yield Bundle(directory, bundle.manifest)


def onnx_package() -> Any:
    try:
        import onnx
    except ImportError:
        raise MissingPackageError("--bisect changes graphs and needs onnx; run: pip install 'mteo-deploy[train]'") from None
    return onnx


def node_name(node: Any) -> str:
    return str(node.name or node.output[0])


def _rms(values: Tensor) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2))) if values.size else 0.0
