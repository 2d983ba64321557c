"""The realisation ``table``: one graph for all evaluations, with a step index and a table of what differs.

The step graphs of a plan differ in constants only: embeddings, folded and absorbed, and the update's coefficients. Row
``i`` of the table ``[evaluations, numbers]`` holds those of evaluation ``i``; the graph picks its row and cuts it up. The
table is an input of the graph, not a part of it, so another embedding set, or another number of steps, needs no other
engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mteo_deploy.exporters.constants import int64_constant

EVALUATION, TABLE = "evaluation", "table"


def tabulate(models: Sequence[ir.Model]) -> tuple[ir.Model, NDArray[np.float32]]:
    """One model for ``models``, equal but for constants: ``(graph, table)``.

    The graph takes two more inputs: ``evaluation``, an int64 scalar, and ``table``, float32 ``[evaluations, numbers]``.

    Raises:
        RuntimeError: when the models differ in more than the values of float32 constants.
    """
    first = models[0].clone()
    _same_structure(models)
    names = [name for name in first.graph.initializers if _differs(name, models)]
    table = np.stack([_row(model, names) for model in models])
    if names:
        _look_up(first, names, table.shape[1])
    return first, table


def _same_structure(models: Sequence[ir.Model]) -> None:
    def skeleton(model: ir.Model) -> list[object]:
        nodes = [(n.op_type, [v and v.name for v in n.inputs], [v.name for v in n.outputs]) for n in model.graph]
        return [nodes, [v.name for v in model.graph.inputs], sorted(model.graph.initializers)]

    expected = skeleton(models[0])
    for i, model in enumerate(models):
        if skeleton(model) != expected:
            raise RuntimeError(f"internal error: the graph of evaluation {i} has another structure than that of evaluation 0")


def _tensor(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None  # initialisers have values
    return tensor


def _differs(name: str, models: Sequence[ir.Model]) -> bool:
    tensors = [_tensor(model, name) for model in models]
    different = any(t is not tensors[0] and t.tobytes() != tensors[0].tobytes() for t in tensors)
    if different and {(t.dtype, tuple(t.shape)) for t in tensors} != {(ir.DataType.FLOAT, tuple(tensors[0].shape))}:
        raise RuntimeError(f"internal error: the constant {name} differs between evaluations in type or shape")
    return different


def _row(model: ir.Model, names: Sequence[str]) -> NDArray[np.float32]:
    parts = [_tensor(model, name).numpy().reshape(-1) for name in names]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


def _look_up(model: ir.Model, names: Sequence[str], width: int) -> None:
    """Replace the initialisers ``names`` by pieces of the table's row."""
    graph, floats = model.graph, ir.TensorType(ir.DataType.FLOAT)
    index = ir.Value(name=EVALUATION, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    table = ir.Value(name=TABLE, type=floats, shape=ir.Shape(["evaluations", width]))
    graph.inputs.extend([index, table])
    sizes = int64_constant(graph, "table/sizes", [_tensor(model, name).size for name in names])
    row = ir.node("Gather", [table, index], {"axis": 0}, name="table/row")
    cut = ir.node("Split", [row.outputs[0], sizes], {"axis": 0}, num_outputs=len(names), name="table/cut")
    row.outputs[0].name = "table/row"
    nodes = [row, cut]
    for name, piece in zip(names, cut.outputs, strict=True):
        old = graph.initializers[name]
        shape = tuple(_tensor(model, name).shape)
        piece.name, piece.type = f"table/{name}/flat", floats
        target = int64_constant(graph, f"table/shape_{'x'.join(map(str, shape))}", shape)
        view = ir.node("Reshape", [piece, target], name=f"table/{name}")
        view.outputs[0].name, view.outputs[0].type, view.outputs[0].shape = f"table/{name}", floats, ir.Shape(shape)
        old.replace_all_uses_with(view.outputs[0])
        del graph.initializers[name]
        nodes.append(view)
    graph.insert_before(graph[0], nodes)
