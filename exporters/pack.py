"""Pack what a step takes from the prelude: many small tensors become one.

A DiT with labels hoists half a dozen vectors per block, so that a step graph would take scores of inputs, and every one
of them costs an engine call some microseconds: more, on a small network, than hoisting saves. One tensor
``[batch, numbers]`` per evaluation costs one input; the step graph cuts it up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

LARGEST = 2**14
"""Numbers per image above which a tensor crosses alone: cutting it out would cost more than an input does."""


def packable(value: ir.Value) -> bool:
    """Whether a value is a small float32 tensor ``[batch, ...]``, all but the batch of known size."""
    if value.dtype != ir.DataType.FLOAT or value.shape is None or value.shape.rank() < 2:
        return False
    return all(isinstance(d, int) for d in list(value.shape)[1:]) and _width(value) <= LARGEST


def pack_inputs(model: ir.Model, names: Sequence[str], packed: str) -> None:
    """Replace the inputs ``names`` of a step graph, in place, by one input ``packed`` that is cut up in their order."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    old = [inputs[name] for name in names]
    widths = [_width(value) for value in old]
    batch = old[0].shape[0] if old[0].shape is not None else None
    source = ir.Value(name=packed, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([batch, sum(widths)]))
    graph.inputs.insert(list(graph.inputs).index(old[0]), source)
    sizes = _constant(graph, f"{packed}/sizes", widths)
    cut = ir.node("Split", [source, sizes], {"axis": 1}, num_outputs=len(old), name=f"{packed}/cut")
    nodes = [cut]
    for value, piece, width in zip(old, cut.outputs, widths, strict=True):
        graph.inputs.remove(value)
        name = value.name
        piece.name, piece.type, piece.shape = f"{name}/flat", value.type, ir.Shape([batch, width])
        if value.shape is not None and value.shape.rank() > 2:
            nodes.append(_reshape(graph, piece, list(value.shape)[1:], f"{name}/view", value.shape))
        new = piece if value.shape is None or value.shape.rank() == 2 else nodes[-1].outputs[0]
        value.replace_all_uses_with(new)
        value.name, new.name = None, name
    graph.insert_before(graph[0], nodes)


def pack_outputs(model: ir.Model, names: Sequence[str], packed: str) -> None:
    """Add to a prelude, in place, the output ``packed``: its outputs ``names`` side by side. These stay."""
    graph = model.graph
    outputs = {value.name: value for value in graph.outputs}
    parts = []
    for i, name in enumerate(names):
        value = outputs[name]
        if value.shape is not None and value.shape.rank() > 2:
            shape = ir.Shape([value.shape[0], _width(value)])
            graph.append(_reshape(graph, value, [_width(value)], f"{packed}/{i}", shape))
            value = graph[-1].outputs[0]
        parts.append(value)
    node = ir.node("Concat", parts, {"axis": 1}, name=f"{packed}/concat")
    result = node.outputs[0]
    result.name, result.type = packed, ir.TensorType(ir.DataType.FLOAT)
    first = parts[0].shape
    result.shape = ir.Shape([None if first is None else first[0], sum(_width(outputs[name]) for name in names)])
    graph.append(node)
    graph.outputs.append(result)


def drop_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Make outputs of a prelude inner values, in place."""
    for value in [value for value in model.graph.outputs if value.name in set(names)]:
        model.graph.outputs.remove(value)


def _width(value: ir.Value) -> int:
    """Numbers per image."""
    return int(np.prod([d for d in list(value.shape or ())[1:] if isinstance(d, int)]))


def _reshape(graph: ir.Graph, value: ir.Value, rest: Sequence[object], name: str, shape: ir.Shape) -> ir.Node:
    target = _constant(graph, f"pack/shape_{'x'.join(map(str, rest))}", [0, *(int(str(d)) for d in rest)])  # 0: as it is
    node = ir.node("Reshape", [value, target], name=name)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, shape
    return node


def _constant(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    array = np.array(values, np.int64)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(array.shape))
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    return value
