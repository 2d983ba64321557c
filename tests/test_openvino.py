"""OpenVINO: the same images as ONNX Runtime, in the precision asked for, from files that are checked."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import altered, relative, unknown_operator

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import cache
from mteo_deploy.engines.base import Session
from mteo_deploy.engines.batches import SizesAsTheyCome
from mteo_deploy.engines.build import build
from mteo_deploy.errors import BundleError, EngineError, InputError
from mteo_deploy.numerics import TOLERANCE
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.verification import verify

pytest.importorskip("openvino", reason="the extra openvino is not installed")

from mteo_deploy.engines.openvino import BACKEND

QUICK: dict[str, Any] = {"engine": "openvino", "threads": 1, "seconds": 0.1, "quiet": True}


@pytest.fixture(scope="module")
def built(tiny_history_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with history, built for the realisation table; a test that alters it copies it first."""
    path = altered(tiny_history_bundle, tmp_path_factory.mktemp("openvino") / "bundle")
    build(path, realisation="table", **QUICK)
    return path


@pytest.mark.parametrize("realisation", NAMES)
@pytest.mark.parametrize("batch", [(), (1, 3)])
def test_same_images(realisation: str, batch: tuple[int, ...], tiny_history_bundle: Path, history_sampler: Sampler) -> None:
    bundle, options = Bundle.open(tiny_history_bundle), {"precision": "fp32", "threads": 1, "batch": list(batch)}
    sampler = Sampler(bundle, lambda graph: BACKEND.open(bundle, graph, "cpu", options), realisation)
    for size in (1, 2, 5):  # 2 and 5 are filled up and cut where the graphs are for 1 and 3
        noise = noise_for(bundle.sample_shape, 4, range(size))
        for found, expected in zip(sampler.states(noise), history_sampler.states(noise), strict=True):
            assert relative(found, expected) < 1e-4


def test_sizes_as_they_come(tiny_bundle: Path, tmp_path: Path) -> None:
    """Each size has a graph of its own until there are enough, then one takes the rest; none is made twice."""
    bundle, made = Bundle.open(tiny_bundle), list[int | None]()

    def opened(size: int | None) -> Session:
        made.append(size)
        return BACKEND.open(bundle, "graphs/step_00.onnx", "cpu", {"threads": 1, **({"batch": [size]} if size else {})})

    sizes = SizesAsTheyCome(opened)
    noise = noise_for(bundle.sample_shape, 0, range(7))
    expected = sizes.run({"state": noise})[0]
    for size in (1, 2, 3, 5, 6, 2, 7):
        assert relative(sizes.run({"state": noise[:size]})[0], expected[:size]) < 1e-5
    assert made == [1, 7, 2, 3, None]
    sizes.save(tmp_path, "graphs/step_00.onnx")
    assert {path.name for path in tmp_path.iterdir()} >= {f"step_00-{size}.blob" for size in (1, 2, 3, 7)}
    sizes.close()
    with pytest.raises(EngineError, match="found one that was closed"):
        sizes.run({"state": noise})


def test_none_is_kept_of_a_large_network(tiny_history_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiled graphs would hold the weights again; it is compiled when it is opened, to the same images."""
    monkeypatch.setattr("mteo_deploy.engines.openvino.KEPT", 0)
    path = altered(tiny_history_bundle, tmp_path / "b")
    directory = build(path, realisation="table", **QUICK)
    assert [file.name for file in directory.iterdir()] == [cache.RECORD]
    noise = noise_for((1, 8, 8), 0, range(2))
    with Sampler.load(path) as sampler:
        found = sampler.image(noise)
    monkeypatch.undo()
    build(path, realisation="table", **QUICK)
    with Sampler.load(path) as sampler:
        np.testing.assert_array_equal(sampler.image(noise), found)


def test_states_are_not_overwritten(built: Path) -> None:
    """A later run leaves what an earlier one returned alone."""
    sampler = Sampler.load(built)
    noise = noise_for(sampler.bundle.sample_shape, 0, range(2))
    first = sampler.states(noise)
    copies = [state.copy() for state in first]
    sampler.states(noise[::-1].copy())
    for state, copy in zip(first, copies, strict=True):
        np.testing.assert_array_equal(state, copy)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_the_one_asked_for(precision: str, tiny_bundle: Path, tmp_path: Path) -> None:
    if precision == "bf16" and "BF16" not in BACKEND.machine("cpu", {}):
        pytest.skip("this processor has no bf16")
    path = altered(tiny_bundle, tmp_path / "bundle")
    directory = build(path, precision=precision, batch=[2], **QUICK)
    assert json.loads((directory / "engine.json").read_text())["parts"]["options"]["precision"] == precision
    sampler = Sampler.load(path)
    assert sampler.precision == precision
    report = verify(sampler, seconds=0, quiet=True)
    assert report.passed and report.precision == precision, report.checks
    reference = sampler.bundle.reference()
    error = relative(sampler.states(reference["noise"])[-1], reference["states"][-1])
    assert (error < 1e-4) if precision == "fp32" else (1e-4 < error < TOLERANCE["bf16"]["trajectory"])


def test_only_what_was_chosen_is_stored(built: Path) -> None:
    (directory,) = (built / "engines").iterdir()
    assert {path.name for path in directory.iterdir()} == {"conditioned-1.blob", "table-1.blob", "engine.json"}
    sampler = Sampler.load(built, realisation="baked")  # compiled when opened
    assert sampler(num=1).shape == (1, 1, 8, 8)


def test_altered_file_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "bundle")
    directory = build(path, realisation="fused", **QUICK)
    (directory / "fused-1.blob").write_bytes(b"")
    with pytest.raises(BundleError, match=r"its files were altered.*mteo-deploy build .*--threads 1"):
        Sampler.load(path)


def test_file_that_is_none(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "step_00-1.blob").write_bytes(b"no engine at all")
    with pytest.raises(EngineError, match=r"could not open .*step_00-1\.blob; build again"):
        BACKEND.open(Bundle.open(tiny_bundle), "graphs/step_00.onnx", "cpu", {}, tmp_path)


def test_graph_that_is_none(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b", files=lambda bundle: unknown_operator(bundle / "graphs" / "fused.onnx"))
    with pytest.raises(EngineError, match=r"could not open graphs/fused\.onnx; export again"):
        build(path, **QUICK)
    assert not (path / "engines").exists()


@pytest.mark.parametrize("names", [(), ("state", "label")])
def test_wrong_inputs(names: tuple[str, ...], tiny_bundle: Path) -> None:
    session = BACKEND.open(Bundle.open(tiny_bundle), "graphs/step_00.onnx", "cpu", {})
    with pytest.raises(EngineError, match=r"expected the inputs \['state'\]; found"):
        session.run({name: np.zeros((1, 1, 8, 8), np.float32) for name in names})
    with pytest.raises(EngineError, match=r"could not run inputs .*\(1, 1, 7, 8\)"):
        session.run({"state": np.zeros((1, 1, 7, 8), np.float32)})


def test_unknown_device(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"device out of .*cpu.* for openvino; found 'npu'"):
        BACKEND.open(Bundle.open(tiny_bundle), "graphs/step_00.onnx", "npu", {})


def test_precision_that_no_engine_has(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="out of fp32, bf16; found 'int3'"):
        build(tiny_bundle, precision="int3", quiet=True)
    with pytest.raises(InputError, match="expected an engine that computes in bf16; onnxruntime does not"):
        build(tiny_bundle, engine="onnxruntime", precision="bf16", quiet=True)


def test_auto_measures_the_engines(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "bundle")
    record = json.loads((build(path, threads=1, seconds=0.2, quiet=True) / "engine.json").read_text())
    engines = record["measured"]["engines"]
    assert engines["against"] == "onnxruntime" and set(engines["loops"]) == {"openvino"}
    fastest = "openvino" if engines["loops"]["openvino"]["ratio"] < 1 else "onnxruntime"
    assert record["parts"]["engine"] == fastest == Sampler.load(path).built.backend.name  # type: ignore[union-attr]


@pytest.mark.parametrize("what", ["open", "devices"])
def test_an_engine_that_cannot_is_left_out(
    what: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise EngineError("no such operator")

    path = altered(tiny_bundle, tmp_path / "bundle")
    monkeypatch.setattr(type(BACKEND), what, refuse)
    record = json.loads((build(path, threads=1, seconds=0.1, quiet=True) / "engine.json").read_text())
    assert record["parts"]["engine"] == "onnxruntime"
    assert record["measured"]["engines"]["refused"] == {"openvino": "no such operator"}


def test_two_builds_at_once(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "bundle")
    code = f"from mteo_deploy import build; build({str(path)!r}, engine='openvino', threads=1, seconds=.1, quiet=True)"
    first, second = (subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2))
    assert [first.wait(120), second.wait(120)] == [0, 0], (first.stderr, second.stderr)
    for process in (first, second):
        assert process.stderr is not None
        process.stderr.close()
    assert [entry["fits"] for entry in cache.entries(Bundle.open(path))] == [True]


def test_a_second_build_waits(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no file locks here")
    bundle = Bundle.open(altered(tiny_bundle, tmp_path / "bundle"))
    done = threading.Event()

    def second() -> None:
        build(bundle, realisation="fused", **QUICK)
        done.set()

    with cache.locked(bundle):
        thread = threading.Thread(target=second)
        thread.start()
        assert not done.wait(1.0)
        assert cache.entries(bundle) == []
    thread.join(60)
    assert done.is_set()


def test_killed_in_the_middle(tiny_bundle: Path, tmp_path: Path) -> None:
    """What a killed build leaves is no built engine, and the next build works."""
    path = altered(tiny_bundle, tmp_path / "bundle")
    code = (
        "import os, signal; from pathlib import Path; from mteo_deploy import build; from mteo_deploy.engines import cache\n"
        "cache.files_of = lambda directory: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"build({str(path)!r}, engine='openvino', realisation='fused', threads=1, quiet=True)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    left = cache.entries(Bundle.open(path))
    assert sum(entry["bytes"] for entry in left) > 0
    assert {entry["reason"] for entry in left} == {"left by a build that was interrupted"}
    with pytest.raises(BundleError, match="found none"):
        Sampler.load(path)
    assert [entry["name"] for entry in cache.clean(Bundle.open(path))] == [entry["name"] for entry in left]
    build(path, realisation="fused", **QUICK)
    assert Sampler.load(path)(num=1).shape == (1, 1, 8, 8)
    assert [entry["fits"] for entry in cache.entries(Bundle.open(path))] == [True]
