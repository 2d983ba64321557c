"""A traced graph without what says nothing: every step graph of a bundle stores its structure again.

The exporter spells out attributes that are an operator's own defaults, and calls values `val_1234`. Neither is of use to
anyone, and together they were half of a step graph's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, product
from string import ascii_lowercase

import onnx
import onnx_ir as ir

UNIT = {"strides": 1, "dilations": 1, "pads": 0}
"""Attributes of convolutions and pools whose default, a number for each axis, is in the operators' text only."""


def slim(model: ir.Model) -> None:
    """Drop attributes that are defaults and shorten the names of values, in place.

    Inputs, outputs and the backbone's own parameters keep their names. A node is named after the layer whose weight it
    takes; any other after its output.
    """
    opset = model.graph.opset_imports[""]
    for node in model.graph:
        for name in [name for name, attribute in node.attributes.items() if _is_default(node, name, attribute, opset)]:
            del node.attributes[name]
    _rename(model.graph)


def _is_default(node: ir.Node, name: str, attribute: ir.Attr, opset: int) -> bool:
    if node.domain not in ("", "ai.onnx") or attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return False
    if name in UNIT and node.op_type in ("Conv", "ConvTranspose", "MaxPool", "AveragePool"):
        return all(number == UNIT[name] for number in attribute.as_ints())
    known = onnx.defs.get_schema(node.op_type, opset, "").attributes.get(name)
    if known is None or known.default_value.type == onnx.AttributeProto.UNDEFINED:
        return False
    return bool(onnx.helper.get_attribute_value(known.default_value) == onnx.helper.get_attribute_value(ir.to_proto(attribute)))


def _rename(graph: ir.Graph) -> None:
    own = [value for value in graph.initializers.values() if "." in (value.name or "")]
    taken = {value.name for value in [*graph.inputs, *graph.outputs, *own]}
    short = (name for name in _letters() if name not in taken)
    for value in [value for value in graph.initializers.values() if value.name not in taken]:
        value.name = next(short)
    layers: set[str] = set()
    for node in graph:
        for output in node.outputs:
            if output.name and output.name not in taken:
                output.name = next(short)
        weights = [value.name or "" for value in node.inputs if value is not None and value.is_initializer()]
        layer = next((name.removesuffix(".weight") for name in weights if name.endswith(".weight")), "")
        node.name = layer if layer and layer not in layers else node.outputs[0].name
        layers.add(layer)


def _letters() -> Iterator[str]:
    """a, b, ..., z, aa, ab, ..."""
    return ("".join(letters) for length in count(1) for letters in product(ascii_lowercase, repeat=length))
