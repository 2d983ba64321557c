"""A graph with bf16 tensors as one in float32, for evaluators that compute little in bf16.

Every bf16 tensor is kept in float32 and rounded to bf16 where it is made. So a layer's inputs and output are what they are in
bf16, and its sums are what an engine's are that adds up in float32, as processors and GPUs with bf16 do.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

BF16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def has_bf16(model: ir.Model) -> bool:
    """Whether a tensor of the graph is bf16."""
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    return any(value.dtype == BF16 for value in values)


def emulate(model: ir.Model) -> ir.Model:
    """A copy of ``model`` with the same numbers and no layer in bf16. Types must be known; inputs and outputs are not bf16."""
    model = model.clone()
    for value in model.graph.initializers.values():
        if value.dtype == BF16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(FLOAT)
    for node in list(model.graph):
        for output in node.outputs:
            if output.dtype == BF16:
                _round(model.graph, node, output)
    return model


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Put the rounding of ``value`` between its node and all that reads it."""
    uses = list(value.uses())
    if node.op_type == "Cast":
        narrow = value
    else:
        value.type = ir.TensorType(FLOAT)
        narrow = _cast(graph, value, BF16, node)
    wide = _cast(graph, narrow, FLOAT, narrow.producer() or node)
    for user, index in uses:
        user.replace_input_with(index, wide)


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, after: ir.Node) -> ir.Value:
    name = f"{value.name}/{to.name.lower()}"
    cast = ir.node("Cast", [value], {"to": int(to)}, name=name)
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, ir.TensorType(to), value.shape
    graph.insert_after(after, cast)
    return cast.outputs[0]
