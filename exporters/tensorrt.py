"""What TensorRT's ONNX parser would refuse, found without TensorRT.

``tensorrt-onnx-ops.json`` holds the parser's table of operators (onnx-tensorrt's ``docs/operators.md``; source and commit in
the file): operator, types, restrictions. The check is necessary, not sufficient: the builder has the last word.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

TYPES = {
    ir.DataType.FLOAT: "FP32",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT8: "INT8",
    ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.INT4: "INT4",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.BOOL: "BOOL",
    ir.DataType.FLOAT8E4M3FN: "FP8",
    ir.DataType.FLOAT4E2M1: "FP4",
}
RESIZE = {
    "mode": ("nearest", "linear"),
    "coordinate_transformation_mode": (
        "half_pixel",
        "pytorch_half_pixel",
        "tf_half_pixel_for_nn",
        "asymmetric",
        "align_corners",
    ),
    "nearest_mode": ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
    "keep_aspect_ratio_policy": ("stretch",),
}


@cache
def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("tensorrt-onnx-ops.json").read_text(encoding="utf-8"))


NOT_KNOWN = "?"
"""Of a check: the model does not say whether the restriction is met."""


def problems(model: ir.Model) -> list[str]:
    """What TensorRT's parser does not take, each fact once, with the first node's name; empty when it takes everything.

    Types are known only where the model says them: check before they are stripped.
    """
    table, found = _table(), []
    opset, newest = model.graph.opset_imports.get("", 0), table["source"]["opset_max"]
    if not table["source"]["opset_min"] <= opset <= newest:
        found.append(f"opset {opset}: the parser takes {table['source']['opset_min']} to {newest}")
    return found + _once(model, lambda node: _reasons(node, table))


def unchecked(model: ir.Model) -> list[str]:
    """Restrictions of TensorRT's parser that a graph has operators for, and of which the model does not say whether it meets
    them; each once, with the first node's name."""
    ops = _table()["ops"]

    def reasons(node: ir.Node) -> list[str]:
        restriction = ops.get(node.op_type, {}).get("restriction") if node.domain in ("", "ai.onnx") else None
        return [restriction] if restriction is not None and _restricted(node) == NOT_KNOWN else []

    return _once(model, reasons)


def _once(model: ir.Model, reasons: Callable[[ir.Node], list[str]]) -> list[str]:
    nodes: dict[tuple[str, str], list[str]] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for reason in reasons(node):
            nodes.setdefault((node.op_type, reason), []).append(node.name or "")
    return [
        f"{operator} {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {reason}"
        for (operator, reason), names in nodes.items()
    ]


def _reasons(node: ir.Node, table: dict[str, Any]) -> list[str]:
    if node.domain not in ("", "ai.onnx"):
        known = node.op_type in table["custom_ops"]
        return [] if known else [f"an operator of the domain {node.domain}, which TensorRT does not have"]
    entry = table["ops"].get(node.op_type, {"supported": False})
    if not entry["supported"]:
        return ["TensorRT has no such operator"]
    reasons = []
    data = next((value for value in [*node.inputs[:1], *node.outputs[:1]] if value is not None), None)
    kind = None if data is None or data.dtype is None else TYPES.get(data.dtype, data.dtype.name)
    if kind is not None and "types" in entry and kind not in entry["types"]:
        reasons.append(f"TensorRT has it for {', '.join(entry['types'])}; found {kind}")
    reason = _restricted(node) if "restriction" in entry else None
    return [*reasons, reason] if reason not in (None, NOT_KNOWN) else reasons


def _restricted(node: ir.Node) -> str | None:
    """Why the node does not meet its operator's restriction; None where it does, :data:`NOT_KNOWN` where nobody can tell."""
    check = _check(node.op_type)
    return NOT_KNOWN if check is None else check(node)


def _check(operator: str) -> Callable[[ir.Node], str | None] | None:
    """The check of an operator's restriction, if there is one."""
    if operator.startswith("Reduce") or operator in ("Squeeze", "Unsqueeze"):
        return lambda node: _constant(node, 1, "axes")
    if operator.startswith("Random"):
        return lambda node: "TensorRT ignores its seed" if "seed" in node.attributes else None
    return CHECKS.get(operator)


def _pool(node: ir.Node) -> str | None:
    """Pools over two or three axes, of neighbouring numbers, with one output."""
    dilations = node.attributes.get_ints("dilations", [])
    if any(step != 1 for step in dilations):
        return f"expected dilations of 1; found {list(dilations)}"
    if node.op_type == "LpPool":
        return None
    axes = len(node.attributes.get_ints("kernel_shape", []))
    if axes not in (2, 3):
        return f"TensorRT pools over 2 or 3 axes; found {axes}"
    return "TensorRT gives no indices" if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]) else None


def _ranks(*allowed: int) -> Callable[[ir.Node], str | None]:
    def check(node: ir.Node) -> str | None:
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None:
            return NOT_KNOWN
        return (
            None
            if shape.rank() in allowed
            else f"expected an input of rank {', '.join(map(str, allowed))}; found {shape.rank()}"
        )

    return check


def _recurrent(node: ir.Node) -> str | None:
    activations = node.attributes.get_strings("activations", [])
    half = len(activations) // 2
    if node.attributes.get_string("direction", "forward") == "bidirectional" and activations[:half] != activations[half:]:
        return f"expected the same activations both ways; found {', '.join(activations)}"
    wrong = [name for name in ("input_forget", "layout") if node.op_type == "LSTM" and node.attributes.get_int(name, 0)]
    return f"TensorRT does not take {', '.join(wrong)}" if wrong else None


def _top_k(node: ir.Node) -> str | None:
    if node.attributes.get_int("sorted", 1) != 1:
        return "expected sorted 1; found 0"
    tensor = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    if tensor is None:
        return NOT_KNOWN
    count = int(tensor.numpy().flat[0])
    return None if count < 3840 else f"expected K below 3840; found {count}"


def _deform_conv(node: ir.Node) -> str | None:
    pads = node.attributes.get_ints("pads", [])
    half = len(pads) // 2
    return f"expected symmetric pads; found {list(pads)}" if pads[:half] != pads[half:] else _ranks(3, 4)(node)


def _dropout(node: ir.Node) -> str | None:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if value is None or (tensor is not None and not tensor.numpy().any()):
        return None
    return f"expected training_mode as a constant that is false; found {value.name}"


def _static(node: ir.Node) -> str | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return NOT_KNOWN
    dims = list(shape) if node.op_type == "EyeLike" else [shape[node.attributes.get_int("axis", -1)]]
    return None if all(isinstance(dim, int) for dim in dims) else f"expected dimensions that are known; found {shape}"


def _scatter(node: ir.Node) -> str | None:
    reduction = node.attributes.get_string("reduction", "none")
    return None if reduction == "none" else f"expected no reduction; found {reduction}"


def _stft(node: ir.Node) -> str | None:
    found = _constant(node, 1, "frame_step") or (_constant(node, 2, "window") if len(node.inputs) > 2 else None)
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    real = None if shape is None else shape.rank() < 3 or shape[-1] == 1
    return found or (NOT_KNOWN if real is None else None if real else "expected a real input; found a complex one")


def _tensor_scatter(node: ir.Node) -> str | None:
    axis = node.attributes.get_int("axis", -2)
    return f"expected axis -2; found {axis}" if axis != -2 else _ranks(4)(node)


def _rotary(node: ir.Node) -> str | None:
    value = node.inputs[3] if len(node.inputs) > 3 else None
    if value is None or value.dtype == ir.DataType.INT64:
        return None
    return NOT_KNOWN if value.dtype is None else f"expected position_ids in INT64; found {value.dtype.name}"


def _constant_node(node: ir.Node) -> str | None:
    wrong = [name for name in ("sparse_value", "value_string", "value_strings") if name in node.attributes]
    return f"TensorRT does not take {wrong[0]}" if wrong else None


def _constant(node: ir.Node, index: int, what: str) -> str | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or ir.convenience.get_const_tensor(value) is not None:
        return None
    return f"expected its {what} as a constant; found {value.name}, which is computed"


def _attention(node: ir.Node) -> str | None:
    ranks = [value.shape.rank() for value in node.inputs[:4] if value is not None and value.shape is not None]
    if any(rank != 4 for rank in ranks):
        return f"expected queries, keys, values and mask of rank 4; found ranks {ranks}"
    if any(value is not None for value in node.inputs[4:]) or any(value.uses() for value in node.outputs[1:]):
        return "TensorRT has no past keys and values, and no other output than the first"
    wrong = [name for name in ("softcap", "qk_matmul_output_mode") if name in node.attributes]
    return f"TensorRT does not take {', '.join(wrong)}" if wrong else None


def _resize(node: ir.Node) -> str | None:
    if node.attributes.get_int("antialias", 0):
        return "TensorRT has no antialias"
    axes, shape = node.attributes.get_ints("axes", []), node.inputs[0].shape if node.inputs[0] is not None else None
    if axes and list(axes) != list(range(len(axes) if shape is None else shape.rank())):
        return f"expected all axes in order; found {list(axes)}"
    for name, allowed in RESIZE.items():
        given = node.attributes.get_string(name)
        if given is not None and given not in allowed:
            return f"expected {name} out of {', '.join(allowed)}; found {given}"
    return None


def _zero_point(node: ir.Node) -> str | None:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if value is None or (tensor is not None and not tensor.numpy().any()):
        return None
    return f"expected a zero point of 0; found {value.name}"


CHECKS: dict[str, Callable[[ir.Node], str | None]] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "Constant": _constant_node,
    "CumSum": lambda node: _constant(node, 1, "axis"),
    "DeformConv": _deform_conv,
    "DequantizeLinear": _zero_point,
    "Dropout": _dropout,
    "EyeLike": _static,
    "GRU": _recurrent,
    "GridSample": _ranks(4),
    "Hardmax": _static,
    "LSTM": _recurrent,
    "LayerNormalization": lambda node: (
        "TensorRT gives its first output only" if any(value.uses() for value in node.outputs[1:]) else None
    ),
    "LpPool": _pool,
    "MaxPool": _pool,
    "OneHot": lambda node: _constant(node, 1, "depth"),
    "QuantizeLinear": _zero_point,
    "RNN": _recurrent,
    "Resize": _resize,
    "RotaryEmbedding": _rotary,
    "STFT": _stft,
    "ScatterND": _scatter,
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
}
