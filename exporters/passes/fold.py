"""Fold: evaluate everything that has become constant, and drop what nothing uses any more.

The limits on sizes are lifted: the weights of time projections are large, and they are exactly what must die.
"""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

_NO_LIMIT = 1 << 40


class Fold(ir.passes.InPlacePass):
    """Constant folding and removal of unused nodes and initialisers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        before = model.graph.num_nodes(), len(model.graph.initializers)
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        optimizer.optimize_ir(model, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.RemoveUnusedNodesPass()(model)
        after = model.graph.num_nodes(), len(model.graph.initializers)
        return ir.passes.PassResult(model, modified=before != after)
