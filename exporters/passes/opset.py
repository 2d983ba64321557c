"""A graph's opset raised where a type needs it."""

from __future__ import annotations

import onnx_ir as ir


def raise_opset(graph: ir.Graph, opset: int) -> None:
    """Say that a graph is written in ``opset``, 22 at most, if it is older than that.

    From 20 to 22 ONNX changed what operators take and give (bf16, int4, blocks), and the meaning of one only: the scale of
    GroupNormalization, which is per group before 21. A graph with that one is left as it is.
    """
    old = graph.opset_imports[""]
    if 20 <= old < opset <= 22 and not any(node.op_type == "GroupNormalization" for node in graph):
        graph.opset_imports[""] = opset
