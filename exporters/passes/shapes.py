"""Shapes and types where an exporter left holes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common


def infer_shapes(model: ir.Model) -> None:
    """ONNX's shape inference in place, with values through shape arithmetic; shapes that are known are kept.

    Nothing is done in the presence of sequences and optionals: onnx-ir would then call each that nobody has declared a
    tensor of its elements' type.
    """
    graphs = [model.graph, *model.functions.values()]
    nodes = [node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)]
    if not any("Sequence" in node.op_type or "Optional" in node.op_type for node in nodes):
        common.ShapeInferencePass()(model)
