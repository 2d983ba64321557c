"""Binding times: when each value of a graph is known.

A step graph's inputs arrive at two times, once per request and once per step; constants are known before both. What a
value depends on decides when it is known, so one forward pass over the nodes is enough. The analysis may call a value
later than it is, never earlier: control flow, random numbers and operators it cannot look into are step time.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum

import onnx_ir as ir

RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"},
)


class BindingTime(IntEnum):
    """When a value is known; the later of two is their maximum."""

    COMPILE = 0
    REQUEST = 1
    STEP = 2


def binding_times(model: ir.Model, request: Collection[str]) -> dict[ir.Value, BindingTime]:
    """The binding time of every value of the main graph: inputs, initialisers and node outputs.

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
    for node in graph:
        time = max((times[value] for value in node.inputs if value is not None), default=BindingTime.COMPILE)
        times.update(dict.fromkeys(node.outputs, time if is_pure(node, model) else BindingTime.STEP))
    return times


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
