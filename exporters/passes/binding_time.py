"""Binding times: when each value of a graph is known.

A step graph's inputs arrive at two times, once per request and once per step; constants are known before both. What a
value depends on decides when it is known, so one forward pass over the nodes is enough. The analysis may call a value
later than it is, never earlier: control flow, random numbers and operators it cannot look into are step time.

The length of the batch is known with the request, whose inputs have it, and again at each step from the state's shape. So
what depends on it alone is of both times: integers, which are shapes, are made where they are needed, and numbers of it
(a vector repeated for each image, and what a layer makes of that) are request time.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum

import onnx_ir as ir

from mteo_deploy.exporters.constants import SHAPES

RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"},
)


class BindingTime(IntEnum):
    """When a value is known; the later of two is their maximum."""

    COMPILE = 0
    BATCH = 1
    REQUEST = 2
    STEP = 3


def binding_times(model: ir.Model, request: Collection[str]) -> dict[ir.Value, BindingTime]:
    """The binding time of every value of the main graph: inputs, initialisers and node outputs.

    The length of the batch is step time where no request input has it (:func:`batch_carrier`).

    Args:
        request: names of the graph inputs that are given once per request; every other input is given at each step.

    Raises:
        ValueError: when the graph has no input of one of these names.
    """
    graph = model.graph
    names = [value.name for value in graph.inputs]
    if missing := sorted(set(request) - set(names)):
        raise ValueError(f"expected request inputs among the graph's inputs {names}; found no {', '.join(missing)}")
    times = dict.fromkeys(graph.initializers.values(), BindingTime.COMPILE)
    for value in graph.inputs:  # after the initialisers: an input with a default value is still an input
        times[value] = BindingTime.REQUEST if value.name in request else BindingTime.STEP
    batch = batch_of(graph) if batch_carrier(graph, request) is not None else None
    for node in graph:
        if asks_for_batch(node, batch):
            times[node.outputs[0]] = BindingTime.BATCH
            continue
        time = max((times[value] for value in node.inputs if value is not None), default=BindingTime.COMPILE)
        if time == BindingTime.BATCH and not all(value.dtype in SHAPES for value in node.outputs):
            time = BindingTime.REQUEST
        times.update(dict.fromkeys(node.outputs, time if is_pure(node, model) else BindingTime.STEP))
    return times


def batch_of(graph: ir.Graph) -> ir.SymbolicDim | None:
    """The dynamic length of the batch: the first dimension of the first input, the state."""
    shape = graph.inputs[0].shape if graph.inputs else None
    found = shape[0] if shape else None
    return found if isinstance(found, ir.SymbolicDim) and found.value is not None else None


def batch_carrier(graph: ir.Graph, request: Collection[str]) -> ir.Value | None:
    """A request input whose first dimension is the length of the batch; None where there is none."""
    batch = batch_of(graph)
    found = (value for value in graph.inputs if value.name in request and value.shape)
    return next((value for value in found if batch is not None and value.shape[0] == batch), None)


def asks_for_batch(node: ir.Node, batch: ir.SymbolicDim | None) -> bool:
    """Whether this is a Shape whose dimensions are the length of the batch, and others that are known."""
    dims = shape_of(node) if node.op_type == "Shape" and node.domain == "" and batch is not None else []
    return batch in dims and all(isinstance(dim, int) or dim == batch for dim in dims)


def shape_of(node: ir.Node) -> list[int | ir.SymbolicDim]:
    """The dimensions that a Shape gives; none where nobody knows them."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return [] if shape is None else list(shape)[node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)]


def is_pure(node: ir.Node, model: ir.Model) -> bool:
    """Whether the node's outputs depend on its inputs alone, as far as can be seen.

    A subgraph may use any value of the graphs around it, and a custom operator may do anything.
    """
    if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()):
        return False
    function = model.functions.get(node.op_identifier())
    if function is not None:
        return all(is_pure(inner, model) for inner in function)
    return node.domain == "" and node.op_type not in RANDOM and not _drops(node)


def _drops(node: ir.Node) -> bool:
    """Whether this is a Dropout that may be in training mode (an input since opset 12, never before it since opset 7)."""
    mode = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
    if mode is None:
        return False
    tensor = None if mode.is_graph_input() else ir.convenience.get_const_tensor(mode)
    return tensor is None or bool(tensor.numpy())
