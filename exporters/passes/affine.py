"""Affine chains: runs of Add, Sub, Mul and Div with one constant operand each, and what they compose to.

A chain is ``x * scale + shift``, composed in float64; nothing but the next node reads what lies inside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Wide = NDArray[np.float64]

ONNX = ("", "ai.onnx")


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
