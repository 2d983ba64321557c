"""Exporters: what the compiler must do to the graphs, and that they still compute what torch computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import UNet2DModel
from helpers import Array, network_of, relative, torch_states
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mteo_deploy.bundle import Bundle
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.passes.bind import Bind
from mteo_deploy.exporters.passes.fold import Fold
from mteo_deploy.exporters.passes.runner import check, run_passes
from mteo_deploy.exporters.passes.share import Share, WeightFile
from mteo_deploy.exporters.passes.update import Update
from mteo_deploy.plan import Evaluation, Plan, run
from mteo_deploy.sampler import Sampler, noise_for

BUNDLES = ["tiny", "history"]


@pytest.fixture(params=BUNDLES)
def case(request: pytest.FixtureRequest, learned: EmbeddingSet, plain_history: EmbeddingSet) -> tuple[Sampler, EmbeddingSet]:
    """An opened bundle and the set it was made from: learned Euler, plain iPNDM 3."""
    sampler: Sampler = request.getfixturevalue(f"{request.param}_sampler")
    return sampler, learned if request.param == "tiny" else plain_history


# --- adapter ---------------------------------------------------------------------------------------------------------


def resaved(model: Path, target: Path, change: Callable[[UNet2DModel], UNet2DModel]) -> Path:
    """A copy of a pipeline directory with its network changed."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("unet"))
    change(UNet2DModel.from_pretrained(model / "unet", use_safetensors=True)).save_pretrained(target / "unet")
    return target


def test_sites_are_all_layers_that_take_the_embedding(tiny_model: Path, tiny_adapter: Adapter) -> None:
    network = UNet2DModel.from_pretrained(tiny_model / "unet", use_safetensors=True)
    expected = {
        name.removesuffix(".time_emb_proj"): module.in_features
        for name, module in network.named_modules()
        if name.endswith(".time_emb_proj")
    }
    assert {site.name: site.width for site in tiny_adapter.sites} == expected
    assert len(tiny_adapter.sites) == 8
    assert tiny_adapter.sample_shape == (1, 8, 8)
    assert tiny_adapter.prediction_type == "epsilon"


def test_fingerprint_is_of_weights_not_of_files(tiny_model: Path, tmp_path: Path) -> None:
    half = resaved(tiny_model, tmp_path / "half", lambda network: network.half())
    full = resaved(tiny_model, tmp_path / "full", lambda network: network.half().float())
    sizes = [(path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size for path in (half, full)]
    assert sizes[1] > 1.8 * sizes[0]
    assert load_backbone(half).fingerprint() == load_backbone(full).fingerprint()


def test_fingerprint_sees_one_weight(tiny_model: Path, tiny_adapter: Adapter, tmp_path: Path) -> None:
    def nudge(network: UNet2DModel) -> UNet2DModel:
        with torch.no_grad():
            network.conv_out.bias += 1e-6
        return network

    same = load_backbone(resaved(tiny_model, tmp_path / "same", lambda network: network))
    other = load_backbone(resaved(tiny_model, tmp_path / "other", nudge))
    assert same.fingerprint() == tiny_adapter.fingerprint() != other.fingerprint()


def test_missing_weights(tiny_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="weights as safetensors"):
        load_backbone(copy)


def test_not_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model_index\.json.*found nothing there.*save_pretrained"):
        load_backbone(tmp_path)
    (tmp_path / "model_index.json").write_text("{ not json")
    with pytest.raises(InputError, match="cannot be read"):
        load_backbone(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(InputError, match="another JSON value"):
        load_backbone(tmp_path)


# --- graphs on disk --------------------------------------------------------------------------------------------------


def initializers(path: Path) -> dict[str, Array]:
    """Every initialiser of a graph with its values, external data too."""
    model = onnx.load(str(path))
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    assert not constants, "constants outside the initialisers"
    return found


def holds(found: dict[str, Array], weight: Array) -> bool:
    """Whether any initialiser is that weight or its transpose, under whatever name."""
    wanted = [weight, weight.T]
    return any(value.shape == w.shape and np.array_equal(value, w) for value in found.values() for w in wanted)


def test_time_conditioning_is_gone(case: tuple[Sampler, EmbeddingSet], tiny_adapter: Adapter) -> None:
    bundle = case[0].bundle
    state = tiny_adapter.network.state_dict()
    dead = {n: v.numpy() for n, v in state.items() if n.endswith("weight") and ("time_emb_proj" in n or "time_embedding" in n)}
    assert len(dead) == len(tiny_adapter.sites) + 2
    for entry in bundle.step_graphs:
        found = initializers(bundle.file(entry["graph"]))
        assert not [name for name in found if "time_emb" in name or "time_proj" in name or "emb/" in name]
        assert not [name for name, weight in dead.items() if holds(found, weight)]
        assert holds(found, state["conv_in.weight"].numpy())
    conditioned = initializers(bundle.file(bundle.manifest["conditioned"]["graph"]))
    assert all(holds(conditioned, weight) for weight in dead.values()), "the control: this graph needs them"


def test_report_names_what_was_removed(case: tuple[Sampler, EmbeddingSet], tiny_adapter: Adapter) -> None:
    table, _, *steps, _ = case[0].bundle.manifest["compiler"]["graphs"]
    assert len(steps) == len(case[1].plan.evaluations)
    for graph in [table, *steps]:
        for site in tiny_adapter.sites:
            for part in ("weight", "bias"):
                assert [name for name in graph["removed_weights"] if name.endswith(f"{site.name}.time_emb_proj.{part}")]
        assert [p["name"] for p in graph["passes"]] == ["bind", "update", "absorb", "share"]
    for graph in steps:
        assert all(p["modified"] for p in graph["passes"])
        bind, _, absorb, _ = graph["passes"]
        assert absorb["before"]["nodes"] - absorb["after"]["nodes"] >= len(tiny_adapter.sites)
        assert absorb["after"]["parameters"] < bind["after"]["parameters"] + 8
    assert steps[0]["passes"][2]["error"] < 1e-5, "numbers are compared on the first evaluation"


def test_onnx_checker_passes_on_disk(case: tuple[Sampler, EmbeddingSet]) -> None:
    bundle = case[0].bundle
    graphs = [*bundle.step_graphs, bundle.manifest["conditioned"]]
    for entry in graphs:
        path = bundle.file(entry["graph"])
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        assert [value.name for value in model.graph.input] == entry["inputs"]
        assert [value.name for value in model.graph.output] == entry["outputs"]
        for value in [*model.graph.input, *model.graph.output]:
            if value.name != "timestep":
                first, *rest = value.type.tensor_type.shape.dim
                assert first.dim_param and [d.dim_value for d in rest] == [1, 8, 8]


def test_only_state_and_needed_history_are_inputs(history_sampler: Sampler) -> None:
    entries = history_sampler.bundle.step_graphs
    assert [entry["inputs"][1:] for entry in entries] == [
        [],
        ["history_1"],
        ["history_1", "history_2"],
        ["history_1", "history_2"],
    ]
    assert [entry["outputs"] for entry in entries] == [["next_state", "kept"]] * 3 + [["next_state"]]


def test_weights_are_stored_once(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    one = export(tmp_path / "one", model=tiny_model, steps=1, plain=True, quiet=True)
    sizes = [(bundle / "graphs" / "weights.bin").stat().st_size for bundle in (one.path, tiny_bundle)]
    assert sizes[1] <= 1.02 * sizes[0] + 4096
    parameters = one.manifest["compiler"]["graphs"][0]["passes"][-1]["after"]["parameters"]
    assert sizes[0] < 1.2 * 4 * parameters, "padding"


def test_conditioned_graph_shares_the_weights(tiny_bundle: Path) -> None:
    """Its own file holds little more than the time conditioning."""
    bundle = Bundle.open(tiny_bundle)
    own, shared = (bundle.file(f"graphs/{name}.bin").stat().st_size for name in ("conditioned", "weights"))
    assert own < 0.2 * shared
    steps, conditioned = bundle.step_graphs, bundle.manifest["conditioned"]
    for entry, allowed in [(steps[0], {"weights.bin"}), (conditioned, {"weights.bin", "conditioned.bin"})]:
        model = onnx.load(str(bundle.file(entry["graph"])), load_external_data=False)
        places = {pair.value for t in model.graph.initializer for pair in t.external_data if pair.key == "location"}
        assert places == allowed


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_each_step_graph_equals_torch(case: tuple[Sampler, EmbeddingSet], tiny_adapter: Adapter) -> None:
    """Teacher-forced: every graph is fed with torch's own state and history."""
    sampler, embeddings = case
    rows, noise = embeddings.plan.evaluations, noise_for((1, 8, 8), 5, range(6))
    states = torch_states(tiny_adapter, embeddings, noise)
    before = [noise * np.float32(embeddings.plan.initial_scale), *states[:-1]]
    network, kept = network_of(tiny_adapter, embeddings), []
    for i, row in enumerate(rows):
        with torch.no_grad():
            output = network(i, torch.from_numpy(before[i])).numpy()
        kept.insert(0, np.float32(row.keep_output) * output + np.float32(row.keep_state) * before[i])
        next_state, kept_now = sampler.step(i, before[i], kept[1:])
        assert relative(next_state, states[i]) < 1e-4
        assert (kept_now is None) == (len(sampler.bundle.step_graphs[i]["outputs"]) == 1)
        if kept_now is not None:
            assert relative(kept_now, kept[0]) < 1e-4


def test_conditioned_graph_equals_diffusers(tiny_sampler: Sampler, tiny_model: Path) -> None:
    network = UNet2DModel.from_pretrained(tiny_model / "unet", use_safetensors=True)
    state = noise_for((1, 8, 8), 3, range(5))
    for timestep in (0.0, 12.5, 400.0, 999.0):
        found = tiny_sampler.conditioned_session.run({"state": state, "timestep": np.array([timestep], np.float32)})[0]
        with torch.no_grad():
            expected = network(torch.from_numpy(state), torch.tensor(timestep)).sample.numpy()
        assert relative(found, expected) < 1e-4, timestep


def test_conditioned_loop_equals_torch_with_zero_deltas(
    history_sampler: Sampler, plain_history: EmbeddingSet, tiny_adapter: Adapter
) -> None:
    noise = noise_for((1, 8, 8), 9, range(3))
    found = history_sampler.conditioned_states(plain_history.plan, noise)
    expected = torch_states(tiny_adapter, plain_history, noise)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-4


# --- passes, each alone ----------------------------------------------------------------------------------------------


def little(op: str, inputs: tuple[str, ...] = ("state",)) -> ir.Model:
    """``output = op(state, ...)``; further inputs have shape [1, 3]."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch" if name == "state" else 1, 3]) for name in inputs]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node(op, list(inputs), ["output"])], "little", values, [output])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def session_of(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


FACTOR = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-2, 2, width=32))
NONZERO = FACTOR.filter(lambda factor: abs(factor) > 1e-3)


@st.composite
def any_plan(draw: st.DrawFn) -> Plan:
    """Any coefficients a compiled plan may have: the network's output is kept, the last weight is not zero."""
    rows = []
    for i in range(draw(st.integers(1, 4))):
        weights = (*draw(st.lists(FACTOR, max_size=i)), draw(NONZERO))
        rows.append(Evaluation(1.0, 0.0, draw(FACTOR), draw(NONZERO), draw(FACTOR), weights, i + 1))
    return Plan("any", "any", "epsilon", len(rows), (2.0, 1.0), 0.9, tuple(rows))


@settings(max_examples=60, deadline=None)
@given(any_plan(), st.integers(0, 2**32 - 1))
def test_update_is_the_plans_arithmetic(plan: Plan, seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal((2, 3)).astype(np.float32)
    state, history = noise * np.float32(plan.initial_scale), []
    expected = run(plan, noise.astype(np.float64), lambda i, y: np.sin(y))
    scale = max(1.0, *(float(np.abs(y).max()) for y in expected)) * 4
    for i, row in enumerate(plan.evaluations):
        keep = any(len(later.weights) > j for j, later in enumerate(plan.evaluations[i + 1 :], start=1))
        model = little("Sin")
        assert Update(row, keep)(model).modified
        check(model, "update")
        session = session_of(model)
        feeds = {"state": state} | {value.name: history[int(value.name[-1]) - 1] for value in session.get_inputs()[1:]}
        assert len(feeds) == 1 + sum(weight != 0 for weight in row.weights[1:])
        outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))
        assert list(outputs) == ["next_state", "kept"][: 1 + keep]
        state = outputs["next_state"]
        if keep:
            history.insert(0, outputs["kept"])
        np.testing.assert_allclose(state, expected[i], rtol=0, atol=1e-5 * scale)


def test_bind_and_fold_leave_one_constant(tmp_path: Path) -> None:
    model = little("Add", ("state", "emb/a"))
    values = {"emb/a": np.array([[1.0, 2.0, 3.0]], np.float32)}
    reports = run_passes(model, [Bind(values), Bind(values), Fold()])
    assert [report.modified for report in reports][:2] == [True, False]
    assert [value.name for value in model.graph.inputs] == ["state"]
    found = session_of(model).run(None, {"state": np.ones((2, 3), np.float32)})[0]
    np.testing.assert_array_equal(found, [[2, 3, 4]] * 2)


def test_share_stores_equal_tensors_once(tmp_path: Path) -> None:
    """Two graphs, three names, two contents; the tensors come back through ONNX from the one file."""
    (tmp_path / "graphs").mkdir()
    weights = WeightFile(tmp_path / "graphs" / "weights.bin")
    big, other = np.arange(3000, dtype=np.float32).reshape(1000, 3), -np.ones((1000, 3), np.float32)
    for name, value in [("a", big), ("b", big.copy()), ("c", other)]:
        model = little("Add", ("state", "w"))
        value_in = next(v for v in model.graph.inputs if v.name == "w")
        value_in.shape = ir.Shape(value.shape)
        value_in.name = f"w_{name}"
        run_passes(model, [Bind({f"w_{name}": value}), Share(weights)])
        ir.save(model, tmp_path / "graphs" / f"{name}.onnx")
        np.testing.assert_array_equal(initializers(tmp_path / "graphs" / f"{name}.onnx")[f"w_{name}"], value)
    size = weights.path.stat().st_size
    assert big.nbytes + other.nbytes <= size < big.nbytes + other.nbytes + 2 * 4096


def test_runner_names_the_pass_that_broke_the_graph() -> None:
    class Break(ir.passes.InPlacePass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            model.graph[0].op_type = "NoSuchOperator"
            return ir.passes.PassResult(model, modified=True)

    with pytest.raises(RuntimeError, match="invalid after bind -> break"):
        run_passes(little("Sin"), [Bind({}), Break()])


def test_manifest_is_json_of_plain_values(tiny_bundle: Path) -> None:
    """Floats of the plan are hexadecimal text: nothing in the manifest depends on how a reader parses numbers."""
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    assert all(isinstance(value, str) for row in manifest["plan"]["evaluations"] for value in [row["sigma"], row["carry"]])
    assert manifest["embeddings"]["sha256"] == EmbeddingSet.load(tiny_bundle / "embeddings.safetensors").sha256()
