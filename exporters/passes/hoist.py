"""Hoist: what is known once per request is computed once per request.

The graph is cut along binding times: request-time nodes move into the prelude, and the values that cross the cut become
outputs of the prelude and inputs of the step graph. Every value that crosses is memory that is written once and read at
each step, so the cut is then moved back over nodes that do no work and make nothing smaller.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir

from mteo_deploy.exporters.constants import int64_constant
from mteo_deploy.exporters.passes.binding_time import (
    BindingTime,
    asks_for_batch,
    batch_carrier,
    batch_of,
    binding_times,
    shape_of,
)
from mteo_deploy.exporters.passes.shapes import infer_shapes

# Same elements in the same order, an alias in every engine: nothing is saved by doing it early, and values that differ
# only so can cross as one. Transpose is not here: it moves memory, at each step if it is left there.
VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})

_Nodes = dict[ir.Node, None]  # a set that keeps its order, so that equal graphs are cut into equal graphs


class Hoist(ir.passes.InPlacePass):
    """Move everything that depends on constants, the ``request`` inputs and their batch alone out of the graph.

    Attributes:
        prelude: after the call, the model ``request inputs -> request/<name> ...``; None when nothing was hoisted.
        sunk: names of the request-time values left to the step graph: computing them there costs nothing, or they are no
            tensors of known type and rank and cannot be a graph's inputs.
    """

    def __init__(self, request: Collection[str]) -> None:
        super().__init__()
        self.request = frozenset(request)
        self.prelude: ir.Model | None = None
        self.sunk: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if any(value.dtype is None for node in graph for value in node.outputs):
            infer_shapes(model)  # integers of the batch are told from numbers by their type
        times = binding_times(model, self.request)
        _ask_the_state(graph, times)
        early = [node for node in graph if times[node.outputs[0]] == BindingTime.REQUEST]
        if not all(_is_known(value) for node in early for value in node.outputs):
            infer_shapes(model)  # engines plan their memory from the inputs' shapes
        hoisted = _cut(early, times)
        self.sunk = [value.name or "" for node in early if node not in hoisted for value in node.outputs]
        _ask_the_request(graph, hoisted, times, self.request)
        frontier = [value for node in hoisted for value in node.outputs if _crosses(value, hoisted)]
        names = _boundary_names(graph, frontier)
        self.prelude = _prelude(model, frontier, names) if frontier else None
        _replace_by_inputs(graph, dict(zip(frontier, names, strict=True)))
        if hoisted:
            both = (BindingTime.COMPILE, BindingTime.BATCH)
            constant = [node for node in graph if node not in hoisted and times.get(node.outputs[0]) in both]
            graph.remove(hoisted, safe=True)
            _remove_unused_constants(graph, constant)
        unused = _remove_unused_inputs(graph, self.request)
        return ir.passes.PassResult(model, modified=bool(hoisted) or unused)


def _cut(early: list[ir.Node], times: dict[ir.Value, BindingTime]) -> _Nodes:
    """The request-time nodes that are worth hoisting, and can be; what they depend on is among them."""
    hoisted = dict.fromkeys(early)
    for node in reversed(early):
        if _is_free(node) and _is_no_larger(node, hoisted, times):
            del hoisted[node]
    _keep_untyped(hoisted)
    return hoisted


def _ask_the_state(graph: ir.Graph, times: dict[ir.Value, BindingTime]) -> None:
    """Take the length of the batch from the state wherever a request-time value is asked for it: the value need not cross."""
    batch = batch_of(graph)
    for node in list(graph):
        source = node.inputs[0] if asks_for_batch(node, batch) else None
        if source is None or times[source] != BindingTime.REQUEST or times[node.outputs[0]] != BindingTime.BATCH:
            continue
        old = node.outputs[0]
        made = _shape_from(graph, graph.inputs[0], shape_of(node), old.name or "")
        new = made[-1].outputs[0]
        new.type, new.shape = old.type, old.shape
        graph.insert_after(node, made)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name, old.name = old.name, None
        graph.remove(node, safe=True)
        times.update((output, BindingTime.BATCH) for one in made for output in one.outputs)


def _ask_the_request(graph: ir.Graph, hoisted: _Nodes, times: dict[ir.Value, BindingTime], request: Collection[str]) -> None:
    """Copy for the prelude what its nodes need of the length of the batch, which a request input gives there."""
    carrier, batch = batch_carrier(graph, request), batch_of(graph)
    copies: dict[ir.Value, ir.Value] = {}

    def early(value: ir.Value | None) -> ir.Value | None:
        node = None if value is None or times.get(value) != BindingTime.BATCH else value.producer()
        if value is None or node is None or carrier is None:
            return value
        if value not in copies:
            if asks_for_batch(node, batch):
                made = _shape_from(graph, carrier, shape_of(node), f"{value.name}/request")
            else:
                inputs, attributes = [early(one) for one in node.inputs], list(node.attributes.values())
                options = {"num_outputs": len(node.outputs), "name": f"{value.name}/request"}
                made = [ir.Node(node.domain, node.op_type, inputs, attributes, **options)]
            for old, new in zip(node.outputs, made[-1].outputs, strict=True):
                new.name, new.type, new.shape = f"{old.name}/request", old.type, old.shape
                copies[old] = new
            graph.insert_after(node, made)
            hoisted.update(dict.fromkeys(made))
        return copies[value]

    for node in list(hoisted):
        for i, value in enumerate(node.inputs):
            if (other := early(value)) is not value:
                node.replace_input_with(i, other)


def _shape_from(graph: ir.Graph, carrier: ir.Value, dims: list[int | ir.SymbolicDim], name: str) -> list[ir.Node]:
    """Nodes that give a shape of known dimensions and the length of the batch."""
    if len(dims) == 1:
        return [ir.node("Shape", [carrier], {"end": 1}, name=name)]
    length = ir.node("Shape", [carrier], {"end": 1}, name=f"{name}/batch")
    length.outputs[0].name = f"{name}/batch"
    length.outputs[0].type, length.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    parts = [int64_constant(graph, f"shape/{dim}", [dim]) if isinstance(dim, int) else length.outputs[0] for dim in dims]
    return [length, ir.node("Concat", parts, {"axis": 0}, name=name)]


def _is_typed(value: ir.Value) -> bool:
    """Whether the value can be a graph's input or output: a tensor of known type and rank, or not there at all."""
    return value.name == "" or (isinstance(value.type, ir.TensorType) and value.shape is not None)


def _is_known(value: ir.Value) -> bool:
    return _is_typed(value) and not (value.shape is not None and value.shape.has_unknown_dim())


def _crosses(value: ir.Value, hoisted: _Nodes) -> bool:
    """Whether the step graph needs the value: a node outside ``hoisted`` uses it, inside a subgraph or not."""
    return value.is_graph_output() or any(user not in hoisted for user in value.consumers())


def _keep_untyped(hoisted: _Nodes) -> None:
    """Leave in the step graph what makes values that cannot cross, and all that is behind it."""

    def stuck(node: ir.Node) -> bool:
        return any(_crosses(value, hoisted) and not _is_typed(value) for value in node.outputs)

    while late := [node for node in hoisted if stuck(node)]:
        while late:
            node = late.pop()
            if node in hoisted:
                del hoisted[node]
                late.extend(node.successors())


def _is_free(node: ir.Node) -> bool:
    """Whether the node's first input is never larger than its output, and little is computed.

    An Expand repeats what the step's consumer could broadcast, a fill has no input but a shape, a widening Cast is worth its
    saved bytes.
    """
    if node.op_type == "Cast" and node.inputs[0] is not None:
        before, after = node.inputs[0].dtype, node.outputs[0].dtype
        strings = {None, ir.DataType.STRING}  # of no size, or not known
        return node.domain == "" and not {before, after} & strings and before.itemsize < after.itemsize
    return node.domain == "" and node.op_type in VIEWS | {"Expand", "ConstantOfShape"}


def _is_no_larger(node: ir.Node, hoisted: _Nodes, times: dict[ir.Value, BindingTime]) -> bool:
    """Whether leaving the node to the step graph adds nothing to the boundary but its first input, for its output.

    Its every user must be there already. A shape that is computed from the request is not worth crossing for, unless it
    crosses anyway.
    """
    if not _crosses(node.outputs[0], hoisted) or any(user in hoisted for user in node.successors()):
        return False
    rest = [value for value in node.inputs[1:] if value is not None and times[value] > BindingTime.BATCH]
    return all(_crosses(value, hoisted) for value in rest)


def _boundary_names(graph: ir.Graph, frontier: Iterable[ir.Value]) -> list[str]:
    """``request/<layer>`` after the nearest weight behind each value, else ``request/<value>``; unique in the graph."""
    taken = set(ir.convenience.create_value_mapping(graph))
    names = []
    for value in frontier:
        stem = name = f"request/{_layer(value) or value.name}"
        count = 1
        while name in taken:
            name, count = f"{stem}_{count}", count + 1
        taken.add(name)
        names.append(name)
    return names


def _layer(value: ir.Value) -> str | None:
    """Module path of the nearest parameter behind the value: what a reader of the graph knows it by."""
    node = value.producer()
    while node is not None:
        for source in node.inputs:
            path, _, parameter = (source.name or "" if source is not None and source.is_initializer() else "").rpartition(".")
            if parameter in ("weight", "bias"):
                return path
        node = next((source.producer() for source in node.inputs if source is not None and source.producer()), None)
    return None


def _prelude(model: ir.Model, frontier: list[ir.Value], names: list[str]) -> ir.Model:
    """A copy of what the frontier needs; tensors are shared with ``model``, nodes and values are not."""
    graph, needed = model.graph, _producers(frontier)

    def used(values: Iterable[ir.Value]) -> list[ir.Value]:
        return [value for value in values if any(user in needed for user in value.consumers())]

    view = ir.GraphView(
        used(graph.inputs),
        frontier,
        nodes=[node for node in graph if node in needed],
        initializers=used(graph.initializers.values()),
        opset_imports=dict(graph.opset_imports),
        name="prelude",
    ).clone()
    for value, name in zip(view.outputs, names, strict=True):
        value.name = name
    return ir.Model(
        view,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        functions=[function.clone() for function in model.functions.values()],
    )


def _producers(values: Iterable[ir.Value]) -> set[ir.Node]:
    """All nodes that the values depend on."""
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(node.predecessors())
    return found


def _replace_by_inputs(graph: ir.Graph, frontier: dict[ir.Value, str]) -> None:
    """Make the step graph take the frontier as inputs; a graph output among them keeps its name behind an Identity."""
    for value, name in frontier.items():
        entry = ir.Value(name=name, type=value.type, shape=value.shape)
        graph.inputs.append(entry)
        for i, output in enumerate(graph.outputs):
            if output is value:
                node = ir.node("Identity", [entry], name=f"{name}/output")
                result = node.outputs[0]
                result.name, result.type, result.shape = value.name, value.type, value.shape
                graph.append(node)
                graph.outputs[i] = result
        value.replace_all_uses_with(entry)


def _is_unused(value: ir.Value) -> bool:
    return not (value.uses() or value.is_graph_input() or value.is_graph_output())


def _remove_unused_constants(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Remove constants that only the prelude needs. Other dead code is none of this pass's business."""
    for node in reversed(nodes):
        if all(_is_unused(value) for value in node.outputs):
            graph.remove(node, safe=True)
    for value in list(graph.initializers.values()):
        if _is_unused(value):
            graph.initializers.pop(value.name)


def _remove_unused_inputs(graph: ir.Graph, names: Collection[str]) -> bool:
    unused = [v for v in graph.inputs if v.name in names and not v.uses() and not v.is_graph_output()]
    for value in unused:
        graph.inputs.remove(value)
        graph.initializers.pop(value.name, None)  # its default value, if it had one
    return bool(unused)
