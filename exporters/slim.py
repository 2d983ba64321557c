"""A traced graph without what says nothing: every step graph of a bundle stores its structure again.

The exporter spells out attributes that are an operator's own defaults, and calls values `val_1234`. Neither is of use to
anyone, and together they were half of a step graph's bytes. It writes a Squeeze where torch squeezes a dimension that is not
one, which torch leaves alone and ONNX does not allow, and an Einsum where a model only permutes axes with one.
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
    """Drop attributes that are defaults and Squeezes that do nothing, call a permutation by its name, and shorten the names of
    values, in place.

    Inputs, outputs and the backbone's own parameters keep their names. A node is named after the layer whose weight it
    takes; any other after its output.
    """
    opset = model.graph.opset_imports[""]
    for node in list(model.graph):
        if _squeezes_nothing(node):
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0], replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            continue
        _permute(node)
        for name in [name for name, attribute in node.attributes.items() if _is_default(node, name, attribute, opset)]:
            del node.attributes[name]
    _rename(model.graph)


def _squeezes_nothing(node: ir.Node) -> bool:
    if node.op_type != "Squeeze" or len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[0].shape is None:
        return False
    axes = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    sizes = [] if axes is None else [node.inputs[0].shape[int(axis)] for axis in axes.numpy().flat]
    return bool(sizes) and all(isinstance(size, int) and size != 1 for size in sizes)


def _permute(node: ir.Node) -> None:
    """Make a Transpose of an Einsum of one operand that changes nothing but the order of its axes."""
    if node.op_type != "Einsum" or len(node.inputs) != 1:
        return
    source, _, target = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    if source.isalpha() and len(set(source)) == len(source) and sorted(source) == sorted(target):
        node.op_type = "Transpose"
        del node.attributes["equation"]
        node.attributes["perm"] = ir.AttrInt64s("perm", [source.index(letter) for letter in target])


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
