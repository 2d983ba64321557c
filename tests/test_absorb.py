"""Absorb: each rule and each refusal on its own, real networks against their time-free twins, and hostile graphs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mteo_deploy.exporters.passes.absorb import Absorb
from mteo_deploy.exporters.passes.bind import Bind
from mteo_deploy.exporters.passes.fold import Fold
from mteo_deploy.exporters.passes.runner import check, run_passes
from mteo_deploy.exporters.trace import _export

Array = np.ndarray[Any, np.dtype[Any]]
Step = tuple[str, list[str | Array], dict[str, Any]]


def graph_of(steps: list[Step], shape: list[int | str], opset: int = 20, outputs: list[str] | None = None) -> ir.Model:
    """A model from steps ``(op, operands, attributes)``; step ``i`` makes the value ``v{i}``, an array is an initialiser."""
    nodes, constants = [], []
    for i, (op, operands, attributes) in enumerate(steps):
        names = []
        for j, operand in enumerate(operands):
            if isinstance(operand, str):
                names.append(operand)
            else:
                constants.append(numpy_helper.from_array(operand, f"c{i}_{j}"))
                names.append(f"c{i}_{j}")
        nodes.append(helper.make_node(op, names, [f"v{i}"], name=f"n{i}", **attributes))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs or [f"v{len(steps) - 1}"]]
    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [state], ends, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    found = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    for value in found.graph.outputs:  # the operators that inference knows nothing about keep the shape
        value.shape = value.shape or ir.Shape(shape)
    return found


def run(model: ir.Model, state: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"state": state}))


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def absorbed(model: ir.Model, shape: tuple[int, ...], **options: Any) -> tuple[ir.Model, Absorb]:
    """The model after the pass, valid, with the same outputs."""
    state = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    before = run(model, state)
    one = Absorb(**options)
    one(model)
    check(model, "absorb")
    for a, b in zip(before, run(model, state), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(a).max())))
    return model, one


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


CONV = ("Conv", ["state", normal(4, 3, 3, 3), normal(4)], {"pads": [1, 1, 1, 1]})
NORM = ("LayerNormalization", ["state", normal(6), normal(6, seed=2)], {"axis": -1})
IMAGE, TOKENS = ["batch", 3, 5, 5], ["batch", 4, 6]


@pytest.mark.parametrize(
    ("steps", "shape", "left"),
    [
        pytest.param([CONV, ("Add", ["v0", normal(1, 4, 1, 1)], {})], IMAGE, {"Conv": 1}, id="A: conv bias"),
        pytest.param([CONV, ("Sub", ["v0", normal(4, 1, 1)], {})], IMAGE, {"Conv": 1}, id="A: subtracted"),
        pytest.param(
            [("Conv", ["state", normal(4, 3, 1, 1)], {}), ("Add", [normal(1, 4, 1, 1), "v0"], {})],
            IMAGE,
            {"Conv": 1},
            id="A: no bias yet",
        ),
        pytest.param(
            [
                ("ConvTranspose", ["state", normal(3, 2, 2, 2)], {"strides": [2, 2]}),
                ("Add", ["v0", normal(1, 2, 1, 1)], {}),
            ],
            IMAGE,
            {"ConvTranspose": 1},
            id="A: transposed conv",
        ),
        pytest.param(
            [("Gemm", ["state", normal(6, 5), normal(5)], {}), ("Add", ["v0", normal(1, 5)], {})],
            ["batch", 6],
            {"Gemm": 1},
            id="A: gemm",
        ),
        pytest.param(
            [NORM, ("Mul", ["v0", normal(1, 1, 6)], {}), ("Add", ["v1", normal(1, 1, 6, seed=3)], {})],
            TOKENS,
            {"LayerNormalization": 1},
            id="C: layer norm",
        ),
        pytest.param(
            [
                ("LayerNormalization", ["state", np.ones(6, np.float32)], {"axis": 2}),
                ("Mul", [normal(6), "v0"], {}),
                ("Add", ["v1", normal(6, seed=3)], {}),
            ],
            TOKENS,
            {"LayerNormalization": 1},
            id="C: layer norm without bias, positive axis",
        ),
        pytest.param(
            [
                ("InstanceNormalization", ["state", normal(3), normal(3, seed=2)], {}),
                ("Mul", ["v0", normal(1, 3, 1, 1)], {}),
                ("Add", ["v1", normal(3, 1, 1)], {}),
            ],
            IMAGE,
            {"InstanceNormalization": 1},
            id="B: instance norm",
        ),
        pytest.param(
            [
                ("Mul", ["state", normal(3, 1, 1)], {}),
                ("Add", ["v0", normal(3, 1, 1, seed=2)], {}),
                ("Mul", ["v1", normal(1, 3, 1, 1)], {}),
                ("Add", ["v2", normal(1, 3, 1, 1, seed=2)], {}),
            ],
            IMAGE,
            {"Mul": 1, "Add": 1},
            id="merge: affine and modulation",
        ),
        pytest.param(
            [("Div", ["state", np.float32(4).reshape(())], {}), ("Mul", ["v0", normal(1)], {})],
            TOKENS,
            {"Mul": 1},
            id="merge: factors",
        ),
        pytest.param(
            [("Sub", [normal(6), "state"], {}), ("Sub", ["v0", normal(6, seed=2)], {}), ("Mul", ["v1", normal(6)], {})],
            TOKENS,
            {"Mul": 1, "Add": 1},
            id="merge: constant minus x",
        ),
    ],
)
def test_rule(steps: list[Step], shape: list[int | str], left: dict[str, int]) -> None:
    model, one = absorbed(graph_of(steps, shape), (2, *[d for d in shape[1:] if isinstance(d, int)]))
    assert ops(model) == left
    assert one.fates and all(fate.absorbed for fate in one.fates.values() if "v" not in fate.constant)


def test_group_and_rms_norm_ops() -> None:
    group = graph_of(
        [
            ("GroupNormalization", ["state", normal(4), normal(4, seed=2)], {"num_groups": 2}),
            ("Mul", ["v0", normal(1, 4, 1, 1)], {}),
            ("Add", ["v1", normal(1, 4, 1, 1, seed=2)], {}),
        ],
        ["batch", 4, 5, 5],
        opset=21,
    )
    assert ops(absorbed(group, (2, 4, 5, 5))[0]) == {"GroupNormalization": 1}
    rms = [("RMSNormalization", ["state", normal(6)], {"axis": -1}), ("Mul", ["v0", normal(6)], {})]
    assert ops(absorbed(graph_of(rms, TOKENS, opset=23), (2, 4, 6))[0]) == {"RMSNormalization": 1}
    shifted = graph_of([*rms, ("Add", ["v1", normal(6, seed=4)], {})], TOKENS, opset=23)
    assert ops(absorbed(shifted, (2, 4, 6))[0]) == {"RMSNormalization": 1, "Add": 1}


def test_scale_of_a_linear_layer_is_copied_only_where_the_weight_is_small() -> None:
    steps: list[Step] = [
        ("MatMul", ["state", normal(6, 7)], {}),
        ("Add", ["v0", normal(7)], {}),
        ("Mul", ["v1", normal(1, 1, 7)], {}),
    ]
    kept, one = absorbed(graph_of(steps, TOKENS), (2, 4, 6))
    assert ops(kept) == {"MatMul": 1, "Add": 1, "Mul": 1}
    assert "would store its weight once per evaluation: kept as a vector" in one.fates["c2_1"].detail
    moved, one = absorbed(graph_of(steps, TOKENS), (2, 4, 6), copy_share=1.0)
    assert ops(moved) == {"MatMul": 1, "Add": 1}
    assert one.fates["c2_1"].detail.startswith("rule D")
    conv = graph_of([CONV, ("Mul", ["v0", normal(4, 1, 1)], {})], IMAGE)
    assert ops(absorbed(conv, (2, 3, 5, 5), copy_share=1.0)[0]) == {"Conv": 1}


@pytest.mark.parametrize(
    ("steps", "shape", "outputs", "reason"),
    [
        pytest.param([CONV, ("Add", ["v0", normal(1, 4, 5, 5)], {})], IMAGE, None, "varies along more", id="not per channel"),
        pytest.param(
            [CONV, ("Add", ["v0", normal(1, 4, 1, 1)], {}), ("Relu", ["v0"], {}), ("Add", ["v1", "v2"], {})],
            IMAGE,
            None,
            "another node reads",
            id="output used twice",
        ),
        pytest.param(
            [CONV, ("Add", ["v0", normal(1, 4, 1, 1)], {})], IMAGE, ["v0", "v1"], "another node reads", id="graph output"
        ),
        pytest.param([CONV, ("Add", ["v0", normal(1, 1, 4, 1, 1)], {})], IMAGE, None, "more axes", id="another rank"),
        pytest.param(
            [("Gemm", ["state", normal(6, 5), normal(5)], {"beta": 2.0}), ("Add", ["v0", normal(1, 5)], {})],
            ["batch", 6],
            None,
            "scales its terms",
            id="gemm with beta",
        ),
        pytest.param(
            [NORM, ("Mul", ["v0", normal(1, 4, 1)], {})], TOKENS, None, "does not fit|does not normalise", id="per token"
        ),
        pytest.param(
            [("Relu", ["state"], {}), ("Add", ["v0", normal(6)], {})], TOKENS, None, "comes from no layer", id="no layer"
        ),
    ],
)
def test_refusal(steps: list[Step], shape: list[int | str], outputs: list[str] | None, reason: str) -> None:
    model = graph_of(steps, shape, outputs=outputs)
    before = ops(model)
    model, one = absorbed(model, (2, *[d for d in shape[1:] if isinstance(d, int)]))
    assert ops(model) == before
    assert any(re.search(reason, fate.detail) for fate in one.fates.values()), one.fates


def test_infinite_and_overridable_constants_are_left_alone() -> None:
    steps: list[Step] = [CONV, ("Add", ["v0", np.full((1, 4, 1, 1), np.inf, np.float32)], {})]
    model = graph_of(steps, IMAGE)
    assert not Absorb()(model).modified
    model = graph_of([CONV, ("Add", ["v0", normal(1, 4, 1, 1)], {})], IMAGE)
    model.graph.inputs.append(model.graph.initializers["c1_1"])  # an input with a default
    assert not Absorb()(model).modified


def test_numbers_that_leave_half_precision_are_left_alone() -> None:
    large = np.full((1, 4, 1, 1), 6e4, np.float16)
    model = graph_of([CONV, ("Add", ["v0", large.astype(np.float32)], {})], IMAGE)
    for name in ("c0_1", "c0_2", "c1_1"):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(large.reshape(4) if name == "c0_2" else value.const_value.numpy().astype(np.float16))
    one = Absorb()
    assert not one(model).modified
    assert one.fates["c1_1"].detail == "a number would leave the range of float16"


def test_shared_bias_is_not_changed_for_its_other_reader() -> None:
    model = graph_of([CONV, ("Add", ["v0", normal(1, 4, 1, 1)], {}), ("Relu", ["v1"], {})], IMAGE)
    graph = model.graph
    bias = graph.initializers["c0_2"]
    extra = ir.node("Identity", [bias], name="other")
    extra.outputs[0].name, extra.outputs[0].type = "other", ir.TensorType(ir.DataType.FLOAT)
    extra.outputs[0].shape = ir.Shape([4])
    graph.append(extra)
    graph.outputs.append(extra.outputs[0])
    model, _ = absorbed(model, (2, 3, 5, 5))
    assert ops(model) == {"Conv": 1, "Relu": 1, "Identity": 1}


# --- real networks ---------------------------------------------------------------------------------------------------


def redraw(network: torch.nn.Module) -> torch.nn.Module:
    """Random values everywhere, so that nothing is trivially zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network.eval()


class GivenSites(torch.nn.Module):
    """A UNet whose resnets take given embeddings, or none at all."""

    def __init__(self, network: UNet2DModel, with_time: bool) -> None:
        super().__init__()
        self.network, self.given = network, []
        for index, block in enumerate(m for m in network.modules() if isinstance(m, ResnetBlock2D)):
            if not with_time:
                block.time_emb_proj, block.time_embedding_norm = None, "default"
            block.register_forward_pre_hook(self.hook(index if with_time else None), with_kwargs=True)

    def hook(self, index: int | None) -> Callable[..., Any]:
        def give(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            return ((args or [kwargs["input_tensor"]])[0], None if index is None else self.given[index]), {}

        return give

    def forward(self, state: torch.Tensor, embeddings: list[torch.Tensor] = ()) -> torch.Tensor:  # type: ignore[assignment]
        self.given = list(embeddings)
        return self.network(state, 0, return_dict=False)[0]


def unet(norm: str, with_time: bool, dynamic: bool) -> ir.Model:
    network = redraw(
        UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            resnet_time_scale_shift=norm,
        )
    )
    module = GivenSites(network, with_time)
    count = sum(isinstance(m, ResnetBlock2D) for m in network.modules()) if with_time else 0
    given = [torch.zeros(1, 32) for _ in range(count)]
    names = [f"emb/{i}" for i in range(count)]
    batch = {0: torch.export.Dim("batch", min=2, max=63)} if dynamic else None
    shapes = (batch, [None] * count) if with_time else (batch,)
    args = (torch.zeros(2, 1, 8, 8), given) if with_time else (torch.zeros(2, 1, 8, 8),)
    model = _export(module, args, ["state", *names], ["output"], shapes if dynamic else None, "it").model
    values = {name: normal(1, 32, seed=i) for i, name in enumerate(names)}
    feeds = {"state": normal(2, 1, 8, 8), **values}
    reports = run_passes(model, [Bind(values), Fold(), Absorb()], feeds)
    assert all(report.error is not None and report.error < 1e-5 for report in reports)
    return model


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic batch", "static batch"])
@pytest.mark.parametrize("norm", ["default", "scale_shift"])
def test_unet_has_no_operator_more_than_without_time(norm: str, dynamic: bool) -> None:
    """Additive: the same operators as the time-free network. Scale-shift: too, the norm's affine takes it up."""
    assert ops(unet(norm, True, dynamic)) == ops(unet(norm, False, dynamic))


class DiT(torch.nn.Module):
    """A DiT of a fixed timestep and class, which constant folding turns into constant modulation."""

    def __init__(self) -> None:
        super().__init__()
        self.network = redraw(
            DiTTransformer2DModel(
                num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, num_layers=2, sample_size=8
            )
        )

    def forward(self, state: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep=timestep, class_labels=label, return_dict=False)[0]


def test_dit_keeps_affine_norms_and_gates_only() -> None:
    args = (torch.zeros(2, 2, 8, 8), torch.tensor([3]), torch.tensor([1]))
    model = _export(DiT(), args, ["state", "timestep", "label"], ["output"], None, "it").model
    fixed = {"timestep": np.array([3]), "label": np.array([1])}
    feeds = {"state": normal(2, 2, 8, 8), **fixed}
    one = Absorb()
    run_passes(model, [Bind(fixed), Fold(), one], feeds)
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert len(norms) == 5
    for node in norms:
        assert len(node.inputs) == 3, "scale and shift of the modulation are the norm's own"
        assert all(use.node.op_type == "MatMul" for use in node.outputs[0].uses())
    gates = [fate for fate in one.fates.values() if not fate.absorbed and "kept as a vector" in fate.detail]
    assert len(gates) >= 4
    assert "Gemm" not in ops(model) and "Split" not in ops(model)


# --- hostile graphs --------------------------------------------------------------------------------------------------

SHAPES = [(), (1,), (3,), (1, 1, 3), (2, 1), (1, 2, 1), (2, 3), (1, 2, 3)]


@st.composite
def hostile(draw: st.DrawFn) -> tuple[list[Step], list[str]]:
    """Random dataflow of affine nodes, layers and others over values ``[batch, 2, 3]``, with any outputs."""
    values, steps = ["state"], []
    numbers = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-2, 2, width=32))

    def tensor() -> Array:
        shape = draw(st.sampled_from(SHAPES))
        size = int(np.prod(shape))
        return np.array(draw(st.lists(numbers, min_size=size, max_size=size)), np.float32).reshape(shape)

    for i in range(draw(st.integers(1, 8))):
        # mostly the newest value: chains are what the pass looks for
        x = values[-1] if draw(st.integers(0, 3)) else draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["affine"] * 5 + ["pair", "relu", "norm", "matmul", "transpose"]))
        if kind == "affine":
            op, constant = draw(st.sampled_from(["Add", "Sub", "Mul", "Div"])), tensor()
            if op == "Div":
                steps.append((op, [x, np.where(np.abs(constant) < 0.1, np.float32(0.5), constant)], {}))
            else:
                steps.append((op, [x, constant] if draw(st.booleans()) else [constant, x], {}))
        elif kind == "pair":
            steps.append((draw(st.sampled_from(["Add", "Mul"])), [x, draw(st.sampled_from(values))], {}))
        elif kind == "norm":
            steps.append(("LayerNormalization", [x, normal(3, seed=i), normal(3, seed=i + 9)], {"axis": -1}))
        elif kind == "matmul":
            steps.append(("MatMul", [x, normal(3, 3, seed=i) / 2], {}))
        elif kind == "relu":
            steps.append(("Relu", [x], {}))
        else:
            steps.append(("Tanh", [x], {}))
        values.append(f"v{i}")
    outputs = draw(st.sets(st.sampled_from(values[1:]), min_size=1))
    return steps, sorted(outputs | {values[-1]})


@settings(max_examples=150, deadline=None)
@given(hostile(), st.sampled_from([1e-3, 1.0]), st.booleans())
def test_any_graph_keeps_its_outputs(case: tuple[list[Step], list[str]], copy_share: float, linear: bool) -> None:
    steps, outputs = case
    model = graph_of(steps, ["batch", 2, 3], outputs=outputs)
    count = model.graph.num_nodes()
    model, _ = absorbed(model, (2, 2, 3), copy_share=copy_share, linear=linear)
    assert model.graph.num_nodes() <= count
    assert [value.name for value in model.graph.outputs] == outputs
    assert not Absorb(copy_share=copy_share, linear=linear)(model).modified, "a second run finds nothing"
