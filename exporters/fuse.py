"""The realisation ``fused``: one graph that holds the whole loop, and each weight once.

Evaluation after evaluation is inlined; what one keeps is wired to where a later one reads it. The state after every
evaluation is an output, so that the loop can be verified inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def fuse(models: Sequence[ir.Model]) -> ir.Model:
    """Chain step graphs: ``(state, request inputs) -> (state_00, state_01, ..., next_state)``.

    Each model is ``(state, history_<lag> ..., request inputs) -> (next_state[, kept])``. Constants that are the same
    tensor, or small and equal, are one initialiser.
    """
    first = models[0].graph
    state = ir.Value(name="state", type=first.inputs[0].type, shape=first.inputs[0].shape)
    graph = ir.Graph([state], [], nodes=[], opset_imports=dict(first.opset_imports), name="fused")
    fused = ir.Model(graph, ir_version=models[0].ir_version)
    shared: dict[object, ir.Value] = {}
    kept: list[ir.Value | None] = []
    requests: dict[str, ir.Value] = {}
    for i, model in enumerate(models):
        inputs: dict[str, ir.Value] = {"state": state, **requests}
        inputs |= {f"history_{lag}": value for lag, value in enumerate(reversed(kept), start=1) if value is not None}
        outputs = _inline(model.clone(), graph, f"step_{i:02}", inputs, requests, shared)
        state = outputs["next_state"]
        kept.append(outputs.get("kept"))
        if i + 1 < len(models):
            state.name = f"state_{i:02}"
        graph.outputs.append(state)
    state.name = "next_state"
    return fused


def _inline(
    model: ir.Model,
    target: ir.Graph,
    prefix: str,
    inputs: dict[str, ir.Value],
    requests: dict[str, ir.Value],
    shared: dict[object, ir.Value],
) -> dict[str, ir.Value]:
    """Move the nodes of ``model`` to the end of ``target``; returns its outputs by name."""
    graph = model.graph
    outputs = {value.name or "": value for value in graph.outputs}
    for value in list(graph.inputs):
        name = value.name or ""
        if name not in inputs:
            requests[name] = inputs[name] = ir.Value(name=name, type=value.type, shape=value.shape)
            target.inputs.append(requests[name])
        value.replace_all_uses_with(inputs[name])
    for value in list(graph.initializers.values()):
        value.replace_all_uses_with(_shared_constant(value, target, prefix, shared))
    graph.initializers.clear()
    graph.outputs.clear()
    graph.inputs.clear()
    nodes = list(graph)
    graph.remove(nodes)
    for node in nodes:
        node.name = f"{prefix}/{node.name}"
        for output in node.outputs:
            output.name = f"{prefix}/{output.name}"
    target.extend(nodes)
    return outputs


def _shared_constant(value: ir.Value, target: ir.Graph, prefix: str, shared: dict[object, ir.Value]) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None  # initialisers have values
    small = tensor.nbytes <= 1024
    key: object = (str(tensor.dtype), tuple(tensor.shape), tensor.tobytes()) if small else id(tensor)
    if key not in shared:
        name = value.name or "constant"
        if name in target.initializers:
            name = f"{prefix}/{name}"
        shared[key] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
        target.register_initializer(shared[key])
    return shared[key]
