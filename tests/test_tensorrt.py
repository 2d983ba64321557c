"""What TensorRT's parser would refuse is found and named; our own graphs have nothing of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mteo_deploy.bundle import Bundle
from mteo_deploy.exporters.tensorrt import problems, unchecked
from mteo_deploy.sampler import Sampler

FLOATS = ir.TensorType(ir.DataType.FLOAT)


def model(operator: str, shapes: list[tuple[int, ...]], opset: int = 20, domain: str = "", **attributes: Any) -> ir.Model:
    inputs = [ir.Value(name=f"x{i}", type=FLOATS, shape=ir.Shape(shape)) for i, shape in enumerate(shapes)]
    node = ir.node(operator, inputs, attributes, domain=domain, name="n")
    node.outputs[0].name, node.outputs[0].type = "y", FLOATS
    return ir.Model(ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": opset}), ir_version=10)


def test_ours_are_taken(tiny_sampler: Sampler, history_sampler: Sampler) -> None:
    for sampler in (tiny_sampler, history_sampler):
        graphs = sampler.bundle.manifest["compiler"]["graphs"]
        assert len(graphs) == len(sampler.bundle.graphs)
        assert [graph["tensorrt"] for graph in graphs] == [[]] * len(graphs)


def test_ours_are_checked(tiny_bundle: Any) -> None:
    """The control: the same graph with one operator swapped is refused, by the node's name."""
    graph = ir.load(Bundle.open(tiny_bundle).file("graphs/step_00.onnx"))
    assert problems(graph) == []
    node = next(iter(graph.graph))
    node.op_type = "AffineGrid"
    assert problems(graph) == [f"AffineGrid {node.name}: TensorRT has no such operator"]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (problems(model("Det", [(2, 2)])), "Det n: TensorRT has no such operator"),
        (problems(model("Relu", [(2,)], opset=28)), "opset 28: the parser takes 9 to 24"),
        (problems(model("Relu", [(2,)], opset=8)), "opset 8: the parser takes 9 to 24"),
        (problems(model("FusedConv", [(2,)], domain="com.microsoft")), "the domain com.microsoft"),
        (problems(model("Not", [(2,)])), "Not n: TensorRT has it for BOOL; found FP32"),
        (problems(model("ReduceSum", [(2, 2), (1,)])), "expected its axes as a constant; found x1, which is computed"),
        (problems(model("Attention", [(2, 4, 8)] * 3, opset=23)), "rank 4; found ranks [3, 3, 3]"),
        (problems(model("Attention", [(2, 1, 4, 8)] * 3, opset=23, softcap=1.0)), "does not take softcap"),
        (problems(model("Resize", [(1, 1, 4, 4)], mode="cubic")), "expected mode out of nearest, linear; found cubic"),
        (problems(model("Resize", [(1, 1, 4, 4)], antialias=1)), "TensorRT has no antialias"),
        (problems(model("QuantizeLinear", [(2,), (), ()])), "expected a zero point of 0; found x2"),
        (unchecked(model("TopK", [(2,), (1,)])), "TopK n: sorted=1; K<3840"),
        (problems(model("TopK", [(2,), (1,)], sorted=0)), "expected sorted 1; found 0"),
        (problems(model("AveragePool", [(1, 2, 8)], kernel_shape=[2])), "pools over 2 or 3 axes; found 1"),
        (problems(model("MaxPool", [(1, 2, 8, 8)], kernel_shape=[2, 2], dilations=[2, 2])), "dilations of 1; found [2, 2]"),
        (problems(model("ScatterND", [(2, 2), (1, 1), (1, 2)], reduction="add")), "expected no reduction; found add"),
        (problems(model("GridSample", [(1, 2, 4, 4, 4), (1, 4, 4, 4, 3)])), "expected an input of rank 4; found 5"),
        (problems(model("LSTM", [(2, 1, 4)] * 3, layout=1)), "TensorRT does not take layout"),
    ],
)
def test_refused(found: list[str], reason: str) -> None:
    assert len(found) == 1 and reason in found[0]


def test_constants_may_be_axes() -> None:
    graph = model("ReduceSum", [(2, 2), (1,)])
    axes = graph.graph.inputs.pop()
    axes.const_value = ir.tensor(np.array([1]), name="x1")
    graph.graph.register_initializer(axes)
    assert problems(graph) == []


@pytest.mark.parametrize(
    ("operator", "shapes", "attributes"),
    [
        ("AveragePool", [(1, 4, 8, 8)], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("MaxPool", [(1, 4, 8, 8, 8)], {"kernel_shape": [2, 2, 2], "dilations": [1, 1, 1]}),
        ("ScatterND", [(2, 2), (1, 1), (1, 2)], {}),
        ("Dropout", [(2,)], {}),
        ("GridSample", [(1, 2, 4, 4), (1, 4, 4, 2)], {}),
    ],
)
def test_what_meets_a_restriction_is_taken(operator: str, shapes: list[tuple[int, ...]], attributes: dict[str, Any]) -> None:
    found = model(operator, shapes, **attributes)
    assert problems(found) == unchecked(found) == []


def test_a_fact_is_told_once() -> None:
    graph = model("Det", [(2, 2)])
    second = ir.node("Det", [graph.graph.inputs[0]], name="m")
    graph.graph.append(second)
    assert problems(graph) == ["Det n and 1 more: TensorRT has no such operator"]
