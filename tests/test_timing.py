"""Which layers an engine gains by: measured in it, decided by the measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from mteo_deploy import latency
from mteo_deploy.errors import EngineError, InputError, MissingPackageError
from mteo_deploy.exporters import timing
from mteo_deploy.exporters.export import export
from mteo_deploy.inspection import kind_rows

INT8 = {"plain": True, "steps": 1, "realisations": ["baked"], "precision": "int8", "quiet": True}


def as_if(ratios: Callable[[list[str]], float], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds run in the engine, but the time of each is what ``ratios`` says of the kinds measured so far; those, in order."""
    measured: list[str] = []
    real = timing._kind

    def kind(name: str, *arguments: Any) -> timing.Kind:
        measured.append(name)
        found, ratio = real(name, *arguments), ratios(measured)
        return timing.Kind(name, found.layers, (ratio, ratio - 0.01, ratio + 0.01))

    monkeypatch.setattr(timing, "_kind", kind)
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    return measured


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_layer_is_of_one_kind_and_is_run(engine: str, token_model: Path, tmp_path: Path) -> None:
    """Whatever is faster here: the graphs hold what the table says."""
    try:
        bundle = export(tmp_path / "b", model=token_model, engine=engine, batch=[1, 2], keep=["proj_out_2"], **INT8)
    except InputError as error:
        if f"{engine} computes faster in int8" not in str(error):
            raise
        return
    told = bundle.manifest["compiler"]["precision"]
    layers = [name for kind in told["kinds"] for name in kind["layers"]]
    assert sorted([*layers, "proj_out_2"]) == sorted(row["layer"] for row in told["sensitivity"])
    assert all(kind["ratio"][1] <= kind["ratio"][0] <= kind["ratio"][2] for kind in told["kinds"])
    assert len(kind_rows(told)) == len(told["kinds"]) > 1
    slow = [name for kind in told["kinds"] if kind["ratio"][2] < 1 for name in kind["layers"]]
    assert [name for name, what in told["layers"].items() if what == f"left in float32: faster so in {engine}"] == slow
    graph = onnx.load(str(bundle.file(bundle.step_graphs[0]["graph"])), load_external_data=False).graph
    taken = sum(node.op_type == "QuantizeLinear" for node in graph.node)
    assert (taken > 0) == (len(slow) < len(layers))


def test_what_is_slow_is_left_and_the_rest_measured_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first kind is slow; the second only once the first is gone."""

    def ratio(so_far: list[str]) -> float:
        position, times = so_far.index(so_far[-1]), so_far.count(so_far[-1])
        return 0.9 if (position, times) in {(0, 1), (1, 2)} else 1.1

    measured = as_if(ratio, monkeypatch)
    told = export(tmp_path / "b", model=tiny_model, engine="onnxruntime", **INT8).manifest["compiler"]["precision"]
    names = [kind["name"] for kind in told["kinds"]]
    assert measured == [*names, *names[1:], *names[2:]]
    slow = {name for kind in told["kinds"][:2] for name in kind["layers"]}
    left = {name for name, what in told["layers"].items() if what.startswith("left in float32")}
    assert slow <= left and not any(what.startswith("weight") for name, what in told["layers"].items() if name in slow)
    assert [row[-1] for row in kind_rows(told)] == ["left in fp32"] * 2 + [""] * (len(names) - 2)


def test_no_layer_gains(token_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_if(lambda so_far: 0.9, monkeypatch)
    with pytest.raises(InputError, match="expected layers that openvino computes faster in int8 than in float32; found none"):
        export(tmp_path / "b", model=token_model, engine="openvino", **INT8)
    assert not any(tmp_path.iterdir())


def test_a_limit_costs_the_least_time(token_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What saves no time goes to float32 first, however much work it is."""
    as_if(lambda so_far: 1.0 if len(so_far) == 1 else 1.2, monkeypatch)
    free = export(tmp_path / "free", model=token_model, engine="onnxruntime", **INT8).manifest["compiler"]["precision"]
    limit = 0.9 * free["errors"]["median_image"]
    as_if(lambda so_far: 1.0 if len(so_far) == 1 else 1.2, monkeypatch)
    told = export(tmp_path / "b", model=token_model, engine="onnxruntime", max_error=limit, **INT8)
    (off,) = told.manifest["compiler"]["precision"]["left_in_float32"]
    assert set(free["kinds"][0]["layers"]) <= set(off)


def test_engines_that_cannot_be_measured(token_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"model": token_model, "output": tmp_path / "b", **INT8}
    with pytest.raises(InputError, match="expected an engine out of"):
        export(engine="tvm", **made)
    with pytest.raises(InputError, match="expected --engine with --precision int8, fp8 or auto"):
        export(engine="openvino", **{**made, "precision": "fp16"})
    absent = SimpleNamespace(name="openvino", version=lambda: "1", devices=list)
    monkeypatch.setattr(timing, "backend", lambda name: absent)
    with pytest.raises(EngineError, match="expected a device that openvino can use"):
        export(engine="openvino", **made)
    absent.version = lambda: (_ for _ in ()).throw(MissingPackageError("not installed"))
    with pytest.raises(MissingPackageError):
        export(engine="openvino", **made)
    assert not any(tmp_path.iterdir())


def test_a_kind_says_when_it_is_slow() -> None:
    assert timing.Kind("Conv", [], (0.9, 0.8, 0.99)).slow and not timing.Kind("Conv", [], (0.9, 0.8, 1.01)).slow
    assert timing.Kind("Conv", [], (1.1, 1.05, 1.2)).saved == pytest.approx(0.1)
    assert timing.Kind("Conv", [], (1.1, 0.95, 1.2)).saved == timing.Kind("Conv", [], (0.9, 0.8, 0.99)).saved == 0.0
    ratios = np.full(50, 1.2) + np.random.default_rng(0).normal(0, 0.02, 50)
    assert not timing.Kind("Conv", [], latency.bootstrap_median(ratios)).slow
