"""Evaluate a graph while compiling: for the part that is known at compile time, and to compare numbers around a pass.

ONNX Runtime where it is installed, else ONNX's own reference evaluator, which needs nothing but is far too slow for a
whole network. Weights go in as inputs, where they lie: as parts of a protobuf they would be in memory three times over.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from mteo_deploy.engines.onnxruntime import session_options
from mteo_deploy.exporters.constants import SHAPES
from mteo_deploy.exporters.emulate import emulate, has_bf16

LIMIT = 1 << 30
"""Bytes of weights above which a model is not evaluated: each time would take minutes."""
SMALL = 64
"""Bytes below which a constant stays in the graph: shapes and axes, which operators want there."""


def without_weights(model: ir.Model, low: bool = False) -> tuple[ir.Model, dict[str, ir.TensorProtocol]]:
    """A copy of ``model`` whose weights (large float32 initialisers, and all in files) are inputs, and their values by name.

    Args:
        low: weights of lower types too, some of which ONNX Runtime does not take as inputs.
    """
    light, weights = model.clone(), {}
    for name, value in list(light.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        weight = tensor.dtype not in SHAPES if low else tensor.dtype == ir.DataType.FLOAT
        if isinstance(tensor, ir.ExternalTensor) or (weight and tensor.nbytes >= SMALL):
            value.shape, value.dtype, value.const_value = ir.Shape(tensor.shape), tensor.dtype, None
            del light.graph.initializers[name]
            light.graph.inputs.append(value)
            weights[name] = tensor
    return light, weights


def _feed(graph: ir.Graph, value: ir.Value, values: NDArray[Any]) -> NDArray[Any]:
    """What ONNX Runtime takes for a weight without a copy: of a transposed view what lies in memory, turned in the graph."""
    order = sorted(range(values.ndim), key=lambda axis: -values.strides[axis])
    stored = values.transpose(order)
    if not values.flags.c_contiguous and stored.flags.c_contiguous and not value.is_graph_output():
        node = ir.node("Transpose", [value], {"perm": [order.index(axis) for axis in range(values.ndim)]})
        turned = node.outputs[0]
        turned.name, turned.shape, turned.type = f"{value.name}/turned", value.shape, value.type
        value.replace_all_uses_with(turned)
        node.replace_input_with(0, value)
        value.shape = ir.Shape(stored.shape)
        graph.insert_before(graph[0], node)
        return stored
    return values if values.flags.c_contiguous else np.ascontiguousarray(values)


def evaluate(model: ir.Model, feeds: Mapping[str, NDArray[Any]], *, reference: bool = False) -> list[NDArray[Any]] | None:
    """Outputs of ``model``; inputs it does not take are left out of ``feeds``. bf16 is emulated in float32.

    Args:
        reference: always use the reference evaluator.

    Returns:
        the outputs in order, or None when there is nothing here that evaluates such a model in reasonable time.
    """
    if not reference and (find_spec("onnxruntime") is None or _bytes(model) > LIMIT):
        return None
    light, weights = without_weights(emulate(model) if has_bf16(model) else model)
    wanted = {value.name or "": feeds[value.name or ""] for value in model.graph.inputs}
    if reference:
        wanted |= {name: tensor.numpy() for name, tensor in weights.items()}
        return list(ReferenceEvaluator(ir.to_proto(light)).run(None, wanted))
    import onnxruntime

    inputs = {value.name: value for value in light.graph.inputs}
    wanted |= {name: _feed(light.graph, inputs[name], tensor.numpy()) for name, tensor in weights.items()}
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # what the graph says, no more
    proto = ir.to_proto(light).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, wanted))


def _bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
