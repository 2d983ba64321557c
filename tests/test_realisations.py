"""Realisations: baked, table and fused give the same images; tables are exchanged without another engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from helpers import relative, torch_states

from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.engines.build import build
from mteo_deploy.errors import EngineError, InputError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.choice import pretrained_set
from mteo_deploy.exporters.diff import diff
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.fuse import fuse
from mteo_deploy.exporters.tabulate import tabulate
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.verification import verify

CASES = [(bundle, realisation) for bundle in ("tiny", "history") for realisation in NAMES]


@pytest.mark.parametrize(("name", "realisation"), CASES)
def test_same_states_as_torch(
    name: str, realisation: str, request: pytest.FixtureRequest, tiny_adapter: Adapter, tiny_bundle: Path
) -> None:
    embeddings: EmbeddingSet = request.getfixturevalue("learned" if name == "tiny" else "plain_history")
    path: Path = request.getfixturevalue("tiny_bundle" if name == "tiny" else "tiny_history_bundle")
    noise = noise_for((1, 8, 8), 5, range(3))
    found = Sampler.load(path, realisation=realisation).states(noise)
    expected = torch_states(tiny_adapter, embeddings, noise)
    assert [relative(a, b) < 1e-4 for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("realisation", NAMES)
def test_verify_passes(realisation: str, tiny_history_bundle: Path) -> None:
    report = verify(tiny_history_bundle, realisation=realisation, seconds=0.1, quiet=True)
    assert report.passed
    names = {check.name for check in report.checks}
    assert ("evaluation 0" in names) == (realisation != "fused") and "trajectory" in names
    assert report.latency["realisation"] == realisation
    assert any(line.startswith(f"{realisation} / time-conditioned") for line in report.latency_lines())


def test_fused_has_no_single_evaluations(tiny_bundle: Path) -> None:
    sampler = Sampler.load(tiny_bundle, realisation="fused")
    with pytest.raises(EngineError, match="fused has none; use baked or table"):
        sampler.step(0, noise_for((1, 8, 8), 0, [0]), [])


# --- the table -------------------------------------------------------------------------------------------------------


def test_table_is_another_plan_in_the_same_engine(
    tiny_model: Path, tiny_adapter: Adapter, tiny_bundle: Path, tmp_path: Path
) -> None:
    """A set of 5 steps runs in the engine that was built for 3."""
    other = export(tmp_path / "five", model=tiny_model, steps=5, plain=True, realisations=["table"], quiet=True)
    sampler = Sampler.load(tiny_bundle, tables=other.path)
    noise = noise_for((1, 8, 8), 5, range(3))
    found, expected = sampler.states(noise), torch_states(tiny_adapter, pretrained_set(tiny_adapter, 5, "euler"), noise)
    assert len(found) == len(expected) == 5
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert sampler(num=2, seed=1).shape == (2, 1, 8, 8)


def test_tables_of_another_graph_are_refused(tiny_bundle: Path, tiny_history_bundle: Path) -> None:
    with pytest.raises(EngineError, match="has another one"):
        Sampler.load(tiny_bundle, tables=tiny_history_bundle)


def test_tables_need_the_table_realisation(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match="expected the realisation table"):
        Sampler.load(tiny_bundle, realisation="baked", tables=tiny_bundle)


def test_table_holds_what_differs(tiny_bundle: Path, tiny_adapter: Adapter) -> None:
    """A row per evaluation; as many numbers as the sites put out, and the update's coefficients that are not all equal."""
    bundle = Bundle.open(tiny_bundle)
    network = tiny_adapter.network
    widths = [module.time_emb_proj.out_features for module in network.modules() if hasattr(module, "time_emb_proj")]
    assert bundle.table().shape == (3, sum(widths) + 2)
    entry = bundle.realisations["table"]
    assert entry["inputs"] == ["state", "evaluation", "table"]


def constant_model(value: float, op: str = "Mul") -> ir.Model:
    x = onnx.helper.make_tensor_value_info("state", onnx.TensorProto.FLOAT, ["batch", 2])
    y = onnx.helper.make_tensor_value_info("next_state", onnx.TensorProto.FLOAT, ["batch", 2])
    constant = onnx.numpy_helper.from_array(np.full(2, value, np.float32), "c")
    graph = onnx.helper.make_graph([onnx.helper.make_node(op, ["state", "c"], ["next_state"])], "g", [x], [y], [constant])
    opset = [onnx.helper.make_opsetid("", 20)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10))


def test_tabulate_refuses_other_structures() -> None:
    with pytest.raises(RuntimeError, match="evaluation 1 has another structure"):
        tabulate([constant_model(1), constant_model(2, "Add")])


def test_one_evaluation_needs_no_table(tiny_model: Path, tmp_path: Path) -> None:
    bundle = export(tmp_path / "one", model=tiny_model, steps=1, plain=True, quiet=True)
    build(bundle, engine="onnxruntime", realisation="table", threads=1, quiet=True)
    assert bundle.table().shape == (1, 0) and bundle.realisations["table"]["inputs"] == ["state"]
    assert verify(bundle.path, seconds=0, quiet=True).passed


# --- the fused graph -------------------------------------------------------------------------------------------------


def test_fused_graph_holds_each_weight_once(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    graphs = {graph["graph"]: graph["passes"][-1]["after"] for graph in bundle.manifest["compiler"]["graphs"]}
    one, fused = graphs["graphs/step_00.onnx"], graphs["graphs/fused.onnx"]
    assert fused["nodes"] == 3 * one["nodes"]
    assert fused["parameters"] < 1.02 * one["parameters"]


def test_fused_is_the_loop() -> None:
    fused = fuse([constant_model(2), constant_model(3), constant_model(5)])
    assert [value.name for value in fused.graph.outputs] == ["state_00", "state_01", "next_state"]
    assert [node.name for node in fused.graph] == sorted(node.name or "" for node in fused.graph)
    onnx.checker.check_model(ir.to_proto(fused), full_check=True)


# --- choosing --------------------------------------------------------------------------------------------------------


def test_build_measures_and_picks(bundle_copy: Path) -> None:
    record = json.loads(
        (build(bundle_copy, engine="onnxruntime", threads=1, seconds=0.2, quiet=True) / "engine.json").read_text()
    )
    assert set(record["measured"]["loops"]) == {"table", "fused"}
    ratios = {"baked": 1.0} | {name: found["ratio"] for name, found in record["measured"]["loops"].items()}
    assert ratios[record["realisation"]] == min(ratios.values())
    assert Sampler.load(bundle_copy).loop.name == record["realisation"]


def test_only_what_was_asked_for_is_exported(tiny_model: Path, tmp_path: Path) -> None:
    bundle = export(tmp_path / "b", model=tiny_model, steps=2, plain=True, realisations=["fused"], quiet=True)
    assert list(bundle.realisations) == ["fused"]
    assert sorted(p.name for p in (bundle.path / "graphs").glob("*.onnx")) == ["conditioned.onnx", "fused.onnx"]
    record = json.loads((build(bundle, engine="onnxruntime", threads=1, quiet=True) / "engine.json").read_text())
    assert record["realisation"] == "fused" and record["measured"] == {}
    assert verify(bundle.path, seconds=0, quiet=True).passed
    with pytest.raises(EngineError, match=r"expected a realisation out of fused .* found 'table'; export again"):
        build(bundle, engine="onnxruntime", realisation="table", quiet=True)


@pytest.mark.parametrize("options", [{"realisations": ["quick"]}, {"realisations": []}, {"passes": ["inline"]}])
def test_unknown_options(options: dict[str, list[str]], tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected .*--(realisation|passes)"):
        export(tmp_path / "b", model=tiny_model, steps=1, plain=True, quiet=True, **options)
    assert not (tmp_path / "b").exists()


def test_without_absorb_and_with_dumps(tiny_model: Path, tmp_path: Path, tiny_adapter: Adapter) -> None:
    """The same numbers, an Add more for every site; the graphs after a pass are left whole."""
    plain = export(tmp_path / "a", model=tiny_model, steps=2, plain=True, realisations=["baked"], quiet=True)
    debug = export(
        tmp_path / "b",
        model=tiny_model,
        steps=2,
        plain=True,
        realisations=["baked"],
        passes=[],
        dump_after="update",
        quiet=True,
    )
    nodes = [b.manifest["compiler"]["graphs"][0]["passes"][-1]["after"]["nodes"] for b in (plain, debug)]
    assert nodes[1] - nodes[0] >= len(tiny_adapter.sites)
    dumped = tmp_path / "b.after-update"
    assert sorted(p.name for p in dumped.glob("*.onnx")) == ["step_00.onnx", "step_01.onnx"]
    onnx.checker.check_model(str(dumped / "step_00.onnx"), full_check=True)
    changes = {one["graph"]: one for one in diff(dumped, tmp_path / "a")}
    assert list(changes) == ["step_00.onnx", "step_01.onnx"]
    absorbed = changes["step_00.onnx"]
    assert set(absorbed["operators"]) == {"Add", "Mul"}
    biases = {f"{site.name}.conv1.bias" for site in tiny_adapter.sites}
    assert biases <= set(absorbed["constants"]["changed"])
    assert len(absorbed["constants"]["removed"]) >= len(biases) and not absorbed["constants"]["added"]
    text = CliRunner().invoke(main, ["inspect", str(dumped), "--diff", str(tmp_path / "a")])
    assert text.exit_code == 0 and "constants changed:" in text.stdout, text.output
    noise = noise_for((1, 8, 8), 5, range(2))
    images = []
    for bundle in (plain, debug):
        build(bundle, engine="onnxruntime", threads=1, quiet=True)
        images.append(Sampler.load(bundle.path).states(noise)[-1])
    assert relative(images[0], images[1]) < 1e-5


def test_site_report(tiny_bundle: Path, tiny_adapter: Adapter) -> None:
    sites = Bundle.open(tiny_bundle).manifest["compiler"]["sites"]
    assert [site["site"] for site in sites] == [site.name for site in tiny_adapter.sites]
    for site in sites:
        for where in site["constants"].values():
            assert where["baked"] == f"rule A: in {site['site']}.conv1 (Conv)"
            assert "looked up at run time" in where["table"]


# --- batch -----------------------------------------------------------------------------------------------------------


def test_fixed_batch_is_the_same_sampler(tiny_model: Path, tiny_embeddings: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Graphs for batch 4 give the images of the open ones for any number of images; no shape is computed in them."""
    bundle = export(tmp_path / "b", model=tiny_model, embeddings=tiny_embeddings, batch=[4], quiet=True)
    build(bundle, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    sampler = Sampler.load(tiny_bundle)
    for realisation in NAMES:
        fixed = Sampler.load(bundle.path, realisation=realisation)
        for num in (1, 4, 6):
            np.testing.assert_allclose(fixed(num=num, seed=3), sampler(num=num, seed=3), rtol=0, atol=1e-4)
        assert verify(bundle.path, realisation=realisation, seconds=0, quiet=True).passed
    for entry in bundle.graphs:
        graph = onnx.load(str(bundle.file(entry["graph"])), load_external_data=False).graph
        assert not [node for node in graph.node if node.op_type == "Shape"], entry["graph"]
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4
    sites = bundle.manifest["compiler"]["sites"]
    assert all(where["baked"].startswith("rule A") for site in sites for where in site["constants"].values())


def test_diff_of_what_is_no_graph(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_text("no graph")
    graph = tiny_bundle / "graphs" / "step_00.onnx"
    for other, message in [
        (tmp_path / "x.onnx", "cannot be read"),
        (tmp_path / "nothing", "expected two ONNX files or two directories"),
    ]:
        with pytest.raises(InputError, match=message):
            diff(graph, other)
    with pytest.raises(InputError, match="graphs of the same names"):
        diff(tiny_bundle, tmp_path)
