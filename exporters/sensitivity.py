"""Sensitivity: the error that quantising each layer alone makes at each evaluation, measured in the graph itself.

Opening a graph per layer and evaluation would take longer than everything else, so every layer's quantisation is put behind a
switch, and one graph per evaluation answers for all of them. Scales are inputs too: the same graph tells what other scales do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mteo_deploy.exporters import work
from mteo_deploy.exporters.passes.layers import Layer, layers_of
from mteo_deploy.exporters.passes.quantize import Array, Format, Quantize, declined
from mteo_deploy.exporters.running import Graphs, Run, Trajectories, Values
from mteo_deploy.exporters.timing import Kind

MOST = 80
"""Layers that are measured one by one; of more, those of one module are measured together."""
LOUD, CHEAP = 0.1, 0.02
"""A layer with more than the first share of an evaluation's squared error and less than the second share of its work is left in
float32 unless the caller decides: it costs next to nothing there."""


class Switched(Quantize):
    """Quantize, with an input ``switch/<layer>`` (bool) for each layer and ``<input>/scale`` for each scale."""

    def take(self, graph: ir.Graph, layer: Layer, index: int, value: ir.Value) -> None:
        exact, switch = layer.node.inputs[index], _switch(graph, layer.name)
        assert exact is not None  # a layer has its input and its weight
        name = f"{layer.name}/{index}/switched"
        node = ir.node("Where", [switch, value, exact], name=name)
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, exact.shape
        graph.insert_before(layer.node, node)
        layer.node.replace_input_with(index, node.outputs[0])

    def scale(self, graph: ir.Graph, name: str, values: Array) -> ir.Value:
        return _input(graph, name, ir.DataType.FLOAT)


def _switch(graph: ir.Graph, layer: str) -> ir.Value:
    name = f"switch/{layer}"
    return next((value for value in graph.inputs if value.name == name), None) or _input(graph, name, ir.DataType.BOOL)


def _input(graph: ir.Graph, name: str, kind: ir.DataType) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([]))
    graph.inputs.append(value)
    return value


class Switchboard:
    """One evaluation's graph with a switch for each layer.

    Args:
        scales: of layers' inputs; any other may be given when it is run.

    Attributes:
        layers: names of those that can be quantised.
    """

    def __init__(self, model: ir.Model, form: Format, scales: Mapping[str, float], graphs: Graphs, stored: Any = None) -> None:
        model = model.clone()
        quantize = Switched(form, scales, stored=stored)
        quantize(model)
        self.layers = [name for name, what in quantize.layers.items() if what.startswith("weight")]
        self._run, self._scales = graphs.open(model), dict(scales)

    def __call__(self, values: Values, on: Collection[str], scales: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Outputs with the layers ``on`` quantised."""
        given: dict[str, Any] = {f"switch/{name}": np.array(name in on) for name in self.layers}
        given |= {f"{name}/scale": np.array(scale, np.float32) for name, scale in {**self._scales, **(scales or {})}.items()}
        return self._run({**values, **given})

    def as_run(self, on: Collection[str], scales: Mapping[str, float] | None = None) -> Run:
        return lambda values: self(values, on, scales)


@dataclass(frozen=True)
class Sensitivity:
    """Error that each layer alone makes.

    Attributes:
        groups: name -> its layers.
        errors: group -> relative error of each evaluation's next state.
        work: layer -> its share of a graph's floating-point operations; empty where it is not known.
        kinds: layers alike, and the time that quantising them saves; empty where it was not measured.
    """

    groups: dict[str, list[str]]
    errors: dict[str, list[float]]
    work: dict[str, float]
    kinds: Sequence[Kind] = ()

    def gain(self, group: str) -> float:
        """What quantising a group gains: time, shared by layers alike as their work is, or work where no time was measured."""
        layers = self.groups[group]
        if not self.kinds:
            return self._work(layers)
        shares = [(kind.saved, self._work([one for one in kind.layers if one in layers]), kind.layers) for kind in self.kinds]
        return sum(saved * part / self._work(alike) for saved, part, alike in shares if part)

    def slow(self) -> list[str]:
        """Layers that take longer when they are quantised."""
        return [layer for kind in self.kinds if kind.slow for layer in kind.layers]

    def _work(self, layers: Sequence[str]) -> float:
        return sum(self.work.get(layer, 0.0) for layer in layers)

    def loud(self) -> list[str]:
        """Layers that make much of an evaluation's error for little work."""
        squares = np.array(list(self.errors.values())) ** 2
        shares = (squares / np.maximum(squares.sum(axis=0), 1e-30)).max(axis=1)
        found = [group for group, share in zip(self.errors, shares, strict=True) if share > LOUD and self._cheap(group)]
        return [layer for group in found for layer in self.groups[group]]

    def _cheap(self, group: str) -> bool:
        return bool(self.work) and self._work(self.groups[group]) < CHEAP


def sensitivity(
    boards: Sequence[Switchboard], held: Trajectories, work_of: Mapping[str, float], kinds: Sequence[Kind] = ()
) -> Sensitivity:
    """Measure each layer, or each module where there are too many, on the states of the first batch of trajectories."""
    groups, indices = group(boards[0].layers), range(len(boards))
    errors = {name: [state_error(boards[i].as_run(layers), held, i, 1) for i in indices] for name, layers in groups.items()}
    return Sensitivity(groups, errors, dict(work_of), kinds)


def group(layers: Sequence[str], most: int = MOST) -> dict[str, list[str]]:
    """Layers by the longest part of their module path that leaves ``most`` groups at most; each alone where they are few."""
    if len(layers) <= most:
        return {name: [name] for name in layers}
    found: dict[str, list[str]] = {}
    for depth in range(max(name.count(".") for name in layers), -1, -1):
        found = {}
        for name in layers:
            found.setdefault(".".join(name.split(".")[: depth + 1]), []).append(name)
        if len(found) <= most:
            break
    return found


def state_error(run: Run, held: Trajectories, index: int, batches: int | None = None) -> float:
    """Relative error of the next state of an evaluation that is given the float32 trajectory's own inputs.

    Args:
        batches: how many to look at; None for all.
    """
    found = [run(feeds[index])["next_state"] for feeds in held.feeds[:batches]]
    return relative(found, [states[index] for states in held.states[:batches]])


def relative(found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> float:
    """Root mean square of the difference over that of what was expected."""
    a, b = (np.concatenate(list(one)).astype(np.float64) for one in (found, expected))
    return float(np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-12))


def work_shares(model: ir.Model, form: Format) -> dict[str, float]:
    """Layer that can be quantised -> its share of the graph's operations; empty where shapes are not known."""
    operations = work.by_node(model)
    total = sum(operations.values())
    layers = [layer for layer in layers_of(model.graph) if declined(layer, form) is None]
    return {layer.name: operations.get(layer.node.name or "", 0) / total for layer in layers} if total else {}
