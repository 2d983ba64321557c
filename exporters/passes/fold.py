"""Fold: evaluate everything that has become constant, and drop what nothing uses any more.

The limits on sizes are lifted: the weights of time projections are large, and they are exactly what must die. onnxscript
folds most nodes and simplifies on the way; what it leaves on purpose (fills, nodes of several outputs) and what no rule of it
takes is cut out and evaluated as one graph.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxscript import optimizer

from mteo_deploy.exporters.evaluate import evaluate
from mteo_deploy.exporters.passes.binding_time import is_pure
from mteo_deploy.exporters.passes.shapes import infer_shapes

_NO_LIMIT = 1 << 40
STORED = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""How a weight of fewer bits is stored: evaluated, it would be float32 again."""


class Fold(ir.passes.InPlacePass):
    """Constant folding and removal of unused nodes and initialisers.

    Afterwards no node has only constant inputs but those that :func:`may_stay` names.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        before = model.graph.num_nodes(), len(model.graph.initializers)
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        while True:
            optimizer.optimize_ir(model, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT)
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            if not _evaluate_constants(model):
                break
        common.RemoveUnusedNodesPass()(model)
        after = model.graph.num_nodes(), len(model.graph.initializers)
        return ir.passes.PassResult(model, modified=before != after)

    def ensures(self, model: ir.Model) -> None:
        left = [f"{node.op_type} {node.name}" for node in constant_nodes(model)]
        if left:
            raise ir.passes.PostconditionError(f"internal error: constant, and not folded: {', '.join(left[:8])}")


def may_stay(node: ir.Node, model: ir.Model) -> bool:
    """Whether a node of constants is not to be evaluated: control flow, random numbers and custom operators (nobody knows what
    they give), weights stored in fewer bits, what is no tensor, and the Identity that gives a constant as the graph's output.
    """
    if node.op_type == "Identity" and node.outputs[0].is_graph_output():
        return True
    tensors = all(
        value.type is None or isinstance(value.type, ir.TensorType) for value in [*node.outputs, *node.inputs] if value
    )
    return (
        node.op_type in STORED
        or "Sequence" in node.op_type
        or "Optional" in node.op_type
        or not (tensors and is_pure(node, model))
    )


def constant_nodes(model: ir.Model) -> dict[ir.Node, None]:
    """The nodes of the main graph that depend on constants alone and are to be evaluated, in order."""
    found: dict[ir.Node, None] = {}

    def is_constant(value: ir.Value | None) -> bool:
        if value is None or value.producer() in found:
            return True
        return value.const_value is not None and not value.is_graph_input()

    for node in model.graph:
        if all(map(is_constant, node.inputs)) and not may_stay(node, model):
            found[node] = None
    return found


def _evaluate_constants(model: ir.Model) -> bool:
    """Replace the constant nodes by what they give, in place; whether there were any."""
    graph, nodes = model.graph, constant_nodes(model)
    if not nodes:
        return False
    if any(value.dtype is None for node in nodes for value in node.outputs):
        infer_shapes(model)  # an engine wants to know its outputs' types
    needed = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(user not in nodes for user in value.consumers())
    ]
    for value, array in zip(needed, _numbers(model, nodes, needed), strict=True):
        _replace(graph, value, array)
    graph.remove(list(nodes), safe=True)
    return True


def _numbers(model: ir.Model, nodes: dict[ir.Node, None], needed: list[ir.Value]) -> list[NDArray[Any]]:
    if not needed:
        return []
    graph = model.graph
    view = ir.GraphView(
        [],
        needed,
        nodes=list(nodes),
        initializers=[v for v in graph.initializers.values() if any(user in nodes for user in v.consumers())],
        opset_imports=dict(graph.opset_imports),
        name="constants",
    ).clone()
    part = ir.Model(view, ir_version=model.ir_version, functions=[one.clone() for one in model.functions.values()])
    found = evaluate(part, {})
    if found is None:
        found = evaluate(part, {}, reference=True)
    assert found is not None  # the reference evaluator takes every model
    return found


def _replace(graph: ir.Graph, value: ir.Value, array: NDArray[Any]) -> None:
    """Make the value an initialiser; behind an Identity where it is an output of the graph."""
    name, tensor = value.name, ir.tensor(np.ascontiguousarray(array).reshape(np.shape(array)), dtype=value.dtype)
    constant = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))
    tensor.name, constant.const_value = name, tensor
    value.name = f"{name}/before"
    if value.is_graph_output():
        constant.name = tensor.name = f"{name}/constant"
        node = ir.node("Identity", [constant], name=f"{name}/output")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, constant.type, constant.shape
        graph.append(node)
        graph.outputs[list(graph.outputs).index(value)] = node.outputs[0]
    value.replace_all_uses_with(constant)
    graph.register_initializer(constant)
