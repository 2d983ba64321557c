"""Runs passes and checks them: a pass says whether it changed the graph, the runner says whether the graph is sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx
import onnx_ir as ir


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
    """What one pass did to one graph."""

    name: str
    modified: bool
    before: Size
    after: Size

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check(model: ir.Model, after: str) -> None:
    """Full ``onnx.checker`` run (order, types, shape inference) on the graph's structure, without its large tensors."""
    light = model.clone()
    for value in light.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= 64 and tensor.dtype == ir.DataType.FLOAT:
            value.const_value = ir.ExternalTensor(
                "unused", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=value.name
            )
    for value in list(light.graph.initializers.values()):
        if isinstance(value.const_value, ir.ExternalTensor):  # the checker opens external files: make them inputs
            value.shape, value.dtype = ir.Shape(value.const_value.shape), value.const_value.dtype
            del light.graph.initializers[value.name]
            value.const_value = None
            light.graph.inputs.append(value)
    try:
        onnx.checker.check_model(ir.to_proto(light), full_check=True)
    except Exception as error:
        raise RuntimeError(f"internal error: the graph is invalid after {after}: {error}") from error


def run_passes(model: ir.Model, passes: Sequence[ir.passes.InPlacePass]) -> list[PassReport]:
    """Run ``passes`` in order on ``model`` in place, checking the graph after each.

    Raises:
        RuntimeError: when a pass leaves an invalid graph; names the passes that ran.
    """
    reports: list[PassReport] = []
    for one in passes:
        before = Size.of(model)
        result = one(model)
        name = type(one).__name__.lower()
        reports.append(PassReport(name, result.modified, before, Size.of(model)))
        check(model, " -> ".join(report.name for report in reports))
    return reports
