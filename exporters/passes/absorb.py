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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Wide = NDArray[np.float64]

ONNX = ("", "ai.onnx")
CHANNEL_NORMS = ("InstanceNormalization", "GroupNormalization", "BatchNormalization")
TOKEN_NORMS = ("LayerNormalization", "RMSNormalization")
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class DeclinedError(Exception):
    """A rule does not apply; the message says why."""


@dataclass(frozen=True)
class Affine:
    """``x * scale + shift``, each a constant that broadcasts to ``x``, or None for 1 and 0."""

    scale: Wide | None
    shift: Wide | None
    constants: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        """How many operators it takes."""
        return (self.scale is not None) + (self.shift is not None)

    def then(self, other: Affine) -> Affine:
        """``other`` applied to the result of this one.

        Raises:
            DeclinedError: when broadcasting makes a constant larger than all that it is made of.
        """
        limit = max(part.size for part in (self.scale, self.shift, other.scale, other.shift) if part is not None)
        scale, shift = _times(self.scale, other.scale), _plus(_times(self.shift, other.scale, zero=True), other.shift)
        if any(part is not None and part.size > limit for part in (scale, shift)):
            raise DeclinedError("the merged constant would be larger than its parts")
        return Affine(scale, shift, self.constants + other.constants)


def _times(a: Wide | None, b: Wide | None, zero: bool = False) -> Wide | None:
    """Product of factors, None standing for 1; with ``zero``, ``a`` is a shift, None standing for 0."""
    if a is None or b is None:
        return a if b is None or zero else b
    return a * b


def _plus(a: Wide | None, b: Wide | None) -> Wide | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def constant(value: ir.Value | None) -> Wide | None:
    """The values of a floating-point initialiser that cannot be overridden; None for anything else."""
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    if not value.const_value.dtype.is_floating_point():
        return None
    return np.asarray(value.const_value.numpy()).astype(np.float64)


def affine(node: ir.Node) -> tuple[ir.Value, Affine] | None:
    """``(x, affine)`` when the node scales or shifts ``x`` by a finite constant."""
    if node.domain not in ONNX or node.op_type not in ("Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    if left is None or right is None:
        return None
    a, b = (constant(left), None) if constant(right) is None else (None, constant(right))
    found = _affine_of(node.op_type, a, b)
    if found is None or not all(part is None or np.isfinite(part).all() for part in found):
        return None
    x, operand = (right, left) if b is None else (left, right)
    return x, Affine(*found, constants=(operand.name or "",))


def _affine_of(op: str, a: Wide | None, b: Wide | None) -> tuple[Wide | None, Wide | None] | None:
    """Scale and shift of ``a op x`` or ``x op b``; None where it is not affine in x."""
    if a is None and b is None:
        return None
    value = a if b is None else b
    assert value is not None
    if op == "Mul":
        return value, None
    if op == "Add":
        return None, value
    if op == "Sub":
        return (None, -value) if a is None else (-np.ones(()), value)
    if a is None and (value != 0).all():
        return 1 / value, None
    return None


def single_use(value: ir.Value) -> bool:
    """Whether exactly one node input reads the value, and nobody outside the graph does."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def chain_at(node: ir.Node) -> list[tuple[ir.Node, Affine]]:
    """The affine chain that starts with ``node``: each inner value is read by the next node only."""
    chain: list[tuple[ir.Node, Affine]] = []
    graph, current = node.graph, node
    while (found := affine(current)) is not None:
        chain.append((current, found[1]))
        if not single_use(current.outputs[0]):
            break
        following = current.outputs[0].uses()[0].node
        if following.graph is not graph:
            break
        current = following
        if affine(current) is None or affine(current)[0] is not chain[-1][0].outputs[0]:  # type: ignore[index]
            break
    return chain


def along(values: Wide, rank: int, axis: int, size: int) -> Wide:
    """A constant that broadcasts to ``rank`` axes as a vector ``[size]`` along ``axis``.

    Raises:
        DeclinedError: when it varies along another axis.
    """
    if values.ndim > rank:
        raise DeclinedError("the constant has more axes than the layer's output")
    shape = (1,) * (rank - values.ndim) + values.shape
    if any(length != 1 for i, length in enumerate(shape) if i != axis) or shape[axis] not in (1, size):
        raise DeclinedError(f"the constant {list(values.shape)} varies along more than the layer's output channels")
    return np.broadcast_to(values.reshape(-1), (size,))


def _shape(value: ir.Value | None) -> list[int]:
    if value is None or value.shape is None or not all(isinstance(d, int) for d in value.shape):
        raise DeclinedError("a shape that the rule needs is not known")
    return [int(d) for d in value.shape]  # type: ignore[arg-type]


def _rank(value: ir.Value | None) -> int:
    if value is None or value.shape is None:
        raise DeclinedError("a rank that the rule needs is not known")
    return len(value.shape)


def _attribute(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)  # type: ignore[arg-type]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


@dataclass(frozen=True)
class Edit:
    """What a rule does: new constants for some of the producer's inputs, and what stays behind it."""

    rule: str
    inputs: dict[int, Wide]
    rest: Affine


def _vectors(total: Affine, rank: int, axis: int, size: int) -> tuple[Wide | None, Wide | None]:
    scale = None if total.scale is None else along(total.scale, rank, axis, size)
    return scale, None if total.shift is None else along(total.shift, rank, axis, size)


def _linear(node: ir.Node, total: Affine, may_copy: Callable[[ir.Value], bool]) -> Edit:
    """Rules A and D: Conv, ConvTranspose, Gemm, MatMul; weights are input 1, biases input 2."""
    weight, bias = _input(node, 1), _input(node, 2)
    shape, op = _shape(weight), node.op_type
    if op == "Gemm" and (_attribute(node, "alpha", 1) != 1 or _attribute(node, "beta", 1) != 1):
        raise DeclinedError("the Gemm scales its terms")
    if op == "MatMul" and len(shape) != 2:
        raise DeclinedError("the weight of the MatMul is not a matrix")
    column = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": 0 if _attribute(node, "transB", 0) else 1}[op]
    size = shape[column] * (int(_attribute(node, "group", 1)) if op == "ConvTranspose" else 1)
    rank = {"Gemm": 2}.get(op, len(shape)) if op != "MatMul" else _rank(node.outputs[0])
    scale, shift = _vectors(total, rank, rank - 1 if op == "MatMul" else 1, size)
    inputs: dict[int, Wide] = {}
    if scale is not None:
        values = constant(weight)
        if values is None or weight is None:
            raise DeclinedError("the layer's weight is not a constant")
        if not may_copy(weight) or op == "ConvTranspose":
            raise DeclinedError("the layer would store its weight once per evaluation: kept as a vector")
        inputs[1] = values * np.expand_dims(scale, [i for i in range(len(shape)) if i != column])
    if op == "MatMul":
        return Edit("D", inputs, Affine(None, total.shift, total.constants))
    if bias is not None and constant(bias) is None:
        raise DeclinedError("the layer's bias is not a constant")
    old = constant(bias)
    before = np.zeros(size) if old is None else along(old, 2 if op == "Gemm" else 1, 1 if op == "Gemm" else 0, size)
    if old is not None or shift is not None:
        inputs[2] = before * (1 if scale is None else scale) + (0 if shift is None else shift)
    return Edit("A" if scale is None else "D", inputs, Affine(None, None))


def _channel_norm(node: ir.Node, total: Affine, opset: int) -> Edit:
    """Rule B: norms with one scale and one bias per channel (axis 1)."""
    if node.op_type == "GroupNormalization" and opset < 21:
        raise DeclinedError("this GroupNormalization has one scale per group")
    if _attribute(node, "training_mode", 0) or any(output.uses() for output in node.outputs[1:]):
        raise DeclinedError("the norm gives its statistics away")
    old, bias = constant(_input(node, 1)), constant(_input(node, 2))
    if old is None or bias is None:
        raise DeclinedError("the norm's own scale or bias is not a constant")
    scale, shift = _vectors(total, _rank(node.inputs[0]), 1, old.size)
    factor = np.ones_like(old) if scale is None else scale
    return Edit("B", {1: old * factor, 2: bias * factor + (0 if shift is None else shift)}, Affine(None, None))


def _trailing(values: Wide, shape: list[int], rank: int) -> Wide:
    """A constant over the normalised axes ``shape``, from one that broadcasts to the whole input."""
    extra = values.ndim - len(shape)
    if values.ndim > rank:
        raise DeclinedError("the constant has more axes than the layer's output")
    if extra > 0:
        if any(length != 1 for length in values.shape[:extra]):
            raise DeclinedError("the constant varies along axes that the norm does not normalise")
        values = values.reshape(values.shape[extra:])
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        raise DeclinedError("the constant does not fit the norm's own scale") from None


def _layer_norm(node: ir.Node, total: Affine) -> Edit:
    """Rules C and E: the scale (and for LayerNormalization the bias) spans the normalised axes."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise DeclinedError("the norm gives its statistics away")
    old, bias = constant(_input(node, 1)), _input(node, 2)
    if old is None or (bias is not None and constant(bias) is None):
        raise DeclinedError("the norm's own scale or bias is not a constant")
    axis = int(_attribute(node, "axis", -1))
    if (-axis if axis < 0 else _rank(node.inputs[0]) - axis) != old.ndim:
        raise DeclinedError("the norm's own scale does not span the normalised axes")
    shape, rank = list(old.shape), _rank(node.inputs[0])
    factor = np.ones(shape) if total.scale is None else _trailing(total.scale, shape, rank)
    if node.op_type == "RMSNormalization":
        return Edit("E", {1: old * factor}, Affine(None, total.shift, total.constants))
    shift = np.zeros(shape) if total.shift is None else _trailing(total.shift, shape, rank)
    before = constant(bias)
    return Edit("C", {1: old * factor, 2: (0 if before is None else before * factor) + shift}, Affine(None, None))


def label(node: ir.Node) -> str:
    """The layer's name as a user knows it: its weight's, or else its node's."""
    weight = _input(node, 1)
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
            return _linear(producer, total, self._may_copy)
        if producer.op_type in CHANNEL_NORMS:
            return _channel_norm(producer, total, self._opset)
        return _layer_norm(producer, total)

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
            old = _input(producer, index)
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
