"""Profiles: every layer of every graph, as often as it runs, in both engines that tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import altered

from mteo_deploy.engines.base import Layer
from mteo_deploy.engines.build import build
from mteo_deploy.engines.onnxruntime import OnnxRuntimeProfiledSession
from mteo_deploy.engines.openvino import OpenVinoProfiledSession
from mteo_deploy.errors import EngineError, InputError
from mteo_deploy.profiling import GROUPS, LayerCost, Profile, profile


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def built(request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = altered(tiny_bundle, tmp_path_factory.mktemp("profile") / "b")
    build(path, engine=request.param, realisation="baked", threads=1, quiet=True)
    return path


@pytest.mark.parametrize("realisation", ["baked", "table", "fused"])
def test_layers_of_every_graph(realisation: str, built: Path) -> None:
    found = profile(built, realisation=realisation, batch=2, loops=4, quiet=True)
    assert (found.realisation, found.batch) == (realisation, 2)
    evaluations = {"baked": 3, "table": 1, "fused": 1}[realisation]
    assert len(found.graphs()) == evaluations and sum(found.graphs().values()) > 0
    runs = 3 if realisation == "table" else 1
    assert {layer.runs for layer in found.layers} == {runs}
    assert {layer.runs for layer in found.conditioned} == {3}
    assert {layer.kind for layer in (*found.layers, *found.conditioned) if layer.group == "other"} == set()
    assert {"convolution", "matrix product", "layout and shape"} <= found.groups().keys()


def test_the_time_embedding_is_gone(built: Path) -> None:
    """Baked graphs run fewer matrix products than the time-conditioned one: no time MLP, no projections."""
    found = profile(built, realisation="baked", loops=2, quiet=True)
    ours, theirs = (
        sum(layer.runs for layer in layers if layer.group == "matrix product") for layers in (found.layers, found.conditioned)
    )
    assert 0 < ours < theirs


def test_batch_sizes_of_the_engine(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b")
    build(path, engine="openvino", realisation="table", batch=[2], quiet=True)
    assert profile(path, batch=2, loops=2, quiet=True).graphs().keys() == {"graphs/table.onnx"}
    with pytest.raises(EngineError, match=r"built for, \[2\]; found 3"):
        profile(path, batch=3, loops=2, quiet=True)


def test_layers_of_a_part_of_the_samplings(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines keep a limited number of events."""

    def without_the_first_run(whole: Callable[[Any], list[Layer]]) -> Callable[[Any], list[Layer]]:
        return lambda session: [replace(layer, times=layer.times[1:]) for layer in whole(session)]

    for kind in (OnnxRuntimeProfiledSession, OpenVinoProfiledSession):
        monkeypatch.setattr(kind, "layers", without_the_first_run(kind.layers))
    with pytest.raises(EngineError, match="part of 2 samplings"):
        profile(built, loops=2, quiet=True)


def cost(graph: str, group: str, milliseconds: float) -> LayerCost:
    return LayerCost(graph, f"{graph} {group}", "Conv", group, milliseconds, 1)


@pytest.fixture
def found() -> Profile:
    ours = [cost("a", "norm", 1.0), cost("a", "convolution", 2.0), cost("b", "norm", 4.0)]
    return Profile("bundle", "onnxruntime", "cpu", "fp32", "baked", 1, ours, [cost("c", "convolution", 9.0)])


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_decoder_and_text_encoder(engine: str, pipeline_bundle: Path, tmp_path: Path) -> None:
    """Once per sampling, beside the loop and not in it."""
    path = altered(pipeline_bundle, tmp_path / "b")
    build(path, engine=engine, realisation="table", threads=1, seconds=0.1, quiet=True)
    found = profile(path, loops=3, quiet=True)
    beside = ["graphs/decoder.onnx", "graphs/text_encoder.onnx"]
    assert {layer.graph for layer in found.beside} == {*beside} and {layer.runs for layer in found.beside} == {1}
    assert not {layer.graph for layer in (*found.layers, *found.conditioned)} & {*beside}
    assert list(found.graphs())[-2:] == beside and all(found.graphs()[graph] > 0 for graph in beside)
    assert sum(layer.group == "convolution" for layer in found.beside) > 5
    assert sum(ours for ours, _ in found.groups().values()) == pytest.approx(sum(layer.milliseconds for layer in found.layers))
    rows = {e["args"]["name"] for e in found.chrome_trace()["traceEvents"] if e["ph"] == "M"}
    assert rows == {"table", "time-conditioned", "beside both"}


def test_sums(found: Profile) -> None:
    assert found.graphs() == {"a": 3.0, "b": 4.0}
    assert list(found.groups().items()) == [("convolution", (2.0, 9.0)), ("norm", (5.0, 0.0))]


def test_files(found: Profile, tmp_path: Path) -> None:
    found.save(tmp_path / "p" / "profile.json")
    assert json.loads((tmp_path / "p" / "profile.json").read_text())["graphs"] == {"a": 3.0, "b": 4.0}
    found.save(tmp_path / "sample.trace.json")
    events = json.loads((tmp_path / "sample.trace.json").read_text())["traceEvents"]
    spans = [(event["tid"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert spans == [(0, 0.0, 1000.0), (0, 1000.0, 2000.0), (0, 3000.0, 4000.0), (1, 0.0, 9000.0)]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["baked", "time-conditioned"]


def test_groups_share_no_kind() -> None:
    kinds = [kind for kinds in GROUPS.values() for kind in kinds.split()]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"loops": 0}])
def test_arguments_out_of_range(arguments: dict[str, int], tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="found"):
        profile(tiny_bundle, quiet=True, **arguments)  # type: ignore[arg-type]
