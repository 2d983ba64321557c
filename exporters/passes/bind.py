"""Bind: site inputs become constants."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class Bind(ir.passes.InPlacePass):
    """Turn the graph inputs named in ``values`` into initialisers of those values."""

    def __init__(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        super().__init__()
        self.values = values

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        bound = [value for value in graph.inputs if value.name in self.values]
        for value in bound:
            graph.inputs.remove(value)
            value.const_value = ir.tensor(self.values[value.name], name=value.name)
            graph.register_initializer(value)
        return ir.passes.PassResult(model, modified=bool(bound))
