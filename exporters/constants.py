"""Small constants that a rewritten graph needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

SHAPES = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING)
"""Types of constants that are no weights: engines read them while they open a graph."""


def int64_constant(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    """The initialiser ``name`` of a graph, int64 ``[len(values)]``: made, unless it is there already."""
    if name in graph.initializers:
        return graph.initializers[name]
    array = np.array(values, np.int64)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(array.shape))
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    return value
