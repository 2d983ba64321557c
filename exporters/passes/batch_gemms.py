"""BatchGemms: the same weights on several activations are one matrix product.

A joined prelude multiplies each modulation weight with N small activations, one per step. Reading the weight is the whole
cost of such a product, so stacking the activations' rows makes it N times cheaper. Rows do not meet in a product with a
constant right-hand side, nor in a bias that is the same for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from mteo_deploy.exporters.passes.shapes import infer_shapes

_Shape = tuple[int | str, ...]


class BatchGemms(ir.passes.InPlacePass):
    """Merge Gemm and MatMul nodes with the same constant weight: Concat -> one product -> Split.

    Attributes:
        declined: after the call, why products with the same weight were left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.declined: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.declined, modified = [], False
        groups = _groups(model.graph)
        if any(_shape(node.inputs[0]) is None for nodes in groups for node in nodes):
            infer_shapes(model)
        for nodes in groups:
            for alike in self._by_shape(nodes):
                for independent in _rounds(model.graph, alike):
                    if len(independent) > 1:
                        _merge(model.graph, independent)
                        modified = True
                    elif len(alike) > 1:
                        self.declined.append(f"{_title(independent[0])}: depends on another product with this weight")
        return ir.passes.PassResult(model, modified=modified)

    def _by_shape(self, nodes: list[ir.Node]) -> list[list[ir.Node]]:
        """The nodes that nothing stands against, apart by the shape of their activations."""
        shapes: dict[_Shape, list[ir.Node]] = defaultdict(list)
        for node in nodes:
            shape, reason = _shape(node.inputs[0]), _obstacle(node)
            if reason is None and shape is not None:
                shapes[shape].append(node)
            else:
                self.declined.append(f"{_title(node)}: {reason}")
        if len(shapes) > 1:
            found = " and ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
            self.declined.append(f"{_title(nodes[0])}: activations of shapes {found}, not known to be equal")
        return [alike for alike in shapes.values() if len(alike) > 1]


def _title(node: ir.Node) -> str:
    weight = node.inputs[1]
    return f"{node.op_type} {node.outputs[0].name} with {weight.name if weight is not None else None}"


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and not value.is_graph_input()


def _groups(graph: ir.Graph) -> list[list[ir.Node]]:
    """Products with the same operator, constant weight, bias and attributes, where there are several."""
    groups: dict[Any, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.domain == "" and node.op_type in ("Gemm", "MatMul") and _is_constant(node.inputs[1]):
            attributes = sorted((name, attribute.value) for name, attribute in node.attributes.items())
            groups[node.op_type, tuple(node.inputs[1:]), tuple(attributes)].append(node)
    return [nodes for nodes in groups.values() if len(nodes) > 1]


def _shape(value: ir.Value | None) -> _Shape | None:
    """Dimensions as numbers and names, None unless all are known: equal names are equal numbers within a graph."""
    if value is None or value.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return None if None in dims else tuple(dim for dim in dims if dim is not None)


def _obstacle(node: ir.Node) -> str | None:
    """Why the node's rows cannot be stacked with others, or None."""
    shape, weight = _shape(node.inputs[0]), _shape(node.inputs[1])
    if shape is None:
        return "the shape of its activation is not known"
    if len(shape) < 2 or weight is None or len(weight) != 2:
        return f"expected an activation of rank 2 or more and a weight of rank 2; found shapes {shape} and {weight}"
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0):
        return "its activation is transposed: the rows are not on axis 0"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return None if bias is None else _bias_obstacle(node, bias, weight)


def _bias_obstacle(node: ir.Node, bias: ir.Value, weight: _Shape) -> str | None:
    width = weight[0 if node.attributes.get_int("transB", 0) else 1]
    shape = _shape(bias)
    if shape in ((width,), (1, width)):
        return None
    return f"expected a bias of shape [{width}] or [1, {width}], the same for all rows; found {shape}"


def _rounds(graph: ir.Graph, nodes: list[ir.Node]) -> Iterator[list[ir.Node]]:
    """Sets of nodes that do not depend on one another.

    A generator on purpose: a merge makes new dependencies and another order, so each round looks at the graph as the last
    one left it.
    """
    left = set(nodes)
    while left:
        chosen: list[ir.Node] = []
        for node in graph:  # sorted: only a later node can depend on an earlier
            if node in left and not _depends(node, chosen):
                chosen.append(node)
        left.difference_update(chosen)
        yield chosen


def _depends(node: ir.Node, others: list[ir.Node]) -> bool:
    seen: set[ir.Node] = set()
    waiting = [node]
    while waiting and others:
        for before in waiting.pop().predecessors():
            if before in others:
                return True
            if before not in seen:
                seen.add(before)
                waiting.append(before)
    return False


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first, count = nodes[0], len(nodes)
    stem = f"batched/{first.outputs[0].name}"

    def named(node: ir.Node, part: str) -> ir.Node:
        node.name = f"{stem}/{part}"
        if len(node.outputs) == 1:
            node.outputs[0].name, node.outputs[0].type = node.name, first.outputs[0].type
        return node

    concat = named(ir.node("Concat", [node.inputs[0] for node in nodes], {"axis": 0}), "concat")
    inputs = [concat.outputs[0], *first.inputs[1:]]
    product = named(ir.Node("", first.op_type, inputs, list(first.attributes.values())), "product")
    by_count = {"num_outputs": count} if graph.opset_imports.get("", 0) >= 18 else {}  # before: equal parts by default
    split = named(ir.node("Split", product.outputs, {"axis": 0, **by_count}, num_outputs=count), "split")
    old = [node.outputs[0] for node in nodes]
    ir.convenience.replace_nodes_and_values(graph, nodes[-1], nodes, [concat, product, split], old, split.outputs)
    graph.sort()  # the product stands where the last activation is known, other outputs' users may stand before it
