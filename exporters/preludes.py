"""Preludes of several step graphs joined into one, so that a request runs one graph before its steps.

Nodes are copied through a table of what has been computed already: the same operator on the same inputs is the same
value, whichever step asked for it. So what does not depend on the step (the class embedding, keys and values of a
prompt) is computed once, and what is left over, the same weights on N activations, can be batched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir


def join_preludes(preludes: Sequence[ir.Model | None]) -> ir.Model:
    """One prelude with the outputs ``step_<ii>/<name>`` of all; request inputs are shared by name.

    Outputs that are equal in several steps are copies by Identity; :func:`merge_outputs` drops the copies.

    Args:
        preludes: one per step, made from the same generic graph; None for a step with nothing to hoist.

    Raises:
        ValueError: when there is no prelude, or they differ in opsets, functions or the shape of an input, or have
            subgraphs.
    """
    found = [(f"step_{i:02}", prelude) for i, prelude in enumerate(preludes) if prelude is not None]
    if not found:
        raise ValueError("expected at least one prelude; found none: nothing was hoisted at any step")
    first = found[0][1]
    for step, prelude in found[1:]:
        if _environment(prelude) != _environment(first):
            raise ValueError(f"expected preludes with the same opsets and functions; found others in {step}")
    join = _Join(ir.Graph([], [], nodes=[], opset_imports=dict(first.graph.opset_imports), name="prelude"))
    join.reserve(f"{step}/{output.name}" for step, prelude in found for output in prelude.graph.outputs)
    for step, prelude in found:
        join.add(prelude.graph, step)
    return ir.Model(
        join.graph,
        ir_version=first.ir_version,
        producer_name=first.producer_name,
        producer_version=first.producer_version,
        functions=[function.clone() for function in first.functions.values()],
    )


def merge_outputs(model: ir.Model) -> dict[str, str]:
    """Drop outputs that only repeat another output, in place: the name of each dropped one -> the one that is left."""
    kept: dict[str, str] = {}
    for output in list(model.graph.outputs):
        node = output.producer()
        source = node.inputs[0] if node is not None and node.op_type == "Identity" and node.domain == "" else None
        if node is not None and source is not None and source.is_graph_output() and not output.uses():
            kept[output.name or ""] = source.name or ""
            model.graph.outputs.remove(output)
            model.graph.remove(node, safe=True)
    return kept


def _environment(model: ir.Model) -> Any:
    functions = sorted(ir.to_proto(function).SerializeToString(deterministic=True) for function in model.functions.values())
    return dict(model.graph.opset_imports), functions


class _Join:
    """The graph under construction, and its values by what they are."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.names: set[str] = set()
        self.inputs: dict[str | None, ir.Value] = {}
        self.symbols: set[str | None] = {None}
        self.contents: dict[int, Any] = {}
        self.constants: dict[Any, ir.Value] = {}
        self.nodes: dict[Any, ir.Node] = {}

    def reserve(self, names: Iterable[str]) -> None:
        self.names.update(names)

    def add(self, graph: ir.Graph, step: str) -> None:
        copies = {value: self._input(value) for value in graph.inputs}
        for value in graph.initializers.values():
            if value not in copies:
                copies[value] = self._constant(value, step)
        for node in graph:
            copy = self._node(node, [None if value is None else copies[value] for value in node.inputs], step)
            copies.update(zip(node.outputs, copy.outputs, strict=True))
        for value in graph.outputs:
            self._output(copies[value], f"{step}/{value.name}")

    def _name(self, name: str | None, step: str) -> str:
        """``name``, or ``step/name`` if another step has taken it for something else."""
        stem = unique = name if name not in self.names and name else f"{step}/{name}"
        count = 1
        while unique in self.names:
            unique, count = f"{stem}_{count}", count + 1
        self.names.add(unique)
        return unique

    def _input(self, value: ir.Value) -> ir.Value:
        known = self.inputs.get(value.name)
        if known is None:
            known = self.inputs[value.name] = ir.Value(name=value.name, type=value.type, shape=value.shape)
            self.graph.inputs.append(known)
            self.names.add(value.name or "")
            self.symbols.update(dim.value for dim in value.shape or () if isinstance(dim, ir.SymbolicDim))
        if (known.type, known.shape) != (value.type, value.shape):
            raise ValueError(
                f"expected the same request input {value.name} in all preludes; found {known.type} {known.shape} and "
                f"{value.type} {value.shape}"
            )
        return known

    def _constant(self, value: ir.Value, step: str) -> ir.Value:
        tensor = value.const_value
        if tensor is None:
            raise ValueError(f"expected a value for the initialiser {value.name}; found none in {step}")
        if id(tensor) not in self.contents:  # clones share their tensors: large ones are read once
            self.contents[id(tensor)] = _content(tensor)
        content = self.contents[id(tensor)]
        if content not in self.constants:
            name, kind = self._name(value.name, step), ir.TensorType(tensor.dtype)
            known = ir.Value(name=name, type=kind, shape=ir.Shape(tensor.shape), const_value=tensor)
            self.graph.register_initializer(known)
            self.constants[content] = known
        return self.constants[content]

    def _node(self, node: ir.Node, inputs: list[ir.Value | None], step: str) -> ir.Node:
        key = (node.op_identifier(), tuple(inputs), _attributes(node), tuple(value.name == "" for value in node.outputs))
        if key not in self.nodes:
            copy = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                overload=node.overload,
                num_outputs=len(node.outputs),
                name=f"{step}/{next(value.name for value in node.outputs if value.name)}",  # unique, as node names need not be
            )
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name = self._name(old.name, step) if old.name != "" else ""
                new.type, new.shape = old.type, self._shape(old.shape)
            self.graph.append(copy)
            self.nodes[key] = copy
        return self.nodes[key]

    def _shape(self, shape: ir.Shape | None) -> ir.Shape | None:
        """The shape in the request inputs' symbols: names made up inside a prelude may mean something else in the next."""
        if shape is None:
            return None
        return ir.Shape([dim if isinstance(dim, int) or dim.value in self.symbols else None for dim in shape])

    def _output(self, value: ir.Value, name: str) -> None:
        if value.producer() is None or value.is_graph_output():
            node = ir.node("Identity", [value], name=name)
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            self.graph.append(node)
            value = node.outputs[0]
        value.name = name
        self.graph.outputs.append(value)


def _content(tensor: ir.TensorProtocol) -> Any:
    data = repr(tensor.numpy().tolist()).encode() if tensor.dtype == ir.DataType.STRING else tensor.tobytes()
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(data).digest()


def _attributes(node: ir.Node) -> tuple[bytes, ...]:
    if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()):
        raise ValueError(f"expected preludes without subgraphs; found {node.op_type} {node.name}")
    return tuple(sorted(ir.to_proto(a).SerializeToString(deterministic=True) for a in node.attributes.values()))
