"""What crosses from the prelude when the network runs on several branches of every image.

Inside, a guided network's batch is twice as long as the request's. Everything outside a graph counts in images: engines that
compile for batch sizes, and those who cut a batch into parts. So a tensor ``[2 * batch, ...]`` crosses as ``[batch, 2, ...]``;
the rows of an image are neighbours, so both are the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from mteo_deploy.exporters.constants import int64_constant


def cross_by_image(template: ir.Model, prelude: ir.Model, sources: Sequence[Mapping[str, str]], branches: int) -> None:
    """Give every tensor that crosses a first dimension of images, in place.

    Args:
        template: the step graph of all evaluations, with what was hoisted as inputs.
        prelude: of all evaluations.
        sources: per evaluation, input of the template -> output of the prelude.
    """
    batch = template.graph.inputs[0].shape[0]  # type: ignore[index]  # the trace knows every shape
    outputs = {value.name: value for value in prelude.graph.outputs}
    for value in list(template.graph.inputs):
        if value.name in sources[0] and value.shape is not None and value.shape[0] != batch:
            numbers = [d for d in list(value.shape)[1:] if isinstance(d, int)]
            if len(numbers) + 1 < value.shape.rank():
                raise RuntimeError(f"internal error: {value.name} crosses for {branches} branches with {value.shape} open")
            for name in dict.fromkeys(source[value.name] for source in sources):
                _cut_output(prelude.graph, outputs[name], [batch, branches, *numbers])
            _join_input(template.graph, value, [batch, branches, *numbers])


def _reshape(graph: ir.Graph, value: ir.Value, target: list[int], name: str) -> ir.Node:
    constant = int64_constant(graph, f"branches/shape_{'x'.join(map(str, target))}", target)
    node = ir.node("Reshape", [value, constant], name=f"branches/{name}")  # the join names nodes after their outputs
    node.outputs[0].name, node.outputs[0].type = name, value.type
    return node


def _cut_output(graph: ir.Graph, value: ir.Value, shape: list[int | ir.SymbolicDim]) -> None:
    name = value.name or ""
    value.name = f"{name}/rows"
    node = _reshape(graph, value, [-1, *(d for d in shape[1:] if isinstance(d, int))], name)
    node.outputs[0].shape = ir.Shape(shape)
    graph.append(node)
    graph.outputs[list(graph.outputs).index(value)] = node.outputs[0]


def _join_input(graph: ir.Graph, value: ir.Value, shape: list[int | ir.SymbolicDim]) -> None:
    crossing = ir.Value(name=value.name, type=value.type, shape=ir.Shape(shape))
    node = _reshape(graph, crossing, [-1, *(d for d in shape[2:] if isinstance(d, int))], f"{value.name}/rows")
    node.outputs[0].shape = value.shape
    graph.inputs[list(graph.inputs).index(value)] = crossing
    value.replace_all_uses_with(node.outputs[0])
    graph.insert_before(graph[0], node)
