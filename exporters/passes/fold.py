"""Fold: evaluate everything that has become constant, and drop what nothing uses any more.

The limits on sizes are lifted: the weights of time projections are large, and they are exactly what must die. onnxscript
folds nodes of one output; Split, which cuts a modulation into scale, shift and gate, is folded here.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

_NO_LIMIT = 1 << 40


class Fold(ir.passes.InPlacePass):
    """Constant folding and removal of unused nodes and initialisers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        before = model.graph.num_nodes(), len(model.graph.initializers)
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        while True:
            optimizer.optimize_ir(model, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT)
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            if not _fold_splits(model.graph):
                break
        common.RemoveUnusedNodesPass()(model)
        after = model.graph.num_nodes(), len(model.graph.initializers)
        return ir.passes.PassResult(model, modified=before != after)


def _fold_splits(graph: ir.Graph) -> bool:
    """Replace Split nodes of constants by their pieces."""
    modified = False
    for node in list(graph):
        tensor = node.inputs[0].const_value if node.op_type == "Split" and node.inputs[0] is not None else None
        if tensor is None or any(output.is_graph_output() for output in node.outputs):
            continue
        pieces = _pieces(node, tensor.numpy())
        if pieces is None:
            continue
        for output, piece in zip(node.outputs, pieces, strict=True):
            value = ir.Value(name=output.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(piece.shape))
            value.const_value = ir.tensor(np.ascontiguousarray(piece), dtype=tensor.dtype, name=output.name)
            output.replace_all_uses_with(value)
            output.name = f"{output.name}/before"
            graph.register_initializer(value)
        graph.remove(node, safe=True)
        modified = True
    return modified


def _pieces(node: ir.Node, values: np.ndarray) -> list[np.ndarray] | None:
    """What Split makes of a constant; None where the sizes are not constant."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    sizes = node.inputs[1] if len(node.inputs) > 1 else None
    if sizes is not None:
        if sizes.const_value is None:
            return None
        return np.split(values, np.cumsum(sizes.const_value.numpy())[:-1], axis=axis)
    length = -(-values.shape[axis] // len(node.outputs))  # the last piece may be smaller
    return np.split(values, [length * i for i in range(1, len(node.outputs))], axis=axis)
