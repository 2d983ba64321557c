"""Quantised layers: what rounding may cost, scales by evaluation, the loud layer found, and bundles in int8."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Once
from helpers import altered, failed
from test_precision import feeds, model, network

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.build import build
from mteo_deploy.errors import EngineError, InputError, MissingPackageError
from mteo_deploy.exporters import calibration, running, tensorrt, work
from mteo_deploy.exporters.calibration import Sample
from mteo_deploy.exporters.evaluate import evaluate
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.passes.quantize import FORMATS, Quantize, format_of, quantised, rounded, spread, weight_scale
from mteo_deploy.exporters.passes.runner import run_passes
from mteo_deploy.exporters.running import Graphs
from mteo_deploy.exporters.search import order, search
from mteo_deploy.exporters.sensitivity import Sensitivity, Switchboard, group, sensitivity, work_shares
from mteo_deploy.exporters.timing import Kind
from mteo_deploy.page import page
from mteo_deploy.sampler import Sampler
from mteo_deploy.verification import verify

INT8 = FORMATS["int8"]


def product(columns: int = 64) -> ir.Model:
    """Two products with weights of 64 rows, the first of which scales its outputs very differently."""
    generator = np.random.default_rng(3)
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    net (float[n, 64] state, float[64, 64] first__weight, float[64, {columns}] second__weight)
         => (float[n, {columns}] next_state) {{
      a = MatMul (state, first__weight)
      next_state = MatMul (a, second__weight)
    }}"""
    first = generator.standard_normal((64, 64)) / 8 * np.geomspace(0.5, 2, 64)
    return model(text, {"first.weight": first, "second.weight": generator.standard_normal((64, columns)) / 8})


def states(count: int = 32, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 64)).astype(np.float32)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("axis", [0, 1])
def test_rounding_is_at_most_half_a_step_and_clips_no_weight(name: str, axis: int) -> None:
    form = FORMATS[name]
    weight = np.random.default_rng(0).standard_normal((128, 192)).astype(np.float32) * np.geomspace(
        1e-3, 10, 192, dtype=np.float32
    )
    scale = weight_scale(weight, axis, form)
    steps = np.broadcast_to(spread(scale, weight, axis, form), weight.shape)
    error = np.abs(rounded(weight, spread(scale, weight, axis, form), form) - weight)
    assert (error <= 0.5 * steps * (1 + 1e-5)).all() and error.max() > 0.4 * steps.max()
    assert np.abs(quantised(weight, spread(scale, weight, axis, form), form).astype(np.int32)).max() == form.largest_weight


def test_fp8_rounds_to_a_sixteenth() -> None:
    form = FORMATS["fp8"]
    values = np.geomspace(1e-2, 1, 1000, dtype=np.float32)
    error = np.abs(rounded(values, np.float32(1 / form.largest), form) / values - 1)
    assert 0.03 < error.max() <= 1 / 16  # three bits behind the point


def test_a_tensor_of_zeros_has_a_scale() -> None:
    assert (
        rounded(
            np.zeros((4, 4), np.float32), weight_scale(np.zeros((4, 4), np.float32), 0, FORMATS["fp8"]), FORMATS["fp8"]
        ).max()
        == 0
    )
    assert calibration.choose(_sample(np.zeros(10, np.float32)), INT8).value > 0


def _sample(values: np.ndarray) -> Sample:
    found = Sample()
    found.add(values)
    return found


def test_scales_by_evaluation_are_never_worse_than_one_for_all() -> None:
    generator = np.random.default_rng(0)
    samples = [{"x": _sample((width * generator.standard_normal(5000)).astype(np.float32))} for width in (0.05, 1.0, 8.0)]
    pooled = calibration.scales(calibration.pool(samples), INT8)
    for sample in samples:
        own = calibration.scales(sample, INT8, pooled)["x"]
        assert own.error <= calibration.squared_error(sample["x"].values, pooled["x"].value, INT8)
    first = calibration.scales(samples[0], INT8, pooled)["x"]
    assert first.error < 1e-3 * calibration.squared_error(samples[0]["x"].values, pooled["x"].value, INT8)


def test_an_outlier_is_clipped_and_a_flat_tensor_is_not() -> None:
    generator = np.random.default_rng(0)
    heavy = np.concatenate([generator.standard_normal(30_000), [15.0]]).astype(np.float32)
    flat = generator.uniform(-1, 1, 30_000).astype(np.float32)
    chosen = calibration.choose(_sample(heavy), INT8)
    assert chosen.value < 0.96 * 15 / 127 and chosen.error < 0.95 * calibration.squared_error(heavy, 15 / 127, INT8)
    assert calibration.choose(_sample(flat), INT8).value == pytest.approx(1 / 127, rel=0.06)


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_graph_computes_what_rounding_says(name: str) -> None:
    form, found, x = FORMATS[name], product(), states()
    weights = {
        key: value.const_value.numpy() for key, value in found.graph.initializers.items() if value.const_value is not None
    }
    scales = {"state": 4 / form.largest, "a": 9 / form.largest}
    run_passes(found, [one := Quantize(form, scales)], {"state": x})
    assert set(one.layers.values()) == {"weight and input" if form.activations else "weight"}
    for key, scale in zip(("first.weight", "second.weight"), scales.values(), strict=True):
        x = rounded(x, np.float32(scale), form) if form.activations else x
        step = weight_scale(weights[key], 1, form)
        x = x @ rounded(weights[key], spread(step, weights[key], 1, form), form)
    (y,) = evaluate(found, {"state": states()}) or []
    np.testing.assert_allclose(
        y, x, rtol=1e-4, atol=2e-2 if form.activations else 1e-4
    )  # a sum may fall on the other side of a half
    assert np.sqrt(np.mean((y - x) ** 2) / np.mean(x**2)) < (3e-3 if form.activations else 1e-5)
    assert tensorrt.problems(found) == []


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", ["product", "convolution"])
def test_the_largest_numbers_do_not_overflow_in_an_engine(engine: str, kind: str, tmp_path: Path) -> None:
    """Every weight and every input at its largest: where two products are added in 16 bits, as without VNNI, they must fit."""
    operator, weight, given, out = {
        "product": ("MatMul", (64, 64), (4, 64), "[4, 64]"),
        "convolution": ("Conv", (64, 64, 3, 3), (4, 64, 8, 8), "[4, 64, 6, 6]"),
    }[kind]
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    net (float{[*given]} state, float{[*weight]} layer__weight) => (float{out} next_state) {{
      next_state = {operator} (state, layer__weight)
    }}"""
    found, x = model(text, {"layer.weight": np.ones(weight)}), np.ones(given, np.float32)
    run_passes(found, [Quantize(INT8, {"state": 1 / 127})])
    ir.save(found, path := tmp_path / "graph.onnx")
    if engine == "onnxruntime":
        runtime = pytest.importorskip("onnxruntime")
        (y,) = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"state": x})
    else:
        core = pytest.importorskip("openvino").Core()
        (y,) = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"state": x}).values()
    np.testing.assert_allclose(y, np.full_like(y, 64.0 if kind == "product" else 576.0), rtol=1e-5)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_convolutions_and_what_is_named(name: str) -> None:
    form = FORMATS[name]
    found, one = network(), Quantize(form, {"state": 4 / form.largest, "c": 1 / form.largest}, keep=["linear"])
    run_passes(found, [one], feeds())
    assert one.layers == {"conv": "weight and input", "linear": "named by the caller"}
    assert found.graph.initializers["conv.weight"].dtype == form.type
    assert found.graph.initializers["linear.weight"].dtype == found.graph.initializers["conv.bias"].dtype == ir.DataType.FLOAT


def test_int4_takes_whole_blocks() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    net (float[n, 48] state, float[48, 64] layer__weight) => (float[n, 64] next_state) {
      next_state = MatMul (state, layer__weight)
    }"""
    found = model(text, {"layer.weight": np.ones((48, 64))})
    run_passes(found, [one := Quantize(FORMATS["int4"])])
    assert one.layers == {"layer": "its sum is not a multiple of 64 numbers"} and found.graph.opset_imports[""] == 20


def test_steps_share_weights_and_differ_in_scales() -> None:
    first, stored = product(), {}  # type: ignore[var-annotated]
    second = first.clone()
    for found, scale in ((first, 0.02), (second, 0.05)):
        run_passes(found, [Quantize(INT8, {"state": scale, "a": scale}, stored=stored)])
    one, other = (found.graph.initializers for found in (first, second))
    assert one["first.weight"].const_value is other["first.weight"].const_value
    assert one["first.weight"].dtype == ir.DataType.INT8
    assert float(one["a/scale"].const_value.numpy()) != float(other["a/scale"].const_value.numpy())  # type: ignore[union-attr]


def test_switches() -> None:
    found, x = product(), {"state": states()}
    scales = {"state": 4 / 127, "a": 9 / 127}
    (exact,) = evaluate(found, x) or []
    board = Switchboard(found, INT8, scales, Graphs())
    whole = found.clone()
    Quantize(INT8, scales)(whole)
    (low,) = evaluate(whole, x) or []
    np.testing.assert_array_equal(board(x, [])["next_state"], exact)
    np.testing.assert_array_equal(board(x, board.layers)["next_state"], low)
    other = board(x, board.layers, {"a": 0.5})["next_state"]
    assert np.abs(other - exact).max() > 2 * np.abs(low - exact).max()


def test_sensitivity_finds_the_layer_that_saturates() -> None:
    found, x = product(), {"state": states()}
    (exact,) = evaluate(found, x) or []
    held: Any = SimpleNamespace(feeds=[[x]], states=[[exact]])
    shares = work_shares(found, INT8)
    fair = sensitivity([Switchboard(found, INT8, {"state": 4 / 127, "a": 9 / 127}, Graphs())], held, shares)
    planted = sensitivity([Switchboard(found, INT8, {"state": 4 / 127, "a": 0.3 / 127}, Graphs())], held, shares)
    assert shares == {"first": 0.5, "second": 0.5}
    assert max(planted.errors, key=lambda name: planted.errors[name]) == "second"
    assert planted.errors["second"][0] > 20 * fair.errors["second"][0]
    assert planted.errors["first"] == fair.errors["first"]
    assert planted.loud() == []  # half of the work is not cheap
    cheap = Sensitivity(planted.groups, planted.errors, {"first": 0.99, "second": 0.01})
    assert cheap.loud() == ["second"]


def test_search_takes_what_helps_most_for_its_work() -> None:
    errors = {"a": [0.4, 0.0], "b": [0.1, 0.1], "c": [0.0, 0.3]}
    found = Sensitivity({name: [name] for name in errors}, errors, {"a": 0.5, "b": 0.1, "c": 0.4})

    def error(on: Any) -> float:
        return float(np.sqrt(sum(errors[name][i] ** 2 for i, names in enumerate(on) for name in names)))

    nothing = 1.001 * error([set(errors)] * 2)
    assert search(found, [], nothing, error) == [set(errors)] * 2
    for limit in (0.35, 0.2, 0.11):
        on = search(found, [], limit, error)
        assert error(on) <= limit
        loudest = [(name, i) for name, i in order(found) if name not in on[i]][-1]  # with one fewer gone it is too much
        assert error([{*names, loudest[0]} if i == loudest[1] else names for i, names in enumerate(on)]) > limit
    assert search(found, [], 0.35, error) == [{"b", "c"}, {"a", "b", "c"}]  # the loud one, at its evaluation alone
    assert search(found, ["b"], nothing, error) == [{"a", "c"}] * 2
    with pytest.raises(InputError, match="expected a --max-error that some quantised layer meets; found 1e-06"):
        search(found, ["a", "b", "c"], 1e-6, error)


def test_time_takes_the_place_of_work_where_it_was_measured() -> None:
    """Layers alike share the time that they save by their work; what saves none goes first."""
    errors = {"a": [0.1], "b": [0.1], "c": [0.1]}
    kinds = [Kind("Conv", ["a", "b"], (1.3, 1.2, 1.4)), Kind("MatMul", ["c"], (1.01, 0.99, 1.02))]
    found = Sensitivity({name: [name] for name in errors}, errors, {"a": 0.1, "b": 0.2, "c": 0.7}, kinds)
    assert found.gain("a") == pytest.approx(0.1) and found.gain("b") == pytest.approx(0.2) and found.gain("c") == 0
    assert [name for name, _ in order(found)] == ["c", "a", "b"] and found.slow() == []
    slow = Sensitivity(found.groups, errors, found.work, [Kind("Conv", ["a", "b"], (0.9, 0.8, 0.99)), kinds[1]])
    assert slow.slow() == ["a", "b"]


def test_many_layers_are_measured_by_module() -> None:
    names = [f"blocks.{i}.{part}" for i in range(6) for part in ("q", "k", "v")]
    assert group(names, 100) == {name: [name] for name in names}
    assert group(names, 6) == {f"blocks.{i}": [f"blocks.{i}.{part}" for part in ("q", "k", "v")] for i in range(6)}
    assert group(names, 1) == {"blocks": names}


def test_work_counts_stored_bytes() -> None:
    found = product()
    before = work.count(found)
    Quantize(INT8, {"state": 0.02, "a": 0.02})(found)
    after = work.count(found)
    assert after["flops"] == before["flops"] == 2 * 2 * 64 * 64
    assert after["weight_bytes"] * 4 == before["weight_bytes"] and after["activation_bytes"] < before["activation_bytes"]


def test_calibration_needs_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "available", lambda: False)
    with pytest.raises(MissingPackageError, match=r"pip install 'mteo-deploy\[cpu\]'"):
        Graphs()


@pytest.fixture(scope="module")
def int8_bundle(tiny_model: Path, tiny_embeddings: Path, once: Once) -> Path:
    def make(directory: Path) -> None:
        bundle = export(directory, model=tiny_model, embeddings=tiny_embeddings, precision="int8", calibration=8, quiet=True)
        build(bundle, engine="onnxruntime", realisation="baked", threads=1, seconds=0.1, quiet=True)

    return once("int8", make)


def _initialisers(bundle: Bundle, graph: str) -> dict[str, onnx.TensorProto]:
    found = onnx.load(str(bundle.file(graph)), load_external_data=False)
    return {tensor.name: tensor for tensor in found.graph.initializer}


def test_int8_bundle(int8_bundle: Path, tiny_bundle: Path) -> None:
    bundle = Bundle.open(int8_bundle)
    assert bundle.manifest["precision"] == "int8" and set(bundle.realisations) == {"baked", "fused"}
    for realisation in bundle.realisations:
        with Sampler.load(int8_bundle, realisation=realisation) as sampler:
            report = verify(sampler, seconds=0, draw=False, quiet=True)
            assert report.precision == sampler.precision == "int8"
            assert report.passed, [check for check in report.checks if not check.passed]
    steps = [_initialisers(bundle, entry["graph"]) for entry in bundle.step_graphs]
    low = {name for name, tensor in steps[0].items() if tensor.data_type == onnx.TensorProto.INT8 and tensor.external_data}
    assert len(low) > 20
    for name in low:  # the same bytes of one file for every evaluation
        places = {tuple((e.key, e.value) for e in step[name].external_data) for step in steps}
        assert len(places) == 1
    scales = [
        name for name in steps[0] if name.endswith("/scale") and not steps[0][name].external_data and steps[0][name].dims == []
    ]
    assert any(onnx.numpy_helper.to_array(steps[0][s]) != onnx.numpy_helper.to_array(steps[1][s]) for s in scales)
    sizes = [one.file("graphs/weights.bin").stat().st_size for one in (bundle, Bundle.open(tiny_bundle))]
    assert sizes[0] < 0.4 * sizes[1]
    conditioned = _initialisers(bundle, bundle.manifest["conditioned"]["graph"])
    assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in conditioned.values()) >= len(low)


def test_int8_report(int8_bundle: Path) -> None:
    told = Bundle.open(int8_bundle).manifest["compiler"]["precision"]
    errors, pooled = told["errors"], told["pooled"]
    assert told["name"] == "int8" and told["calibration"] == {"images": 8} and len(errors["evaluations"]) == 3
    assert errors["worst"] == int(np.argmax(errors["evaluations"]))
    assert 0 < max(errors["evaluations"]) < 0.1 and len(pooled["evaluations"]) == 3
    assert len(told["sensitivity"]) == sum(told["layers"][row["layer"]] != "" for row in told["sensitivity"])
    assert all(len(row["errors"]) == 3 for row in told["sensitivity"])
    assert sum(row["work"] for row in told["sensitivity"]) <= 1
    assert all(not graph["tensorrt"] for graph in Bundle.open(int8_bundle).manifest["compiler"]["graphs"])


def test_a_wrong_scale_is_found(int8_bundle: Path, tmp_path: Path) -> None:
    graph = Bundle.open(int8_bundle).step_graphs[1]["graph"]

    def spoil(directory: Path) -> None:
        found = onnx.load(str(directory / graph), load_external_data=False)
        for tensor in found.graph.initializer:
            if tensor.name.endswith("/scale") and not tensor.dims:
                tensor.CopyFrom(
                    onnx.numpy_helper.from_array(np.float32(0.02) * onnx.numpy_helper.to_array(tensor), tensor.name)
                )
        onnx.save(found, str(directory / graph))

    spoilt = altered(int8_bundle, tmp_path / "spoilt", files=spoil)
    build(spoilt, engine="onnxruntime", realisation="baked", threads=1, seconds=0.1, quiet=True)
    report = verify(spoilt, seconds=0, draw=False, quiet=True)
    assert not report.passed and "evaluation 1" in failed(report) and "evaluation 0" not in failed(report)


def test_openvino_mixes_int8_and_bf16(int8_bundle: Path, tmp_path: Path) -> None:
    bundle = altered(int8_bundle, tmp_path / "copy")
    for hint in ("fp32", "bf16"):
        build(bundle, engine="openvino", realisation="baked", precision=hint, threads=1, seconds=0.1, quiet=True)
        report = verify(bundle, engine="openvino", seconds=0, draw=False, quiet=True)
        assert report.precision == {"fp32": "int8", "bf16": "int8+bf16"}[hint]
        assert report.passed, [check for check in report.checks if not check.passed]


def test_a_precision_without_a_layer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected layers that can be stored in int4; found none"):
        export(tmp_path / "int4", model=tiny_model, steps=1, plain=True, precision="int4", realisations=["baked"], quiet=True)
    with pytest.raises(InputError, match="expected layers that can be stored in int8; found none"):
        export(tmp_path / "all", model=tiny_model, steps=1, plain=True, precision="int8", keep=["*"], quiet=True)
    assert not (tmp_path / "int4").exists()


def test_engines_say_what_they_do_not_run(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mteo_deploy.engines import backend

    monkeypatch.setattr(type(backend("onnxruntime")), "runs", lambda self, device: ("fp32", "fp16"))
    with pytest.raises(EngineError, match="in fp32, fp16 for onnxruntime on cpu; found int8"):
        build(int8_bundle, engine="onnxruntime", threads=1, quiet=True)


def test_a_limit_is_met_layer_by_layer(token_model: Path, tmp_path: Path) -> None:
    made: dict[str, Any] = {"plain": True, "steps": 2, "realisations": ["baked"], "precision": "int8", "quiet": True}

    def told(limit: float | None) -> dict[str, Any]:
        bundle = export(tmp_path / "bundle", model=token_model, max_error=limit, **made)
        return dict(bundle.manifest["compiler"]["precision"])

    free = told(None)
    limit = 0.5 * free["errors"]["median_image"]
    limited = told(limit)
    assert free["left_in_float32"] == [[], []] and any(limited["left_in_float32"])
    assert 0 < limited["errors"]["median_image"] <= 1.01 * limit  # the graphs' own error, against that of the switched ones


def test_the_full_range_is_asked_for(token_model: Path, tmp_path: Path) -> None:
    """Half as large steps, so a smaller error; and no other precision has a second range."""
    made: dict[str, Any] = {"plain": True, "steps": 1, "realisations": ["baked"], "quiet": True, "model": token_model}
    told, largest = {}, {}
    for full in (False, True):
        bundle = export(tmp_path / "bundle", precision="int8", full_range=full, **made)
        told[full] = bundle.manifest["compiler"]["precision"]
        tensors = onnx.load(str(bundle.file(bundle.step_graphs[0]["graph"]))).graph.initializer
        weights = [onnx.numpy_helper.to_array(one) for one in tensors if one.data_type == onnx.TensorProto.INT8]
        largest[full] = max(int(np.abs(values.astype(int)).max()) for values in weights)
    assert largest == {False: 64, True: 127} == {full: one["largest_weight"] for full, one in told.items()}
    assert told[True]["errors"]["images"] < told[False]["errors"]["images"]
    assert format_of("int8", full_range=True).largest_weight == 127
    with pytest.raises(InputError, match="expected --full-range with --precision int8 only; found fp8"):
        export(tmp_path / "bundle", precision="fp8", full_range=True, **made)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_labels_and_history(name: str, token_model: Path, tmp_path: Path) -> None:
    """Trajectories run with the prelude and with what a multistep solver keeps; the prelude's weights are quantised."""
    made: dict[str, Any] = {"solver": "ipndm-2", "plain": True, "steps": 3, "realisations": ["baked"], "quiet": True}
    bundle = export(tmp_path / name, model=token_model, precision=name, **made)
    told = bundle.manifest["compiler"]["precision"]
    assert 0 < max(told["errors"]["evaluations"]) < FORMATS[name].tolerance
    prelude = _initialisers(bundle, bundle.manifest["prelude"]["graph"])
    kinds = {"int8": onnx.TensorProto.INT8, "int4": onnx.TensorProto.INT4}
    assert sum(tensor.data_type == kinds[name] for tensor in prelude.values()) >= 2
    assert not any(part["tensorrt"] for part in bundle.manifest["compiler"]["graphs"])
    build(bundle, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    report = verify(bundle.path, seconds=0, draw=False, quiet=True)
    assert report.precision == name and report.passed, [check for check in report.checks if not check.passed]
    text = re.sub(r"<[^>]+>", "|", page(report))
    assert "Relative error against float32" in text and f"{name}: layers quantised: " in text
    for i, error in enumerate(told["errors"]["evaluations"]):
        others = rf"\|+{told['pooled']['evaluations'][i]:.1e}" if name == "int8" else ""
        assert re.search(rf"\|{i}\|+{error:.1e}{others}\|", text)
    assert ("The most sensitive layers" in text) == (name == "int8")
