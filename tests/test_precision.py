"""Graphs in fp16 and bf16: what stays in float32, that the rest is in the type, and that engines take it or say why not."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from conftest import Once

from mteo_deploy import precision
from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.build import build
from mteo_deploy.errors import EngineError, InputError
from mteo_deploy.exporters import tensorrt
from mteo_deploy.exporters.emulate import emulate
from mteo_deploy.exporters.evaluate import evaluate
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.options import Options
from mteo_deploy.exporters.passes.precision import TYPES, Precision
from mteo_deploy.exporters.passes.runner import run_passes
from mteo_deploy.numerics import TOLERANCE, tolerance_of
from mteo_deploy.sampler import Sampler
from mteo_deploy.verification import verify

FLOAT = ir.DataType.FLOAT


def model(text: str, weights: dict[str, np.ndarray] | None = None) -> ir.Model:
    """A model in ONNX's text format, with ``__`` for a dot in names; ``weights`` become initialisers in place of inputs."""
    found = ir.from_onnx_text(text)
    for value in found.graph.inputs:
        value.name = (value.name or "").replace("__", ".")
    for node in found.graph:
        node.name = node.outputs[0].name
    for name, values in (weights or {}).items():
        value = next(one for one in found.graph.inputs if one.name == name)
        found.graph.inputs.remove(value)
        value.const_value = ir.tensor(values.astype(np.float32), name=name)
        found.graph.register_initializer(value)
    return found


def network(seed: int = 0) -> ir.Model:
    """A convolution, an instance norm, a softmax and a product, then the solver's update."""
    generator = np.random.default_rng(seed)
    text = """<ir_version: 10, opset_import: ["" : 20]>
    net (float[n, 3, 8, 8] state, float[8, 3, 3, 3] conv__weight, float[8] conv__bias, float[8] one, float[8] zero,
         float[8, 8] linear__weight, float[1] factor) => (float[n, 8, 8, 8] next_state) {
      a = Conv <pads = [1, 1, 1, 1]> (state, conv__weight, conv__bias)
      b = InstanceNormalization (a, one, zero)
      c = Softmax <axis = 1> (b)
      d = MatMul (c, linear__weight)
      next_state = Mul (d, factor)
    }"""
    shapes = {"conv.weight": (8, 3, 3, 3), "conv.bias": (8,), "linear.weight": (8, 8)}
    weights = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
    found = model(text, weights | {"one": np.ones(8), "zero": np.zeros(8), "factor": np.full(1, -3.0)})
    found.graph[-1].name = "update/next"
    return found


def types(found: ir.Model) -> dict[str, ir.DataType | None]:
    """Operator -> type of its first input."""
    nodes = [node for node in found.graph if node.op_type not in ("Cast", "Constant")]
    return {node.op_type: node.inputs[0].dtype for node in nodes if node.inputs[0] is not None}


def feeds() -> dict[str, np.ndarray]:
    return {"state": np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)}


def test_labels() -> None:
    assert precision.label("fp32", "bf16") == "bf16" == precision.label("bf16", "bf16")
    assert precision.label("int8", "fp32") == "int8" and precision.label("int8", "bf16") == "int8+bf16"
    assert sorted(["int8+bf16", "int8", "fp32", "bf16", "fp16"], key=precision.rank) == [
        *("fp32", "fp16", "bf16", "int8", "int8+bf16")
    ]
    assert set(TOLERANCE) == set(precision.NAMES)
    for name in precision.LABELS:
        for part in precision.parts(name):
            assert all(tolerance_of(name)[what] >= TOLERANCE[part][what] for what in TOLERANCE[part])


@pytest.mark.parametrize("name", list(TYPES))
def test_types_in_the_graph(name: str) -> None:
    found, one = network(), Precision(name)
    exact = evaluate(found, feeds())
    reports = run_passes(found, [one], feeds())
    low = TYPES[name]
    assert types(found) == {"Conv": low, "InstanceNormalization": FLOAT, "Softmax": FLOAT, "MatMul": low, "Mul": FLOAT}
    assert set(one.kept.values()) == {"normalisation", "softmax", "the solver's update"}
    assert [value.dtype for value in (*found.graph.inputs, *found.graph.outputs)] == [FLOAT, FLOAT]
    weights = found.graph.initializers
    assert {weights[w].dtype for w in ("conv.weight", "conv.bias", "linear.weight")} == {low}
    assert {weights[w].dtype for w in ("one", "factor")} == {FLOAT}
    assert tensorrt.problems(found) == []
    # rounding does show, and no more than it
    assert reports[0].error is not None and 1e-5 < reports[0].error < {"fp16": 2e-3, "bf16": 1e-2}[name]
    assert exact is not None


def test_keep_and_shared_tensors() -> None:
    converted: dict[int, tuple[ir.TensorProtocol, ir.TensorProtocol]] = {}
    first = network()
    second = first.clone()
    kept = Precision("fp16", keep=["conv"], converted=converted)
    run_passes(first, [kept], feeds())
    run_passes(second, [Precision("fp16", converted=converted)], feeds())
    assert types(first)["Conv"] == FLOAT and types(second)["Conv"] == ir.DataType.FLOAT16
    assert "named by the caller" in kept.kept.values()
    one, other = (m.graph.initializers["linear.weight"].const_value for m in (first, second))
    assert one is other


def test_numbers_that_do_not_fit_stay() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    net (float[n, 4] x, float[4] large, float[1] small) => (float[n, 4] y) {
      a = Add (x, large)
      b = Div (a, large)
      y = Add (b, small)
    }"""
    weights = {"large": np.array([1e5, 1, 2, 3]), "small": np.array([1e-9])}
    one = Precision("fp16")
    found = model(text, weights)
    run_passes(found, [one], {"x": np.ones((2, 4), np.float32)})
    reasons = list(one.kept.values())
    assert reasons.count("a constant leaves the range of fp16") == 2 and "a constant becomes zero in fp16" in reasons
    assert all(value.dtype == FLOAT for value in found.graph.initializers.values())
    one = Precision("bf16")
    run_passes(found := model(text, weights), [one], {"x": np.ones((2, 4), np.float32)})
    assert one.kept == {} and len(found.graph.initializers) == 2


def test_norm_that_is_written_out_stays() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    net (float[n, 16] x, float[1] epsilon, float[1] two, float[16] gain) => (float[n, 16] y) {
      axes = Constant <value_ints = [-1]> ()
      square = Pow (x, two)
      mean = ReduceMean (square, axes)
      shifted = Add (mean, epsilon)
      root = Sqrt (shifted)
      inverse = Reciprocal (root)
      normal = Mul (x, inverse)
      y = Mul (normal, gain)
    }"""
    found = model(text, {"epsilon": np.array([1e-5]), "two": np.array([2.0]), "gain": np.ones(16)})
    run_passes(found, [one := Precision("fp16")], {"x": 300 * np.ones((2, 16), np.float32)})  # its square leaves fp16's range
    assert types(found) | {"Mul": FLOAT} == dict.fromkeys(types(found), FLOAT)
    assert sorted(set(one.kept.values())) == ["between operators in float32", "normalisation"]
    assert found.graph.initializers["gain"].dtype == ir.DataType.FLOAT16


def test_an_input_that_is_float32_at_every_type() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    net (float[n, 2, 4, 4] x, float[4] scales) => (float[n, 2, 8, 8] y) {
      y = Resize <mode = "nearest"> (x, , scales)
    }"""
    found = model(text, {"scales": np.array([1.0, 1.0, 2.0, 2.0])})
    run_passes(found, [Precision("fp16")], {"x": np.ones((2, 2, 4, 4), np.float32)})
    assert types(found) == {"Resize": ir.DataType.FLOAT16} and found.graph.initializers["scales"].dtype == FLOAT


def test_emulation_rounds_as_bf16_does() -> None:
    text = """<ir_version: 10, opset_import: ["" : 22]>
    net (float[n, 64] x, float[64] c) => (float[n, 64] y) {
      y = Mul (x, c)
    }"""
    generator = np.random.default_rng(0)
    c, x = (generator.standard_normal(shape).astype(np.float32) for shape in ((64,), (3, 64)))
    found = model(text, {"c": c})
    Precision("bf16")(found)
    emulated = emulate(found)
    assert not any(node.op_type == "Mul" and node.inputs[0].dtype == ir.DataType.BFLOAT16 for node in emulated.graph)
    (y,) = evaluate(found, {"x": x}) or []
    low = [one.astype(ml_dtypes.bfloat16).astype(np.float32) for one in (x, c)]
    np.testing.assert_array_equal(y, (low[0] * low[1]).astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp64"}, "expected --precision out of fp32, fp16, bf16, int8, fp8, int4; found 'fp64'"),
        ({"keep": ["conv_in"]}, "expected --keep with a --precision below fp32"),
        ({"precision": "int8"}, "expected --realisation baked or fused with --precision int8"),
        (
            {"precision": "fp16", "max_error": 0.1},
            "expected --max-error above 0 with --precision int8 or fp8; found 0.1 with fp16",
        ),
        ({"precision": "fp16", "calibration": 0}, "expected --calibration of 1 image or more"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Options(**options)  # type: ignore[arg-type]


def test_fp16_bundle(tiny_model: Path, tiny_bundle: Path, tiny_embeddings: Path, once: Once) -> None:
    def make(directory: Path) -> None:
        bundle = export(directory, model=tiny_model, embeddings=tiny_embeddings, precision="fp16", quiet=True)
        build(bundle, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)

    bundle = Bundle.open(once("fp16", make))
    assert bundle.manifest["precision"] == "fp16" and set(bundle.realisations) == {"baked", "table", "fused"}
    weights = [one.file("graphs/weights.bin").stat().st_size for one in (bundle, Bundle.open(tiny_bundle))]
    assert weights[0] < 0.55 * weights[1]
    told = bundle.manifest["compiler"]["precision"]
    assert 0 < max(told["errors"]["evaluations"]) < TOLERANCE["fp16"]["evaluation"]
    for realisation in bundle.realisations:
        with Sampler.load(bundle.path, realisation=realisation) as sampler:
            report = verify(sampler, seconds=0, draw=False, quiet=True)
        assert report.precision == "fp16" and report.passed, [check for check in report.checks if not check.passed]


def test_bf16_bundle(tiny_model: Path, tiny_embeddings: Path, tmp_path: Path) -> None:
    made = {"realisations": ["baked"], "precision": "bf16", "quiet": True}
    bundle = export(tmp_path / "bf16", model=tiny_model, embeddings=tiny_embeddings, **made)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="for onnxruntime on cpu; found bf16; build with another --engine, or export again"):
        build(bundle, engine="onnxruntime", threads=1, quiet=True)
    build(bundle, engine="openvino", threads=1, quiet=True)
    report = verify(bundle.path, seconds=0, draw=False, quiet=True)
    assert report.precision == "bf16" and report.passed, [check for check in report.checks if not check.passed]
    told = bundle.manifest["compiler"]["precision"]["errors"]["evaluations"]
    assert 1e-4 < max(told) < TOLERANCE["bf16"]["evaluation"]
