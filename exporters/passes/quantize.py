"""Quantize: layers in 8 or 4 bits, written as QuantizeLinear and DequantizeLinear around them (QDQ).

The graph says what is quantised and by which scale; an engine that has a kernel for it computes ``Q -> DQ -> layer <- DQ <-
weight`` in integers, any other computes the same numbers in float32. Zero points are 0 throughout, as TensorRT demands.

- Weights are stored in the low type: int8 by output channel, fp8 (E4M3) by tensor, int4 in blocks along the sum. Their scale
  is the largest magnitude's, so that no weight is clipped; it is the same at every evaluation, and so are the stored bytes.
  int8 weights use half of the range: x86 processors without VNNI add two products in 16 bits, which holds 2 * 255 * 64, and
  clips what is larger without a word.
- Activations of int8 and fp8 have one scale per tensor, calibrated (``exporters/calibration.py``) and constant in the graph.
  In int4, and where no scale is given, activations stay as they are (weight-only).

Biases stay in float32, and the sum of a layer is never rounded to 8 bits: the next layer rounds its input once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mteo_deploy.exporters.passes.layers import Layer, layers_of
from mteo_deploy.exporters.passes.opset import raise_opset
from mteo_deploy.exporters.passes.shapes import infer_shapes

Array = NDArray[np.float32]
SMALLEST = 1e-12
"""Scale of a tensor that is zero throughout: a scale of zero is no scale."""


@dataclass(frozen=True)
class Format:
    """How numbers are quantised.

    Attributes:
        type: of weights, and of activations where ``activations``.
        largest: magnitude that a quantised number can have.
        largest_weight: magnitude that a quantised weight is given at most.
        activations: whether a layer's input is quantised too.
        per_channel: whether weights have a scale per output channel.
        block: numbers along the sum that share a scale; None for all of them.
        operators: of layers that engines have kernels for.
        tolerance: relative error that the pass may make on random inputs.
    """

    type: ir.DataType
    largest: float
    largest_weight: float
    activations: bool
    per_channel: bool
    block: int | None
    operators: tuple[str, ...]
    tolerance: float


FORMATS = {
    "int8": Format(ir.DataType.INT8, 127.0, 64.0, True, True, None, ("Conv", "MatMul", "Gemm"), 0.2),
    "fp8": Format(ir.DataType.FLOAT8E4M3FN, 448.0, 448.0, True, False, None, ("Conv", "MatMul", "Gemm"), 0.3),
    "int4": Format(ir.DataType.INT4, 7.0, 7.0, False, True, 64, ("MatMul", "Gemm"), 0.4),
}


def format_of(name: str, full_range: bool = False) -> Format:
    """A format of :data:`FORMATS`; with ``full_range`` weights may be as large as any number of its type."""
    form = FORMATS[name]
    return replace(form, largest_weight=form.largest) if full_range else form


def quantised(values: Array, scale: Array | float, form: Format) -> NDArray[np.generic]:
    """``values / scale`` rounded to the format's type, and clipped to its range."""
    ratio = np.clip(values / scale, -form.largest, form.largest)
    return (ratio if form.type == ir.DataType.FLOAT8E4M3FN else np.rint(ratio)).astype(form.type.numpy())


def rounded(values: Array, scale: Array | float, form: Format) -> Array:
    """What is left of ``values``: quantised and back."""
    return (quantised(values, scale, form).astype(np.float32) * scale).astype(np.float32)


def weight_scale(weight: Array, axis: int, form: Format) -> Array:
    """Scale of a weight: a scalar, ``[channels]``, or, in blocks, the weight's shape with the sum's axis divided.

    Args:
        axis: of the output channels.
    """
    if form.block is not None:
        summed = _summed_axis(weight, axis)
        blocks = np.split(np.abs(weight), weight.shape[summed] // form.block, axis=summed)
        largest = np.concatenate([block.max(axis=summed, keepdims=True) for block in blocks], axis=summed)
    elif form.per_channel:
        largest = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis))
    else:
        largest = np.abs(weight).max()
    return np.maximum(largest / form.largest_weight, SMALLEST).astype(np.float32)


def spread(scale: Array, weight: Array, axis: int, form: Format) -> Array:
    """A weight's scale with one number for each of its own, or broadcasting to it."""
    if form.block is not None:
        return np.repeat(scale, form.block, axis=_summed_axis(weight, axis))
    return scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)]) if form.per_channel else scale


def _summed_axis(weight: Array, axis: int) -> int:
    return 1 - axis


class Quantize(ir.passes.InPlacePass):
    """Quantise the layers of a graph.

    Args:
        form: of :data:`FORMATS`.
        scales: name of a layer's input -> its scale; a layer whose input is not here is quantised in its weight only.
        keep: layers to leave in float32, as patterns (``conv_in``, ``*.attn1.*``).
        stored: weights quantised so far, by identity: graphs that share a weight go on sharing it.

    Attributes:
        layers: after the call, layer -> ``weight and input``, ``weight``, or why it was left in float32.
    """

    def __init__(
        self,
        form: Format,
        scales: Mapping[str, float] | None = None,
        keep: Collection[str] = (),
        stored: dict[int, tuple[ir.TensorProtocol, ir.TensorProtocol, ir.TensorProtocol]] | None = None,
    ) -> None:
        super().__init__()
        self.form, self.scales, self.keep, self.tolerance = form, scales or {}, keep, form.tolerance
        self.stored = {} if stored is None else stored
        self.layers: dict[str, str] = {}
        self._inputs: dict[ir.Value, ir.Value] = {}
        self._weights: dict[ir.Value, ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, self._inputs, self._weights = model.graph, {}, {}
        infer_shapes(model)
        for layer in layers_of(graph):
            self.layers[layer.name] = self._layer(graph, layer)
        if self.form.block is not None and self._weights:
            raise_opset(graph, 21)  # int4 and blocks came with it
        for value in [value for value in self._weights if not value.uses()]:
            del graph.initializers[value.name or ""]
            _rename(graph, self._weights[value], value.name or "")
        return ir.passes.PassResult(model, modified=bool(self._weights))

    def _layer(self, graph: ir.Graph, layer: Layer) -> str:
        reason = declined(layer, self.form, self.keep)
        if reason is not None:
            return reason
        self.take(graph, layer, 1, self._weight(graph, layer))
        scale = self.scales.get(layer.activation.name or "") if self.form.activations else None
        if scale is None:
            return "weight"
        self.take(graph, layer, 0, self._input(graph, layer, scale))
        return "weight and input"

    def take(self, graph: ir.Graph, layer: Layer, index: int, value: ir.Value) -> None:
        """Make a layer take the quantised value in the place of its input ``index``."""
        layer.node.replace_input_with(index, value)

    def scale(self, graph: ir.Graph, name: str, values: Array) -> ir.Value:
        """The scale of an activation."""
        return _constant(graph, name, ir.tensor(values, name=name))

    def _input(self, graph: ir.Graph, layer: Layer, scale: float) -> ir.Value:
        value = layer.activation
        if value not in self._inputs:
            step, zero = self.scale(graph, f"{value.name}/scale", np.array(scale, np.float32)), self._zero(graph)
            narrow = ir.node("QuantizeLinear", [value, step, zero], name=f"{value.name}/q")
            wide = ir.node("DequantizeLinear", [narrow.outputs[0], step, zero], name=f"{value.name}/dq")
            for node, kind in ((narrow, self.form.type), (wide, ir.DataType.FLOAT)):
                node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = node.name, ir.TensorType(kind), value.shape
            graph.insert_before(layer.node, [narrow, wide])
            self._inputs[value] = wide.outputs[0]
        return self._inputs[value]

    def _zero(self, graph: ir.Graph) -> ir.Value:
        """The zero point of all activations, which gives them their type."""
        zero = ir.tensor(np.zeros((), self.form.type.numpy()), dtype=self.form.type)
        return graph.initializers.get("zero_point") or _constant(graph, "zero_point", zero)

    def _weight(self, graph: ir.Graph, layer: Layer) -> ir.Value:
        value = layer.weight
        if value not in self._weights:
            numbers, scale = self._stored(layer)
            low = _constant(graph, f"{value.name}/{self.form.type.name.lower()}", numbers)
            step = _constant(graph, f"{value.name}/scale", scale)
            settings: dict[str, int] = {"axis": layer.axis} if self.form.per_channel else {}
            if self.form.block is not None:
                settings = {"axis": 1 - layer.axis, "block_size": self.form.block}
            wide = ir.node("DequantizeLinear", [low, step], settings, name=f"{value.name}/dq")
            out = wide.outputs[0]
            out.name, out.type, out.shape = wide.name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(numbers.shape)
            graph.insert_before(layer.node, wide)
            self._weights[value] = low
            self._inputs[low] = out
        return self._inputs[self._weights[value]]

    def _stored(self, layer: Layer) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
        tensor = layer.weight.const_value
        assert tensor is not None  # initialisers have values
        if id(tensor) not in self.stored:
            weight = tensor.numpy()
            scale = weight_scale(weight, layer.axis, self.form)
            numbers = quantised(weight, spread(scale, weight, layer.axis, self.form), self.form)
            self.stored[id(tensor)] = tensor, ir.tensor(numbers, dtype=self.form.type), ir.tensor(scale)
        return self.stored[id(tensor)][1:]


def declined(layer: Layer, form: Format, keep: Collection[str] = ()) -> str | None:
    """Why a layer stays in float32; None where it does not."""
    if any(fnmatchcase(layer.name, pattern) for pattern in keep):
        return "named by the caller"
    if layer.node.op_type not in form.operators:
        return f"engines have no {layer.node.op_type} in {form.type.name.lower()}"
    if (layer.node.attributes.get_float("alpha", 1.0), layer.node.attributes.get_float("beta", 1.0)) != (1.0, 1.0):
        return "a Gemm with factors"
    if form.block is not None and _blocks_do_not_fit(layer, form.block):
        return f"its sum is not a multiple of {form.block} numbers"
    return None


def _blocks_do_not_fit(layer: Layer, block: int) -> bool:
    tensor = layer.weight.const_value
    return tensor is None or len(tensor.shape) != 2 or int(tensor.shape[1 - layer.axis]) % block != 0


def _constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    del graph.initializers[value.name or ""]
    value.name = name
    graph.register_initializer(value)
