"""Pack what a step takes from the prelude: many small tensors become one.

A DiT with labels hoists half a dozen vectors per block, so that a step graph would take scores of inputs, and every one
of them costs an engine call some microseconds: more, on a small network, than hoisting saves. One tensor
``[batch, numbers]`` per evaluation costs one input; the step graph cuts it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mteo_deploy.exporters.constants import int64_constant

PACKED = "request/packed"
LARGEST = 2**14
"""Numbers per image above which a tensor crosses alone: packed, it would be copied at every step to save one input."""


def pack(template: ir.Model, prelude: ir.Model, sources: Sequence[Mapping[str, str]], branches: int = 1) -> None:
    """Let the small tensors that differ between evaluations cross as one per evaluation, in place.

    The template then takes ``request/packed`` instead of them, and the prelude gives ``step_<ii>/request/packed``.

    Args:
        template: the step graph of all evaluations, with what was hoisted as inputs.
        prelude: of all evaluations.
        sources: per evaluation, input of the template -> output of the prelude.
        branches: rows of the network's batch for each image; with several, the tensors that have them are packed.
    """
    inputs = {value.name: value for value in template.graph.inputs}
    outputs = {value.name: value for value in prelude.graph.outputs}
    batch = inputs["state"].shape[0]  # type: ignore[index]  # the trace knows every shape
    small = [
        name
        for name in sources[0]
        if _is_small(inputs[name])
        and (inputs[name].shape[0] == batch) == (branches == 1)  # type: ignore[index]  # small: it has one
        and all(_is_small(outputs[source[name]]) for source in sources)
        and (len(sources) == 1 or len({source[name] for source in sources}) > 1)
    ]
    if len(small) < 2:
        return
    for i, source in enumerate(sources):
        _pack_outputs(prelude, [source[name] for name in small], f"step_{i:02}/{PACKED}")
    alone = {output for source in sources for name, output in source.items() if name not in small}
    packed = {source[name] for source in sources for name in small} - alone
    for value in [value for value in prelude.graph.outputs if value.name in packed]:
        prelude.graph.outputs.remove(value)
    _pack_inputs(template, small)


def _is_small(value: ir.Value) -> bool:
    """Whether a value is a small float32 tensor ``[batch, ...]``, all but the batch of known size."""
    if value.dtype != ir.DataType.FLOAT or value.shape is None or value.shape.rank() < 2:
        return False
    return all(isinstance(d, int) for d in list(value.shape)[1:]) and _width(value) <= LARGEST


def _pack_inputs(model: ir.Model, names: Sequence[str]) -> None:
    """Replace the inputs ``names`` of a step graph, in place, by one input that is cut up in their order."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    old = [inputs[name] for name in names]
    widths = [_width(value) for value in old]
    batch = old[0].shape[0] if old[0].shape is not None else None
    source = ir.Value(name=PACKED, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([batch, sum(widths)]))
    graph.inputs.insert(list(graph.inputs).index(old[0]), source)
    sizes = int64_constant(graph, f"{PACKED}/sizes", widths)
    cut = ir.node("Split", [source, sizes], {"axis": 1}, num_outputs=len(old), name=f"{PACKED}/cut")
    nodes = [cut]
    for value, piece, width in zip(old, cut.outputs, widths, strict=True):
        graph.inputs.remove(value)
        name = value.name
        piece.name, piece.type, piece.shape = f"{name}/flat", value.type, ir.Shape([batch, width])
        if value.shape is not None and value.shape.rank() > 2:
            nodes.append(_reshape(graph, piece, list(value.shape)[1:], f"{name}/view", value.shape))
        new = piece if value.shape is None or value.shape.rank() == 2 else nodes[-1].outputs[0]
        value.replace_all_uses_with(new)
        value.name, new.name = None, name
    graph.insert_before(graph[0], nodes)


def _pack_outputs(model: ir.Model, names: Sequence[str], packed: str) -> None:
    """Add to a prelude, in place, the output ``packed``: its outputs ``names`` side by side. These stay."""
    graph = model.graph
    outputs = {value.name: value for value in graph.outputs}
    parts = []
    for i, name in enumerate(names):
        value = outputs[name]
        if value.shape is not None and value.shape.rank() > 2:
            shape = ir.Shape([value.shape[0], _width(value)])
            graph.append(_reshape(graph, value, [_width(value)], f"{packed}/{i}", shape))
            value = graph[-1].outputs[0]
        parts.append(value)
    node = ir.node("Concat", parts, {"axis": 1}, name=f"{packed}/concat")
    result = node.outputs[0]
    result.name, result.type = packed, ir.TensorType(ir.DataType.FLOAT)
    first = parts[0].shape
    result.shape = ir.Shape([None if first is None else first[0], sum(_width(outputs[name]) for name in names)])
    graph.append(node)
    graph.outputs.append(result)


def _width(value: ir.Value) -> int:
    """Numbers per image."""
    return int(np.prod([d for d in list(value.shape or ())[1:] if isinstance(d, int)]))


def _reshape(graph: ir.Graph, value: ir.Value, rest: Sequence[object], name: str, shape: ir.Shape) -> ir.Node:
    target = int64_constant(graph, f"pack/shape_{'x'.join(map(str, rest))}", [0, *(int(str(d)) for d in rest)])  # 0: as it is
    node = ir.node("Reshape", [value, target], name=name)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, shape
    return node
