"""Runs passes and checks them: a pass says whether it changed the graph, the runner says whether the graph is sound.

After each pass the graph must be valid (``onnx.checker``, full), and where feeds are given its outputs must be what they
were before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.evaluate import evaluate, without_weights

Feeds = Mapping[str, NDArray[Any]]
TOLERANCE = 1e-4
"""Relative error allowed between a graph before and after a pass, in float32: sums are reordered, not changed. A pass that
rounds says by its attribute ``tolerance`` how much."""


@dataclass(frozen=True)
class Size:
    """Nodes, and the parameters and bytes of all initialisers that are used."""

    nodes: int
    parameters: int
    bytes: int

    @classmethod
    def of(cls, model: ir.Model) -> Size:
        tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
        return cls(model.graph.num_nodes(), sum(tensor.size for tensor in tensors), sum(tensor.nbytes for tensor in tensors))


@dataclass(frozen=True)
class PassReport:
    """What one pass did to one graph.

    Attributes:
        error: relative error of the outputs against those before the pass; None where they were not compared.
    """

    name: str
    modified: bool
    before: Size
    after: Size
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check(model: ir.Model, after: str) -> None:
    """Full ``onnx.checker`` run (order, types, shape inference) on the graph's structure, without its large tensors."""
    light, _ = without_weights(model, low=True)
    try:
        onnx.checker.check_model(ir.to_proto(light), full_check=True)
    except Exception as error:
        raise RuntimeError(f"internal error: the graph is invalid after {after}: {error}") from error


def _difference(before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]]) -> float:
    """Largest relative error over the outputs (root mean square over root mean square)."""
    errors = [0.0]
    for a, b in zip(before, after, strict=True):
        wide = a.astype(np.float64)
        errors.append(float(np.sqrt(np.mean((b - wide) ** 2)) / max(np.sqrt(np.mean(wide**2)), 1e-12)))
    return max(errors)


class _Numbers:
    """Outputs of the model on ``feeds``, compared from pass to pass."""

    def __init__(self, model: ir.Model, feeds: Feeds | None) -> None:
        self.feeds, self.outputs = feeds, None if feeds is None else evaluate(model, feeds)

    def compare(self, model: ir.Model, one: ir.passes.PassBase, after: str) -> float | None:
        """The error that the pass made; raises when it is too large."""
        if self.feeds is None or self.outputs is None:
            return None
        before, self.outputs = self.outputs, evaluate(model, self.feeds)
        if self.outputs is None or getattr(one, "changes_outputs", False):
            return None
        error, allowed = _difference(before, self.outputs), getattr(one, "tolerance", None)
        if allowed is not None and not error <= allowed:
            raise InputError(
                f"expected rounding to change the outputs by {allowed} at most; found {error:.1e} after {after}: too much for "
                "this backbone; take another --precision, or leave layers in fp32 with --keep"
            )
        if allowed is None and not error <= TOLERANCE:
            raise RuntimeError(f"internal error: the graph computes something else after {after}: relative error {error:.1e}")
        return error


def run_passes(
    model: ir.Model,
    passes: Sequence[ir.passes.InPlacePass],
    feeds: Feeds | None = None,
    dump: Callable[[str, ir.Model], object] | None = None,
    each: bool = True,
) -> list[PassReport]:
    """Run ``passes`` in order on ``model`` in place, checking the graph after each.

    Args:
        feeds: a value for every input that the graph has before or after any pass; None compares no numbers. A pass
            whose attribute ``changes_outputs`` is true is the new baseline instead of being compared; one that rounds has an
            attribute ``tolerance``.
        dump: called with each pass's name and the model after it.
        each: False checks validity after the last pass only: for graphs that differ from a checked one in constants.

    Raises:
        RuntimeError: when a pass leaves an invalid graph or one that computes something else; names the passes that ran.
        InputError: when a pass that rounds changes the outputs by more than its tolerance.
    """
    reports: list[PassReport] = []
    numbers = _Numbers(model, feeds)
    for position, one in enumerate(passes, start=1):
        before, name = Size.of(model), type(one).__name__.lower()
        result = one(model)
        so_far = " -> ".join([*(report.name for report in reports), name])
        if each or position == len(passes):
            check(model, so_far)
        reports.append(PassReport(name, result.modified, before, Size.of(model), numbers.compare(model, one, so_far)))
        if dump:
            dump(name, model)
    return reports
