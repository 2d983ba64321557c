"""Evaluate a graph while compiling: for the part that is known at compile time, and to compare numbers around a pass.

ONNX Runtime where it is installed, else ONNX's own reference evaluator, which needs nothing but is far too slow for a
whole network.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from mteo_deploy.exporters.emulate import emulate, has_bf16

LIMIT = 1 << 30
"""Bytes of weights above which a model is not evaluated: protobuf ends at 2 GiB, and the copy would double the memory."""


def evaluate(model: ir.Model, feeds: Mapping[str, NDArray[Any]], *, reference: bool = False) -> list[NDArray[Any]] | None:
    """Outputs of ``model``; inputs it does not take are left out of ``feeds``. bf16 is emulated in float32.

    Args:
        reference: always use the reference evaluator.

    Returns:
        the outputs in order, or None when there is nothing here that evaluates such a model in reasonable time.
    """
    if not reference and (find_spec("onnxruntime") is None or _bytes(model) > LIMIT):
        return None
    whole = ir.external_data.load_to_model(model.clone())
    proto = ir.to_proto(emulate(whole) if has_bf16(whole) else whole)
    wanted = {value.name: feeds[value.name or ""] for value in model.graph.inputs}
    if reference:
        return list(ReferenceEvaluator(proto).run(None, wanted))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # what the graph says, no more
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, wanted))


def _bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
