"""Layers with weights, as a graph's reader knows them: which node, which input is the weight, and the module's name."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

WEIGHTED = ("Conv", "MatMul", "Gemm")
PARAMETERS = (".weight", ".bias")


@dataclass(frozen=True)
class Layer:
    """A convolution or product with a constant weight.

    Attributes:
        name: the module's, where the graph tells; else the node's.
        weight: its weight, float32.
        axis: of the weight's output channels.
    """

    node: ir.Node
    name: str
    weight: ir.Value
    axis: int

    @property
    def activation(self) -> ir.Value:
        found = self.node.inputs[0]
        assert found is not None  # ONNX requires it
        return found


def layers_of(graph: ir.Graph) -> list[Layer]:
    """Every layer of a graph, in its order; names are unique."""
    found: list[Layer] = []
    names: set[str] = set()
    for node in graph:
        weight = node.inputs[1] if node.op_type in WEIGHTED and node.domain in ("", "ai.onnx") else None
        tensor = None if weight is None or not weight.is_initializer() else weight.const_value
        if weight is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        axis = 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) else len(tensor.shape) - 1
        name = layer_name(node)
        name = name if name not in names else f"{name}/{node.name}"
        names.add(name)
        found.append(Layer(node, name, weight, axis))
    return found


def layer_name(node: ir.Node) -> str:
    """Module path of a node: of a parameter it takes, or of the bias added right behind it; else the node's own name.

    The exporter transposes the weight of a product and forgets its name; its bias, in an Add of its own, keeps it.
    """
    behind = [user for value in node.outputs for user in value.consumers() if user.op_type == "Add"]
    for one in [node, *(behind if node.op_type == "MatMul" else [])]:
        for value in one.inputs:
            name = (value.name or "") if value is not None and value.is_initializer() else ""
            if name.endswith(PARAMETERS):
                return name.rpartition(".")[0]
    return node.name or ""
