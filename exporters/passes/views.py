"""Views: a Reshape to a shape that is known but for one dimension needs no arithmetic to find that dimension.

With an open batch the exporter writes every shape as Shape, Slice and Concat of another tensor's. Where all dimensions but
one are known, the target is a constant with -1 in its place, and the arithmetic is dead. What is left (height and width are
open) asks the state for the length of the batch, not a request input, which the step graphs would have to take in for that.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from mteo_deploy.exporters.constants import int64_constant
from mteo_deploy.exporters.passes.shapes import infer_shapes


class Views(ir.passes.InPlacePass):
    """Give Reshapes constant targets, and remove what computed them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        infer_shapes(model)
        modified = _ask_the_state(graph)
        for node in list(graph):
            target = self._target(node)
            if target is not None:
                name = f"shape/{'x'.join(map(str, target))}"
                node.replace_input_with(1, int64_constant(graph, name, target))
                modified = True
        if modified:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=modified)

    @staticmethod
    def _target(node: ir.Node) -> list[int] | None:
        """The constant that a Reshape's computed target comes to; None where it is one already, or nobody knows."""
        computed = node.op_type == "Reshape" and node.inputs[1] is not None and node.inputs[1].const_value is None
        shape = node.outputs[0].shape if computed else None
        if shape is None or 0 in shape:
            return None
        target = [d if isinstance(d, int) else -1 for d in shape]
        return target if target.count(-1) <= 1 else None


def _ask_the_state(graph: ir.Graph) -> bool:
    """Take the length of the batch from the first input's shape wherever another tensor's is asked for it."""
    state, modified = graph.inputs[0], False
    batch = state.shape[0] if state.shape else None
    if not isinstance(batch, ir.SymbolicDim) or batch.value is None:
        return False
    for node in graph:
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source in (None, state) or source.shape is None:
            continue
        ends = {name: attribute.as_int() for name, attribute in node.attributes.items()}
        if ends in ({"end": 1}, {"start": 0, "end": 1}) and source.shape[0] == batch:  # slim drops what is a default
            node.replace_input_with(0, state)
            modified = True
    return modified
