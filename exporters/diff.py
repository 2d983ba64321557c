"""What differs between two graphs: for people who want to see what a pass did."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mteo_deploy.errors import InputError


def diff(before: Path | str, after: Path | str) -> list[dict[str, Any]]:
    """Compare two ONNX files, or two directories graph by graph (bundles, or what ``--dump-after`` left).

    Returns:
        per pair of graphs: ``graph`` (name), ``operators`` (operator -> counts before and after, where they differ),
        ``nodes`` and ``constants`` with the names that were ``removed``, ``added`` and ``changed``. A node is known by its
        first output; it has changed when its operator, inputs or attributes have.

    Raises:
        InputError: when a path is no ONNX file and holds none, or the directories share no graph.
    """
    pairs = _pairs(Path(before), Path(after))
    return [{"graph": name, **_diff(_load(a), _load(b))} for name, a, b in pairs]


def _graphs(directory: Path) -> dict[str, Path]:
    folder = directory / "graphs" if (directory / "graphs").is_dir() else directory
    return {path.name: path for path in sorted(folder.glob("*.onnx"))}


def _pairs(before: Path, after: Path) -> list[tuple[str, Path, Path]]:
    if before.is_file() and after.is_file():
        return [(after.name, before, after)]
    if not (before.is_dir() and after.is_dir()):
        raise InputError(f"expected two ONNX files or two directories of them; found {before} and {after}")
    a, b = _graphs(before), _graphs(after)
    names = [name for name in a if name in b]
    if not names:
        found = f"{', '.join(a) or 'none'} and {', '.join(b) or 'none'}"
        raise InputError(f"expected graphs of the same names in {before} and {after}; found {found}")
    return [(name, a[name], b[name]) for name in names]


def _load(path: Path) -> ir.Graph:
    try:
        return ir.load(path).graph
    except Exception as error:  # protobuf, onnx and the file system each have their own
        raise InputError(f"expected an ONNX file at {path}; it cannot be read ({error})") from None


def _diff(a: ir.Graph, b: ir.Graph) -> dict[str, Any]:
    counts = [Counter(node.op_type for node in graph) for graph in (a, b)]
    operators = {op: [counts[0][op], counts[1][op]] for op in sorted(counts[0] | counts[1]) if counts[0][op] != counts[1][op]}
    nodes = [{node.outputs[0].name or "": node for node in graph} for graph in (a, b)]
    constants = [dict(graph.initializers) for graph in (a, b)]
    return {
        "operators": operators,
        "total": [a.num_nodes(), b.num_nodes()],
        "nodes": _names(nodes[0], nodes[1], lambda x, y: _signature(x) == _signature(y)),
        "constants": _names(constants[0], constants[1], _equal),
    }


def _names(a: dict[str, Any], b: dict[str, Any], equal: Any) -> dict[str, list[str]]:
    return {
        "removed": [name for name in a if name not in b],
        "added": [name for name in b if name not in a],
        "changed": [name for name in a if name in b and not equal(a[name], b[name])],
    }


def _signature(node: ir.Node) -> Any:
    attributes = sorted(ir.to_proto(a).SerializeToString(deterministic=True) for a in node.attributes.values())
    return node.domain, node.op_type, [value and value.name for value in node.inputs], attributes


def _equal(a: ir.Value, b: ir.Value) -> bool:
    if a.const_value is None or b.const_value is None:
        return a.const_value is b.const_value
    x, y = a.const_value.numpy(), b.const_value.numpy()
    return x.dtype == y.dtype and x.shape == y.shape and bool(np.array_equal(x, y))
