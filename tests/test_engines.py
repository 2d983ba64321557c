"""Engines: what build leaves, and that a built engine which no longer fits is refused with the way out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import altered, edit_json, unknown_operator

from mteo_deploy.bundle import MANIFEST, Bundle
from mteo_deploy.engines import BACKENDS, cache
from mteo_deploy.engines.build import build
from mteo_deploy.engines.onnxruntime import BACKEND, OnnxRuntimeSession
from mteo_deploy.errors import BundleError, EngineError, InputError, MissingPackageError
from mteo_deploy.sampler import Sampler


def record_of(bundle: Path) -> Path:
    (path,) = bundle.glob("engines/*/engine.json")
    return path


def test_build_leaves_a_record_of_every_part(tiny_bundle: Path) -> None:
    path = record_of(tiny_bundle)
    record = json.loads(path.read_text())
    assert record["parts"]["engine"] == "onnxruntime"
    assert record["parts"]["engine_version"] == metadata.version("onnxruntime")
    assert record["parts"]["device"] == "cpu"
    assert record["parts"]["options"] == {"precision": "fp32", "threads": 1}
    assert record["parts"]["graphs"] == Bundle.open(tiny_bundle).graph_hash
    assert record["key"] == cache.key(record["parts"])
    assert path.parent.name == f"onnxruntime-cpu-{record['key']}"
    graphs = [f"graphs/{name}.onnx" for name in ("conditioned", "step_00", "step_01", "step_02")]
    assert list(record["seconds_to_open"]) == graphs


def test_build_again_replaces(bundle_copy: Path) -> None:
    first = record_of(bundle_copy)
    first.write_text("{}")
    assert build(bundle_copy, engine="onnxruntime", threads=1, seconds=0.2, quiet=True) == first.parent
    assert json.loads(first.read_text())["key"]
    assert [p.name for p in first.parent.parent.iterdir()] == [first.parent.name]


def test_other_options_are_another_built_engine_and_the_newest_is_opened(bundle_copy: Path) -> None:
    old, new = record_of(bundle_copy).parent, build(bundle_copy, engine="onnxruntime", threads=2, seconds=0.2, quiet=True)
    assert old != new
    os.utime(old / "engine.json", (1, 1))
    assert cache.find(Bundle.open(bundle_copy), "onnxruntime", "cpu").options == {"precision": "fp32", "threads": 2}
    os.utime(new / "engine.json", (0, 0))
    assert cache.find(Bundle.open(bundle_copy), "onnxruntime", "cpu").options == {"precision": "fp32", "threads": 1}


def test_key_has_every_part(tiny_bundle: Path) -> None:
    parts = cache.key_parts(Bundle.open(tiny_bundle), BACKEND, "cpu", {})
    keys = {cache.key({**parts, name: "another"}) for name in parts}
    assert len(keys | {cache.key(parts)}) == len(parts) + 1 == 7


def test_nothing_built(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b")
    with pytest.raises(BundleError, match=f"found none; run: mteo-deploy build {path} --engine onnxruntime --device cpu"):
        Sampler.load(path, engine="onnxruntime", device="cpu")
    with pytest.raises(BundleError, match=f"expected a built engine in {path}; found none; run: mteo-deploy build {path}$"):
        Sampler.load(path)


def test_built_by_another_version(bundle_copy: Path) -> None:
    edit_json(record_of(bundle_copy), lambda record: record["parts"].update(engine_version="0.0.1"))
    with pytest.raises(BundleError, match=r"engine_version changed 0\.0\.1 -> .*run: mteo-deploy build"):
        Sampler.load(bundle_copy)


def test_built_on_another_machine(bundle_copy: Path) -> None:
    edit_json(record_of(bundle_copy), lambda record: record["parts"].update(machine="riscv64"))
    with pytest.raises(BundleError, match=r"machine changed riscv64 -> .*run: mteo-deploy build"):
        Sampler.load(bundle_copy)


def test_graphs_changed_since(bundle_copy: Path, tiny_history_bundle: Path) -> None:
    """Exported again from other embeddings, the built engine of the first left in place."""
    bundle = altered(tiny_history_bundle, bundle_copy.parent / "again")
    (bundle_copy / "engines").rename(bundle / "engines")
    with pytest.raises(BundleError, match=r"stale.*graphs changed .* -> .*run: mteo-deploy build"):
        Sampler.load(bundle)
    build(bundle, engine="onnxruntime", seconds=0.2, quiet=True)
    assert Sampler.load(bundle)(num=1).shape == (1, 1, 8, 8)


def test_graph_hash_covers_external_data(tiny_bundle: Path, tmp_path: Path) -> None:
    def flip(directory: Path) -> None:
        path = directory / "graphs" / "weights.bin"
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(content)

    other = altered(tiny_bundle, tmp_path / "other", files=flip)
    same = altered(tiny_bundle, tmp_path / "same")
    hashes = [Bundle.open(path).graph_hash for path in (tiny_bundle, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parts": "text"}'])
def test_unreadable_record(text: str, bundle_copy: Path) -> None:
    record_of(bundle_copy).write_text(text)
    with pytest.raises(BundleError, match=r"engine\.json cannot be read.*run: mteo-deploy build"):
        Sampler.load(bundle_copy)


def test_record_under_another_key(bundle_copy: Path) -> None:
    directory = record_of(bundle_copy).parent
    directory.rename(directory.with_name("onnxruntime-cpu-000000000000"))
    with pytest.raises(BundleError, match="moved from another key"):
        Sampler.load(bundle_copy)


def test_unknown_engine(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match=f"out of {', '.join(BACKENDS)}, auto; found 'tflite'$"):
        build(tiny_bundle, engine="tflite", quiet=True)


def test_unknown_device(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b")
    with pytest.raises(EngineError, match="device out of cpu for onnxruntime; found 'npu'"):
        build(path, engine="onnxruntime", device="npu", quiet=True)
    assert not (path / "engines").exists()
    assert BACKEND.devices() == ["cpu"]


def test_both_packages_installed(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.23.0")
    with pytest.raises(EngineError, match=r"onnxruntime 1\.23\.0, onnxruntime-gpu 1\.23\.0.*pip uninstall -y onnxruntime"):
        Sampler.load(bundle_copy)


def test_missing_package(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for use in (Sampler.load, build):
        with pytest.raises(MissingPackageError, match=r"pip install 'mteo-deploy\[cpu\]'"):
            use(bundle_copy, engine="onnxruntime")
    with pytest.raises(MissingPackageError, match=r"pip install 'mteo-deploy\[cpu\]'"):
        Sampler.load(bundle_copy)


def test_package_is_asked_for_before_the_device(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingPackageError, match=r"the engine tensorrt is not installed .*mteo-deploy\[tensorrt\]"):
        build(bundle_copy, engine="tensorrt", quiet=True)


def test_no_engine_at_all(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "openvino", "tensorrt"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=r"no engine is installed; run: pip install 'mteo-deploy\[cpu\]' or"):
        build(bundle_copy, quiet=True)


def test_no_device(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKEND), "devices", lambda self: [])
    with pytest.raises(EngineError, match="expected a device that onnxruntime can use; found none here"):
        build(bundle_copy, engine="onnxruntime", quiet=True)


def test_graph_that_is_none(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(
        tiny_bundle, tmp_path / "b", files=lambda bundle: (bundle / "graphs" / "step_01.onnx").write_bytes(b"no graph")
    )
    with pytest.raises(BundleError, match=r"step_01\.onnx is no ONNX file.*export again"):
        build(path, engine="onnxruntime", quiet=True)


def test_graph_that_the_engine_refuses(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b", files=lambda bundle: unknown_operator(bundle / "graphs" / "step_01.onnx"))
    with pytest.raises(EngineError, match=r"could not open graphs/step_01\.onnx.*export again"):
        build(path, engine="onnxruntime", quiet=True)
    assert not (path / "engines").exists()


class NaNSession:
    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        return [np.full_like(feeds["state"], np.nan)]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("step_00", "baked: evaluation 0 gives values that are not finite"),
        ("conditioned", r"graphs/conditioned\.onnx gives values that are not finite"),
    ],
)
def test_build_refuses_values_that_are_not_finite(
    broken: str, message: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = altered(tiny_bundle, tmp_path / "b"), type(BACKEND).open

    def open_graph(self: Any, bundle: Bundle, graph: str, *others: Any) -> Any:
        return NaNSession() if broken in graph else opened(self, bundle, graph, *others)

    monkeypatch.setattr(type(BACKEND), "open", open_graph)
    with pytest.raises(EngineError, match=message):
        build(path, engine="onnxruntime", quiet=True)
    assert not (path / "engines").exists()


def test_only_what_the_loop_runs_is_open_while_it_is_timed(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, at_once, most = altered(tiny_bundle, tmp_path / "b"), set[str](), list[set[str]]()
    opened, closed = type(BACKEND).open, OnnxRuntimeSession.close

    def open_graph(self: Any, bundle: Bundle, graph: str, *others: Any) -> Any:
        session = opened(self, bundle, graph, *others)
        session.graph = graph
        at_once.add(graph)
        most.append(set(at_once))
        return session

    def close(self: Any) -> None:
        at_once.discard(self.graph)
        closed(self)

    monkeypatch.setattr(type(BACKEND), "open", open_graph)
    monkeypatch.setattr(OnnxRuntimeSession, "close", close)
    build(path, engine="onnxruntime", realisation="baked", quiet=True)
    assert max(most, key=len) == {entry["graph"] for entry in Bundle.open(path).step_graphs}
    assert {"graphs/conditioned.onnx"} in most


def test_wrong_input_shape_names_it(tiny_sampler: Sampler) -> None:
    with pytest.raises(EngineError, match=r"could not run inputs .*\(1, 1, 7, 8\)"):
        tiny_sampler.step(0, np.zeros((1, 1, 7, 8), np.float32), [])


def test_altered_bundle_is_not_built(bundle_copy: Path) -> None:
    (bundle_copy / "graphs" / "weights.bin").write_bytes(b"")
    with pytest.raises(BundleError, match="truncated"):
        build(bundle_copy, engine="onnxruntime", quiet=True)
    assert (bundle_copy / MANIFEST).is_file()
