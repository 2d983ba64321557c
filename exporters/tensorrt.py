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


def problems(model: ir.Model) -> list[str]:
    """Every node that TensorRT's parser does not take, by name, with the reason; empty when it takes them all.

    Types are known only where the model says them: check before they are stripped.
    """
    table, found = _table(), []
    opset, newest = model.graph.opset_imports.get("", 0), table["source"]["opset_max"]
    if not table["source"]["opset_min"] <= opset <= newest:
        found.append(f"opset {opset}: the parser takes {table['source']['opset_min']} to {newest}")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        found += [f"{node.op_type} {node.name}: {reason}" for reason in _reasons(node, table)]
    return found


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
    if "restriction" in entry:
        check = _check(node.op_type)
        reason = f"not checked here: {entry['restriction']}" if check is None else check(node)
        reasons += [reason] if reason else []
    return reasons


def _check(operator: str) -> Callable[[ir.Node], str | None] | None:
    """The check of an operator's restriction, if there is one."""
    if operator.startswith("Reduce"):
        return lambda node: _constant(node, 1, "axes")
    if operator in ("Squeeze", "Unsqueeze"):
        return lambda node: _constant(node, 1, "axes")
    found: Callable[[ir.Node], str | None] | None = {
        "LayerNormalization": lambda node: (
            "TensorRT gives its first output only" if any(value.uses() for value in node.outputs[1:]) else None
        ),
        "Attention": _attention,
        "Resize": _resize,
        "Constant": lambda node: None if "value" in node.attributes else "TensorRT has it for dense tensors",
        "CumSum": lambda node: _constant(node, 1, "axis"),
        "QuantizeLinear": _zero_point,
        "DequantizeLinear": _zero_point,
    }.get(operator)
    return found


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
