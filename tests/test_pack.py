"""Packing: what is small and of one evaluation crosses as one tensor; the rest crosses as it did."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mteo_deploy.exporters.evaluate import evaluate
from mteo_deploy.exporters.pack import LARGEST, pack
from mteo_deploy.exporters.passes.runner import check

FLOATS = ir.TensorType(ir.DataType.FLOAT)
SHAPES: dict[str, list[int | str]] = {
    "request/a": ["batch", 3],
    "request/b": ["batch", 1, 2],
    "request/large": ["batch", LARGEST + 1],
    "request/shared": ["batch", 4],
}


def value(name: str, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=FLOATS, shape=ir.Shape(shape))


def model(inputs: list[ir.Value], nodes: list[ir.Node], outputs: list[ir.Value]) -> ir.Model:
    return ir.Model(ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 20}, name="g"), ir_version=10)


def copies(names: list[tuple[str, str]]) -> ir.Model:
    """Identity nodes ``source -> target`` of the shapes above."""
    inputs, nodes = {}, []
    for source, target in names:
        shape = SHAPES["request/" + target.split("/")[-1]]
        inputs.setdefault(source, value(source, shape))
        nodes.append(ir.node("Identity", [inputs[source]], name=target))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = target, FLOATS
        nodes[-1].outputs[0].shape = ir.Shape(shape)
    return model(list(inputs.values()), nodes, [node.outputs[0] for node in nodes])


def test_pack() -> None:
    of_steps = [(f"{name}_{i}", f"step_{i:02}/request/{name}") for i in range(2) for name in ("a", "b", "large")]
    prelude = copies([*of_steps, ("shared", "step_00/request/shared")])
    template = copies([(name, "out/" + name.split("/")[-1]) for name in SHAPES])
    template.graph.inputs.insert(0, value("state", ["batch", 1]))
    sources = [{name: f"step_{0 if name.endswith('shared') else i:02}/{name}" for name in SHAPES} for i in range(2)]
    random = np.random.default_rng(0)
    shapes = {v.name: [d if isinstance(d, int) else 2 for d in v.shape or ()] for v in prelude.graph.inputs}
    feeds = {str(name): random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    before = dict(zip([v.name for v in prelude.graph.outputs], evaluate(prelude, feeds) or [], strict=True))

    pack(template, prelude, sources)

    assert [v.name for v in template.graph.inputs] == ["state", "request/packed", "request/large", "request/shared"]
    kept = ["step_00/request/large", "step_01/request/large", "step_00/request/shared"]
    assert [v.name for v in prelude.graph.outputs] == [*kept, "step_00/request/packed", "step_01/request/packed"]
    check(template, "pack")
    check(prelude, "pack")
    after = dict(zip([v.name for v in prelude.graph.outputs], evaluate(prelude, feeds) or [], strict=True))
    for i, source in enumerate(sources):
        taken = {"request/packed": after[f"step_{i:02}/request/packed"]}
        taken |= {name: after[source[name]] for name in ("request/large", "request/shared")}
        found = evaluate(template, {"state": np.zeros((2, 1), np.float32), **taken}) or []
        for name, output in zip(SHAPES, found, strict=True):
            np.testing.assert_array_equal(output, before[source[name]])
