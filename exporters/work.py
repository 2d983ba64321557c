"""Work: floating-point operations and bytes of a graph, counted where shapes are known, and kept in the manifest.

Convolutions and matrix products count, two operations per product and sum, as is usual; the rest is a few per cent and is fused
into them. Bytes are those that these layers must move: their weights once per run of the layer, and what they read and write
per image. An engine
that keeps a layer's output in a cache moves less, one that writes every elementwise result moves more.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import onnx_ir as ir

from mteo_deploy.exporters.passes.fix_batch import FixBatch
from mteo_deploy.exporters.passes.shapes import infer_shapes

UNKNOWN = ("Attention", "Einsum", "GRU", "LSTM", "RNN", "If", "Loop", "Scan", "DeformConv", "ConvInteger", "MatMulInteger")
"""Operators that hold such work too and are not counted: a graph with one has no figure rather than a wrong one."""

Shape = tuple[int, ...]


def _convolution(inputs: list[Shape], output: Shape) -> int:
    """Weights are ``[out, in / groups, ...]``: each output is a sum over the rest of its row."""
    return 2 * prod(output) * prod(inputs[1][1:])


def _transposed(inputs: list[Shape], output: Shape) -> int:
    """Weights are ``[in, out / groups, ...]``: each input goes into the rest of its row."""
    return 2 * prod(inputs[0]) * prod(inputs[1][1:])


def _product(inputs: list[Shape], output: Shape) -> int:
    return 2 * prod(output) * inputs[0][-1]


OPERATIONS: dict[str, Callable[[list[Shape], Shape], int]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "MatMul": _product,
}


def count(model: ir.Model, batch: int | str = "dynamic") -> dict[str, Any]:
    """Work of one run of a graph.

    Args:
        batch: images per run, where the graph is for one batch size only.

    Returns:
        ``flops`` and ``activation_bytes`` per image and ``weight_bytes`` per run; or the reason under ``unknown``.
    """
    copy = _of_one(model)
    images = 1 if batch == "dynamic" else int(batch)
    flops, moved, weights = 0, 0, 0
    for node in copy.graph:
        if node.op_type in UNKNOWN:
            return {"unknown": f"the work of {node.op_type} is not counted"}
        if node.op_type not in OPERATIONS and node.op_type != "Gemm":
            continue
        if not _is_known(node):
            return {"unknown": f"the shapes at {node.name or node.op_type} are not known"}
        flops += _flops(node)
        for value in map(_stored, _values(node)):
            if value.is_initializer():
                weights += _bytes(value)
            else:
                moved += _bytes(value)
    return {"flops": flops // images, "weight_bytes": weights, "activation_bytes": moved // images}


def by_node(model: ir.Model) -> dict[str, int]:
    """Floating-point operations of each node that counts, by name, for one image; without those whose shapes are not known."""
    counted = [node for node in _of_one(model).graph if node.op_type in OPERATIONS or node.op_type == "Gemm"]
    return {node.name or "": _flops(node) for node in counted if _is_known(node)}


def _of_one(model: ir.Model) -> ir.Model:
    """A copy for one image, where the batch is open, with shapes."""
    copy = model.clone()
    if not FixBatch(1)(copy).modified:
        infer_shapes(copy)
    return copy


def _values(node: ir.Node) -> list[ir.Value]:
    return [value for value in (*node.inputs, *node.outputs) if value is not None]


def _is_known(node: ir.Node) -> bool:
    return all(v.shape is not None and v.shape.is_static() and v.dtype is not None for v in _values(node))


def _stored(value: ir.Value) -> ir.Value:
    """What is moved for a value: where it is quantised, the low numbers."""
    node = value.producer()
    low = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None
    return value if low is None or low.shape is None or low.dtype is None else low


def _flops(node: ir.Node) -> int:
    shapes = [_shape(value) for value in node.inputs if value is not None]
    output = _shape(node.outputs[0])
    if node.op_type != "Gemm":
        return OPERATIONS[node.op_type](shapes, output)
    transposed = node.attributes.get_int("transA", 0)
    return 2 * prod(output) * shapes[0][0 if transposed else 1]


def _shape(value: ir.Value) -> Shape:
    return tuple(int(size) for size in value.shape or ())  # type: ignore[arg-type]


def _bytes(value: ir.Value) -> int:
    return int(prod(_shape(value)) * (value.dtype.itemsize if value.dtype else 0))
