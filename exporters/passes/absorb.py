"""Absorb: constants that scale or shift a layer's output move into the layer's own parameters.

After binding and folding, a site's embedding is a constant vector behind some layer. What is done with it is algebra on
*affine chains*: runs of Add, Sub, Mul and Div with one constant operand each, whose inner values nothing else uses. A
chain is composed in float64 to ``x * scale + shift``, and

- rule A: a shift behind Conv, ConvTranspose or Gemm goes into its bias,
- rules B, C, E: scale and shift behind LayerNormalization, GroupNormalization, InstanceNormalization and
  BatchNormalization go into the norm's own scale and bias; behind RMSNormalization, the scale does,
- rule D: a scale behind Conv, Gemm or MatMul goes into its weight, only where that weight is small: every evaluation
  would store its own copy,
- merge: what is left of a chain becomes at most one Mul and one Add (a norm's own affine, written as Mul and Add, takes
  up the modulation behind it).

Rules look at operators and constants, never at the model's class. What does not match is left alone, with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from mteo_deploy.exporters.passes.absorb_rules import (
    CHANNEL_NORMS,
    LINEAR,
    TOKEN_NORMS,
    Edit,
    channel_norm,
    input_of,
    layer_norm,
    linear,
)
from mteo_deploy.exporters.passes.affine import ONNX, Affine, DeclinedError, Wide, affine, chain_at, single_use


def label(node: ir.Node) -> str:
    """The layer's name as a user knows it: its weight's, or else its node's."""
    weight = input_of(node, 1)
    if weight is not None and weight.is_initializer() and (weight.name or "").endswith(".weight"):
        return (weight.name or "").removesuffix(".weight")
    return node.name or node.outputs[0].name or node.op_type


@dataclass(frozen=True)
class Fate:
    """What became of a constant: the rule that moved it, or why none did."""

    constant: str
    absorbed: bool
    detail: str


class Absorb(ir.passes.InPlacePass):
    """Move constant scales and shifts into the layers before them.

    Args:
        copy_share: a weight may be scaled in this graph alone when it has at most this share of the graph's bytes: every
            evaluation then stores its own. 1.0 where there is one evaluation only.
        linear: False leaves biases and weights alone (rules A and D), for graphs that look constants up at run time:
            engines want a convolution's bias to be constant.

    Attributes:
        fates: for every constant that an affine chain started with, what became of it.
    """

    def __init__(self, copy_share: float = 1e-3, linear: bool = True) -> None:
        super().__init__()
        self.copy_share, self.linear = copy_share, linear
        self.fates: dict[str, Fate] = {}
        self._origins: dict[str, tuple[str, ...]] = {}
        self._taken: set[str] = set()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        self._opset = graph.opset_imports.get("", model.opset_imports.get("", 0))
        total = sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
        self._limit = self.copy_share * total
        self._taken = {output.name or "" for node in graph for output in node.outputs} | {v.name or "" for v in graph.inputs}
        modified = False
        while self._round(graph):
            modified = True
        for value in list(graph.initializers.values()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[value.name or ""]
        return ir.passes.PassResult(model, modified=modified)

    def _round(self, graph: ir.Graph) -> bool:
        """One rewrite at most for every chain. Each one leaves fewer nodes, so rounds come to an end."""
        modified, seen = False, set[ir.Node]()
        for node in list(graph):
            if node in seen or node.graph is None:
                continue
            chain = chain_at(node)
            seen.update(member for member, _ in chain)
            if chain:
                modified |= self._absorb(graph, chain) or self._merge(graph, chain)
        return modified

    def _absorb(self, graph: ir.Graph, chain: list[tuple[ir.Node, Affine]]) -> bool:
        """Into the layer that made the chain's input: the longest run of the chain that it takes."""
        source = affine(chain[0][0])[0]  # type: ignore[index]
        producer = source.producer()
        reason = ""
        if producer is not None and producer.domain in ONNX and producer.op_type in (*LINEAR, *CHANNEL_NORMS, *TOKEN_NORMS):
            for length, total in reversed(list(self._prefixes(chain))):
                try:
                    if not single_use(source) or producer.graph is not graph:
                        raise DeclinedError("another node reads the layer's output too")
                    edit = self._edit(producer, total)
                    _check_range([*edit.inputs.values(), edit.rest.scale, edit.rest.shift], _dtype(chain[0][0]))
                    if length > edit.rest.nodes:
                        self._apply(graph, producer, chain[:length], edit)
                        return True
                    reason = reason or f"{producer.op_type} has no bias that could take it"
                except DeclinedError as declined:
                    reason = reason or str(declined)
        reason = reason or "the value it acts on comes from no layer that could take it"
        for _, one in chain:
            for name in self._original(one.constants):
                self.fates.setdefault(name, Fate(name, False, reason))
        return False

    def _edit(self, producer: ir.Node, total: Affine) -> Edit:
        if producer.op_type in LINEAR:
            if not self.linear:
                raise DeclinedError("a bias that is looked up at run time costs engines their best convolutions")
            return linear(producer, total, self._may_copy)
        if producer.op_type in CHANNEL_NORMS:
            return channel_norm(producer, total, self._opset)
        return layer_norm(producer, total)

    def _may_copy(self, weight: ir.Value) -> bool:
        return weight.const_value is not None and weight.const_value.nbytes <= self._limit

    def _prefixes(self, chain: list[tuple[ir.Node, Affine]]) -> Iterator[tuple[int, Affine]]:
        total = None
        for length, (_, one) in enumerate(chain, start=1):
            try:
                total = one if total is None else total.then(one)
            except DeclinedError:
                return
            yield length, total

    def _apply(self, graph: ir.Graph, producer: ir.Node, run: list[tuple[ir.Node, Affine]], edit: Edit) -> None:
        dtype = _dtype(run[0][0])
        layer = label(producer)
        for index, values in edit.inputs.items():
            old = input_of(producer, index)
            if index >= len(producer.inputs):
                producer.resize_inputs(index + 1)
            if old is None:
                producer.replace_input_with(index, self._constant(graph, f"{layer}.bias", values, dtype))
                continue
            own = len(old.uses()) == 1 and not old.is_graph_output()
            if own:  # nobody else reads it: the new values take its name
                del graph.initializers[old.name or ""]
                self._taken.discard(old.name or "")
            producer.replace_input_with(index, self._constant(graph, old.name or "constant", values, dtype))
        names = self._original(tuple(name for _, one in run for name in one.constants))
        for name in names:
            self.fates[name] = Fate(name, True, f"rule {edit.rule}: in {layer} ({producer.op_type})")
        self._replace(graph, producer.outputs[0], run, replace(edit.rest, constants=names))

    def _merge(self, graph: ir.Graph, chain: list[tuple[ir.Node, Affine]]) -> bool:
        """A run of the chain becomes fewer operators."""
        source = affine(chain[0][0])[0]  # type: ignore[index]
        for length, total in reversed(list(self._prefixes(chain))):
            if length > max(total.nodes, 1) and _in_range([total.scale, total.shift], _dtype(chain[0][0])):
                names = self._original(total.constants)
                for name in names:
                    self.fates[name] = Fate(name, True, "merged with the scale and shift beside it")
                self._replace(graph, source, chain[:length], replace(total, constants=names))
                return True
        return False

    def _replace(self, graph: ir.Graph, source: ir.Value, run: list[tuple[ir.Node, Affine]], rest: Affine) -> None:
        """Put ``rest`` in the place of the nodes of ``run``."""
        old, dtype = run[-1][0].outputs[0], _dtype(run[0][0])
        value, name = source, old.name or "value"
        for op, values in (("Mul", rest.scale), ("Add", rest.shift)):
            if values is None:
                continue
            operand = self._constant(graph, f"{name}/{op.lower()}", values, dtype)
            self._origins[operand.name or ""] = rest.constants
            node = ir.node(op, [value, operand], name=f"{name}/{op.lower()}")
            node.outputs[0].name = self._unused(graph, f"{name}/{op.lower()}_out")
            node.outputs[0].type, node.outputs[0].shape = old.type, old.shape
            graph.insert_before(run[-1][0], node)
            value = node.outputs[0]
        if value is source and source.type is None:
            source.type, source.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        for node, _ in reversed(run):
            graph.remove(node, safe=True)
        if value.is_graph_output():
            value.name = name

    def _original(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The constants of the graph as it came that these are made of."""
        return tuple(dict.fromkeys(origin for name in names for origin in self._origins.get(name, (name,))))

    def _constant(self, graph: ir.Graph, base: str, values: Wide, dtype: ir.DataType) -> ir.Value:
        name = self._unused(graph, base)
        tensor = ir.tensor(np.ascontiguousarray(values.astype(dtype.numpy())), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        graph.register_initializer(value)
        return value

    def _unused(self, graph: ir.Graph, base: str) -> str:
        """``base``, or with a number behind it where this pass or the graph's initialisers have that name."""
        name, count = base, 0
        while name in graph.initializers or name in self._taken:
            count += 1
            name = f"{base}.{count}"
        self._taken.add(name)
        return name


def _dtype(node: ir.Node) -> ir.DataType:
    """Element type of a node's constant operand."""
    return next(v.const_value.dtype for v in node.inputs if v is not None and v.const_value is not None)


def _in_range(parts: Sequence[Wide | None], dtype: ir.DataType) -> bool:
    """Whether every number is finite in ``dtype``: half precision ends at 65,504."""
    with np.errstate(over="ignore"):
        return all(part is None or bool(np.isfinite(part.astype(dtype.numpy()).astype(np.float64)).all()) for part in parts)


def _check_range(parts: Sequence[Wide | None], dtype: ir.DataType) -> None:
    if not _in_range(parts, dtype):
        raise DeclinedError(f"a number would leave the range of {dtype.name.lower()}")
