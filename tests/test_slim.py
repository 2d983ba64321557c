"""Step graphs without what says nothing: default attributes, long names, arithmetic of shapes that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mteo_deploy.bundle import Bundle
from mteo_deploy.exporters import trace
from mteo_deploy.exporters.evaluate import evaluate
from mteo_deploy.exporters.passes import run_passes
from mteo_deploy.exporters.passes.views import Views
from mteo_deploy.exporters.slim import slim

WEIGHT = np.random.default_rng(0).standard_normal((2, 2, 3, 3)).astype(np.float32)


def model_of(nodes: list[onnx.NodeProto], output: list[int | str | None], **constants: np.ndarray) -> ir.Model:
    """``a [batch, 2, 6, 6] -> y``."""
    state = helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", 2, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, output)
    tensors = [numpy_helper.from_array(values, name.replace("__", ".")) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "g", [state], [y], tensors)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def state(batch: int) -> dict[str, np.ndarray]:
    return {"a": np.random.default_rng(1).standard_normal((batch, 2, 6, 6)).astype(np.float32)}


@pytest.fixture
def convolutions() -> ir.Model:
    """Two convolutions of the same weight with every attribute spelt out, the second with a stride of 2; then a Resize."""
    spelt = {"group": 1, "auto_pad": "NOTSET", "dilations": [1, 1]}
    nodes = [
        helper.make_node("Conv", ["a", "layer.weight"], ["val_10"], "n1", strides=[1, 1], pads=[0] * 4, **spelt),
        helper.make_node("Conv", ["val_10", "layer.weight"], ["val_11"], "n2", strides=[2, 2], pads=[1] * 4, **spelt),
        helper.make_node("Mul", ["val_11", "val_3"], ["val_12"], "n3"),
        helper.make_node("Resize", ["val_12", "", "scales"], ["y"], "n4", mode="linear", cubic_coeff_a=-0.75),
    ]
    scales, factor = np.array([1, 1, 2, 2], np.float32), np.full(1, 3, np.float32)
    return model_of(nodes, ["batch", 2, 4, 4], layer__weight=WEIGHT, scales=scales, val_3=factor)


def test_attributes_that_are_defaults_go(convolutions: ir.Model) -> None:
    before = evaluate(convolutions, state(2), reference=True)
    slim(convolutions)
    attributes = [{name: attribute.value for name, attribute in node.attributes.items()} for node in convolutions.graph]
    assert attributes == [{}, {"strides": (2, 2), "pads": (1, 1, 1, 1)}, {}, {"mode": "linear"}]
    after = evaluate(convolutions, state(2), reference=True)
    assert before is not None and after is not None
    np.testing.assert_array_equal(before[0], after[0])
    onnx.checker.check_model(ir.to_proto(convolutions), full_check=True)


def test_a_squeeze_of_more_than_one_is_none() -> None:
    """As torch has it; the dimension of one goes, and the one that is not known is left to the checker."""
    for axis, left in ((1, 0), (0, 1)):
        node = helper.make_node("Squeeze", ["a", "axis"], ["b"])
        found = model_of([node, helper.make_node("Neg", ["b"], ["y"])], ["batch", 2, 6, 6], axis=np.array([axis], np.int64))
        slim(found)
        assert [node.op_type for node in found.graph] == ["Squeeze"] * left + ["Neg"]
    one = helper.make_node("Unsqueeze", ["a", "axis"], ["b"]), helper.make_node("Squeeze", ["b", "axis"], ["y"])
    found = model_of(list(one), ["batch", 2, 6, 6], axis=np.array([1], np.int64))
    slim(found)
    assert [node.op_type for node in found.graph] == ["Unsqueeze", "Squeeze"]


@pytest.mark.parametrize(
    ("equation", "perm"),
    [("nchw->nhwc", [0, 2, 3, 1]), ("n c h w -> w n h c", [3, 0, 2, 1]), ("nchw->nch", None), ("nchw", None)],
)
def test_an_einsum_that_permutes_is_a_transpose(equation: str, perm: list[int] | None) -> None:
    found = model_of([helper.make_node("Einsum", ["a"], ["y"], equation=equation)], [None] * 4 if perm else [None] * 3)
    before = evaluate(found, state(2), reference=True)
    slim(found)
    (node,) = found.graph
    assert node.op_type == ("Einsum" if perm is None else "Transpose")
    if perm is not None:
        after = evaluate(found, state(2), reference=True)
        assert before is not None and after is not None and list(node.attributes["perm"].as_ints()) == perm
        np.testing.assert_array_equal(before[0], after[0])
        onnx.checker.check_model(ir.to_proto(found), full_check=True)


def test_names(convolutions: ir.Model) -> None:
    """Parameters, inputs and outputs keep theirs; a layer's node has the layer's, once; nothing is called like an input."""
    slim(convolutions)
    graph = convolutions.graph
    assert [value.name for value in (*graph.inputs, *graph.outputs)] == ["a", "y"]
    assert sorted(graph.initializers) == ["b", "c", "layer.weight"]
    assert [node.name for node in graph] == ["layer", "e", "f", "y"]
    assert [node.outputs[0].name for node in graph] == ["d", "e", "f", "y"]


def reshape(*target: onnx.NodeProto, name: str = "target") -> list[onnx.NodeProto]:
    return [helper.make_node("Shape", ["a"], ["shape"]), *target, helper.make_node("Reshape", ["a", name], ["y"])]


def test_one_open_dimension_needs_no_arithmetic() -> None:
    """[batch, 2, 6, 6] -> [batch, 2, 36], with the batch read from the tensor."""
    target = [
        helper.make_node("Slice", ["shape", "zero", "one"], ["first"]),
        helper.make_node("Concat", ["first", "rest"], ["target"], axis=0),
    ]
    numbers = {"zero": np.array([0]), "one": np.array([1]), "rest": np.array([2, 36])}
    model = model_of(reshape(*target), ["batch", 2, 36], **numbers)
    run_passes(model, [Views()], state(3))
    assert [node.op_type for node in model.graph] == ["Reshape"] and list(model.graph.initializers) == ["shape/-1x2x36"]
    for batch in (1, 5):
        (found,) = evaluate(model, state(batch), reference=True) or []
        np.testing.assert_array_equal(found, state(batch)["a"].reshape(batch, 2, 36))


@pytest.mark.parametrize("output", [["batch", 2, "rest"], [None, None, None]])
def test_more_open_dimensions_stay_computed(output: list[int | str | None]) -> None:
    """What is behind the batch is not known either: a state of open height and width."""
    target = [helper.make_node("Slice", ["shape", "zero", "two"], ["two_dims"])]
    target.append(helper.make_node("Concat", ["two_dims", "minus"], ["target"], axis=0))
    model = model_of(reshape(*target), output, zero=np.array([0]), two=np.array([2]), minus=np.array([-1]))
    model.graph.inputs[0].shape = ir.Shape(["batch", 2, "height", "width"])
    run_passes(model, [Views()], state(2))
    assert [node.op_type for node in model.graph] == ["Shape", "Slice", "Concat", "Reshape"]


def test_step_graphs_compute_no_shapes(tiny_bundle: Path) -> None:
    """With the batch open; and every layer of the backbone is a node of its name."""
    bundle = Bundle.open(tiny_bundle)
    assert bundle.manifest["batch"] == "dynamic"
    for entry in bundle.graphs:
        graph = onnx.load(str(bundle.file(entry["graph"])), load_external_data=False).graph
        assert not [node.name for node in graph.node if node.op_type == "Shape"], entry["graph"]
        names = [node.name for node in graph.node]
        assert len(set(names)) == len(names)
    (first, *_) = bundle.step_graphs
    graph = onnx.load(str(bundle.file(first["graph"])), load_external_data=False).graph
    assert {"conv_in", "conv_out", "down_blocks.0.resnets.0.conv1"} <= {node.name for node in graph.node}


class Quotient(torch.nn.Module):
    """Nearly nothing added, nearly one multiplied by."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() / (x.relu().sum(1, keepdim=True) + 1e-15) * 1.000004


def test_small_constants_stay() -> None:
    """onnxscript takes them for zero and for one; zero over zero is then no number."""
    model = trace._export(Quotient(), (torch.zeros(2, 3),), ["x"], ["y"], None, "it").model
    x = np.array([[-1, -2, -3], [1, 2, 3]], np.float32)
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_allclose(found, [[0, 0, 0], np.array([1, 2, 3]) / 6 * 1.000004], rtol=2e-7)
