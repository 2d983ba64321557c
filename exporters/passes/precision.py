"""Precision: the graph's own types become fp16 or bf16, but for what is named.

TensorRT 11 takes types as they are, and a converter that leaves a graph unsorted or invalid is no use, so this is one of our
own. Inputs and outputs stay float32: the loop, the noise and the files are the same at every precision. Weights are stored in
the low type. What stays in float32, each with its reason in :attr:`Precision.kept`:

- normalisations, as one operator or written out (mean, power, root, and the sums and products between them), and softmax:
  their sums run over thousands of numbers, and a variance of activations in the hundreds leaves the range of fp16;
- the solver's update, which adds a small step to a large state, and the rows of the table;
- an operator that ONNX does not define in the type at the graph's opset, and one with a constant that would leave the type's
  range or become zero;
- what the caller names, by layer.

Views, and everything else that only moves numbers, are in the low type: half the bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

import numpy as np
import onnx
import onnx_ir as ir

from mteo_deploy.exporters.passes.layers import layer_name
from mteo_deploy.exporters.passes.opset import raise_opset
from mteo_deploy.exporters.passes.shapes import infer_shapes

FLOAT = ir.DataType.FLOAT
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LARGEST = {"fp16": 65504.0, "bf16": 3.3895e38}
TOLERANCE = {"fp16": 1e-2, "bf16": 5e-2}
"""Relative error that the pass may make on random inputs: one evaluation's, as :data:`mteo_deploy.numerics.TOLERANCE`."""
SENSITIVE = {
    **dict.fromkeys(
        (
            "InstanceNormalization",
            "GroupNormalization",
            "LayerNormalization",
            "RMSNormalization",
            "BatchNormalization",
            "LpNormalization",
            "MeanVarianceNormalization",
        ),
        "normalisation",
    ),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "Pow", "Sqrt", "Reciprocal"), "normalisation"),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Exp", "Log", "ReduceLogSumExp"), "softmax"),
    **dict.fromkeys(("Sin", "Cos"), "angles"),
}
"""Operators that stay in float32 -> what they are part of."""
ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Neg", "Max", "Min", "Abs", "Clip")
OWN = {"update/": "the solver's update", "table/": "rows of the table"}
FIXED_INPUTS = {"Resize": (1, 2)}
"""Operator -> inputs that are float32 whatever its type is."""


class Precision(ir.passes.InPlacePass):
    """Convert a graph to ``fp16`` or ``bf16``.

    Args:
        name: of the precision, in :data:`TYPES`.
        keep: layers to leave in float32, as patterns (``conv_in``, ``*.attn1.*``).
        converted: tensors converted so far, by identity: graphs that share a tensor go on sharing it.

    Attributes:
        kept: after the call, node -> why it is in float32.
    """

    def __init__(
        self,
        name: str,
        keep: Collection[str] = (),
        converted: dict[int, tuple[ir.TensorProtocol, ir.TensorProtocol]] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.type, self.keep, self.tolerance = name, TYPES[name], keep, TOLERANCE[name]
        self.converted = {} if converted is None else converted
        self.kept: dict[str, str] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        infer_shapes(model)
        if self.name == "bf16":
            raise_opset(graph, 22)  # convolutions in bf16 came with it
        reasons = self._reasons(graph)
        self.kept = {node.name or "": reason for node, reason in reasons.items() if _carries(node)}
        self._casts = {}
        for node in list(graph):
            self._convert(graph, node, FLOAT if node in reasons else self.type)
        self._widen_outputs(graph)
        self._take_names(graph)
        return ir.passes.PassResult(model, modified=bool(self._casts))

    # --- what stays ---

    def _reasons(self, graph: ir.Graph) -> dict[ir.Node, str]:
        found = {node: reason for node in graph if (reason := self._reason(graph, node)) is not None}
        while between := [node for node in graph if node not in found and _is_between(node, found)]:
            found |= dict.fromkeys(between, "between operators in float32")
        return found

    def _reason(self, graph: ir.Graph, node: ir.Node) -> str | None:
        own = next((reason for prefix, reason in OWN.items() if (node.name or "").startswith(prefix)), None)
        if own or not any(_is_float(value) for value in node.inputs):
            return own or "makes numbers out of none"
        if any(fnmatchcase(layer_name(node), pattern) for pattern in self.keep):
            return "named by the caller"
        if node.op_type in SENSITIVE and node.domain in ("", "ai.onnx"):
            return SENSITIVE[node.op_type]
        inner = any(user.graph is not graph for value in node.outputs for user in value.consumers())
        if inner or not _defined(node, graph.opset_imports[""], self.type):
            return f"not defined in {self.name}"
        return self._out_of_range(node)

    def _out_of_range(self, node: ir.Node) -> str | None:
        for value in node.inputs:
            tensor = value.const_value if value is not None and value.is_initializer() and _is_float(value) else None
            if tensor is None:
                continue
            numbers = np.abs(tensor.numpy())
            finite = numbers[np.isfinite(numbers)]
            if finite.size and finite.max() > LARGEST[self.name]:
                return f"a constant leaves the range of {self.name}"
            if numbers.size == 1 and numbers.item() != 0 and numbers.astype(self.type.numpy()).astype(np.float32).item() == 0:
                return f"a constant becomes zero in {self.name}"
        return None

    # --- the conversion ---

    def _convert(self, graph: ir.Graph, node: ir.Node, wanted: ir.DataType) -> None:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (FLOAT, self.type):
                continue
            to = FLOAT if index in FIXED_INPUTS.get(node.op_type, ()) else wanted
            if value.dtype != to:
                node.replace_input_with(index, self._as(graph, value, to, node))
        if wanted != FLOAT:
            for output in node.outputs:
                if output.dtype == FLOAT:
                    output.type = ir.TensorType(wanted)

    def _as(self, graph: ir.Graph, value: ir.Value, to: ir.DataType, node: ir.Node) -> ir.Value:
        """``value`` in another type: a constant of its own, or one Cast for all that read it."""
        if (value, to) not in self._casts:
            name = f"{value.name}/{self.name if to == self.type else 'fp32'}"
            made = self._constant(graph, value, name) if value.is_initializer() else _cast(graph, value, to, name, node)
            self._casts[value, to] = made
        return self._casts[value, to]

    def _constant(self, graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None  # initialisers have values
        if id(tensor) not in self.converted:
            with np.errstate(over="ignore"):  # infinities, of masks
                low = ir.tensor(tensor.numpy().astype(self.type.numpy()), dtype=self.type, name=value.name)
            self.converted[id(tensor)] = tensor, low
        made = ir.Value(name=name, type=ir.TensorType(self.type), shape=value.shape)
        made.const_value = self.converted[id(tensor)][1]
        graph.register_initializer(made)
        return made

    def _widen_outputs(self, graph: ir.Graph) -> None:
        for position, output in enumerate(graph.outputs):
            if output.dtype == self.type:
                name = output.name
                output.name = f"{name}/{self.name}"
                node = ir.node("Cast", [output], {"to": int(FLOAT)}, name=f"{name}/fp32")
                node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, ir.TensorType(FLOAT), output.shape
                graph.append(node)
                graph.outputs[position] = node.outputs[0]

    def _take_names(self, graph: ir.Graph) -> None:
        """Remove what nobody reads any more; a converted weight has its old name then."""
        for value in [value for value in graph.initializers.values() if not value.uses() and not value.is_graph_output()]:
            del graph.initializers[value.name or ""]
        for (old, _), new in self._casts.items():
            if new.is_initializer() and old.name not in graph.initializers:
                _rename(graph, new, old.name or "")


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    del graph.initializers[value.name or ""]
    value.name = name
    graph.register_initializer(value)


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, name: str, before: ir.Node) -> ir.Value:
    node = ir.node("Cast", [value], {"to": int(to)}, name=name)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, ir.TensorType(to), value.shape
    graph.insert_before(before, node)
    return node.outputs[0]


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == FLOAT


def _carries(node: ir.Node) -> bool:
    return any(value is not None and value.dtype == FLOAT for value in [*node.inputs, *node.outputs])


def _is_between(node: ir.Node, kept: Collection[ir.Node]) -> bool:
    """Whether an elementwise node takes all that it computes with from nodes in float32, and gives it to such nodes."""
    before = [value.producer() for value in node.inputs if value is not None and not value.is_initializer()]
    after: Sequence[ir.Node] = [user for value in node.outputs for user in value.consumers()]
    inner = bool(before) and bool(after) and not any(value.is_graph_output() for value in node.outputs)
    return node.op_type in ELEMENTWISE and inner and all(one in kept for one in [*before, *after])


def _defined(node: ir.Node, opset: int, kind: ir.DataType) -> bool:
    """Whether ONNX defines the operator with its float inputs and outputs in ``kind``."""
    if node.domain not in ("", "ai.onnx") or any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
        return False
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    fixed = FIXED_INPUTS.get(node.op_type, ())
    places = [(schema.inputs, i, value) for i, value in enumerate(node.inputs) if i not in fixed]
    places += [(schema.outputs, i, value) for i, value in enumerate(node.outputs)]
    formal = [one[min(i, len(one) - 1)].type_str for one, i, value in places if _is_float(value)]
    return all(f"tensor({kind.name.lower()})" in allowed.get(name, [name]) for name in formal)
