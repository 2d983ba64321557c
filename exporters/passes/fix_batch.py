"""FixBatch: a graph for one batch size, whose shape arithmetic then folds away."""

from __future__ import annotations

import onnx_ir as ir

from mteo_deploy.exporters.passes.shapes import infer_shapes


class FixBatch(ir.passes.InPlacePass):
    """Give the batch, the open first dimension of inputs, one length, and infer all other shapes again."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for value in graph.inputs:
            if value.shape and not isinstance(value.shape[0], int):
                value.shape = ir.Shape([self.batch, *list(value.shape)[1:]])
                modified = True
        if modified:
            for node in graph:
                for output in node.outputs:
                    output.shape = None
            infer_shapes(model)
        return ir.passes.PassResult(model, modified=modified)
