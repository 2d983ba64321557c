"""What crosses from the prelude when the network runs on several branches of every image.

Inside, a guided network's batch is twice as long as the request's. Everything outside a graph counts in images: engines that
compile for batch sizes, and those who cut a batch into parts. So a tensor ``[2 * batch, ...]`` crosses as ``[batch, 2, ...]``;
the rows of an image are neighbours, so both are the same memory.
"""

from __future__ import annotations

import onnx_ir as ir

from mteo_deploy.exporters.constants import int64_constant


def cross_by_image(template: ir.Model, prelude: ir.Model, branches: int) -> None:
    """Give every tensor that crosses a first dimension of images, in place.

    Args:
        template: the step graph, with what was hoisted as inputs.
        prelude: gives these as outputs of the same names.
    """
    batch = template.graph.inputs[0].shape[0]  # type: ignore[index]  # the trace knows every shape
    outputs = {value.name: value for value in prelude.graph.outputs}
    for value in list(template.graph.inputs):
        if value.name in outputs and value.shape is not None and value.shape[0] != batch:
            rest = list(value.shape)[1:]
            if not all(isinstance(d, int) for d in rest):
                raise RuntimeError(f"internal error: {value.name} of open shape {value.shape} crosses for {branches} branches")
            shape = ir.Shape([batch, branches, *rest])
            _split_output(prelude.graph, outputs[value.name], shape)
            _join_input(template.graph, value, shape)


def merge_views(model: ir.Model) -> None:
    """Let a Reshape of a Reshape read what the first one reads, in place."""
    for node in list(model.graph):
        before = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
        if before is not None and before.op_type == "Reshape" and _is_absolute(node.inputs[1]):
            node.replace_input_with(0, before.inputs[0])
            if not before.outputs[0].uses():
                model.graph.remove(before, safe=True)


def _is_absolute(target: ir.Value | None) -> bool:
    """Whether a Reshape's target says nothing about the shape before it."""
    tensor = None if target is None else target.const_value
    return tensor is not None and 0 not in tensor.numpy()


def _reshape(graph: ir.Graph, value: ir.Value, target: list[int], name: str, shape: ir.Shape) -> ir.Node:
    constant = int64_constant(graph, f"branches/shape_{'x'.join(map(str, target))}", target)
    node = ir.node("Reshape", [value, constant], name=name)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, shape
    return node


def _split_output(graph: ir.Graph, value: ir.Value, shape: ir.Shape) -> None:
    name = value.name or ""
    value.name = f"{name}/rows"
    node = _reshape(graph, value, [-1, *(int(d) for d in list(shape)[1:])], name, shape)  # type: ignore[arg-type]
    graph.append(node)
    graph.outputs[list(graph.outputs).index(value)] = node.outputs[0]


def _join_input(graph: ir.Graph, value: ir.Value, shape: ir.Shape) -> None:
    name = value.name or ""
    crossing = ir.Value(name=name, type=value.type, shape=shape)
    node = _reshape(graph, crossing, [-1, *(int(d) for d in list(shape)[2:])], f"{name}/rows", value.shape or shape)  # type: ignore[arg-type]
    graph.inputs[list(graph.inputs).index(value)] = crossing
    value.replace_all_uses_with(node.outputs[0])
    value.name = None
    graph.insert_before(graph[0], node)
