"""The rules of Absorb: what a layer's parameters become when they take up the scale and shift behind it.

A rule looks at the layer's operator and at the constants, and gives an :class:`Edit` or raises :class:`DeclinedError` with its
reason. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mteo_deploy.exporters.passes.affine import Affine, DeclinedError, Wide, along, constant

CHANNEL_NORMS = ("InstanceNormalization", "GroupNormalization", "BatchNormalization")
TOKEN_NORMS = ("LayerNormalization", "RMSNormalization")
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


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


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """A node's input; None where it has none there, or leaves it out."""
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


def linear(node: ir.Node, total: Affine, may_copy: Callable[[ir.Value], bool]) -> Edit:
    """Rules A and D: Conv, ConvTranspose, Gemm, MatMul; weights are input 1, biases input 2."""
    weight, bias = input_of(node, 1), input_of(node, 2)
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


def channel_norm(node: ir.Node, total: Affine, opset: int) -> Edit:
    """Rule B: norms with one scale and one bias per channel (axis 1)."""
    if node.op_type == "GroupNormalization" and opset < 21:
        raise DeclinedError("this GroupNormalization has one scale per group")
    if _attribute(node, "training_mode", 0) or any(output.uses() for output in node.outputs[1:]):
        raise DeclinedError("the norm gives its statistics away")
    old, bias = constant(input_of(node, 1)), constant(input_of(node, 2))
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


def layer_norm(node: ir.Node, total: Affine) -> Edit:
    """Rules C and E: the scale (and for LayerNormalization the bias) spans the normalised axes."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise DeclinedError("the norm gives its statistics away")
    old, bias = constant(input_of(node, 1)), input_of(node, 2)
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
