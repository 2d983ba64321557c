"""FixBatch: a graph for one batch size, whose shape arithmetic then folds away."""

from __future__ import annotations

import onnx_ir as ir

from mteo_deploy.exporters.passes.shapes import infer_shapes


class FixBatch(ir.passes.InPlacePass):
    """Give every unknown dimension of the graph's inputs the same length and infer all other shapes again.

    Args:
        batch: that length. The trace leaves no dimension but the batch open.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for value in graph.inputs:
            if value.shape is not None and not value.shape.is_static():
                value.shape = ir.Shape([d if isinstance(d, int) else self.batch for d in value.shape])
                modified = True
        if modified:
            for node in graph:
                for output in node.outputs:
                    output.shape = None
            infer_shapes(model)
        return ir.passes.PassResult(model, modified=modified)
