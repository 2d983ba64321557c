"""Options of engines: they reach the engine, enter the key, and what does not exist is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import altered, edit_json

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import BACKENDS, backend, cache, doctor
from mteo_deploy.engines.base import ON_OFF, Option
from mteo_deploy.engines.build import build
from mteo_deploy.engines.onnxruntime import BACKEND as ONNXRUNTIME
from mteo_deploy.engines.options import read
from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.sampler import Sampler

QUICK: dict[str, Any] = {"realisation": "fused", "threads": 1, "seconds": 0.05, "quiet": True}
GRAPH = "graphs/step_00.onnx"


def record(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "engine.json").read_text())
    return found


@pytest.mark.parametrize(
    ("values", "given", "meant"),
    [
        (ON_OFF, "on", "on"),
        (ON_OFF, True, "on"),
        (ON_OFF, False, "off"),
        (ON_OFF, "yes", None),
        (ON_OFF, "", None),
        (range(6), "5", 5),
        (range(6), 0, 0),
        (range(6), 6, None),
        (range(6), "-1", None),
        (range(6), "two", None),
        (range(6), True, None),
        (Path, "timing.cache", "timing.cache"),
        (Path, Path("a/b"), "a/b"),
        (Path, "", None),
    ],
)
def test_values(values: Any, given: object, meant: object) -> None:
    assert Option("", values).read(given) == meant


@pytest.mark.parametrize("name", BACKENDS)
def test_declarations(name: str) -> None:
    """Every default is a value, and every option says what it does in one line."""
    for option in backend(name).engine_options.values():
        assert option.default is None or option.read(option.default) == option.default
        assert option.help and "\n" not in option.help and len(option.help) < 100


def test_doctor_lists_them() -> None:
    for entry in doctor():
        assert list(entry["options"]) == list(backend(entry["engine"]).engine_options)
    (onnxruntime,) = (entry for entry in doctor() if entry["engine"] == "onnxruntime")
    assert onnxruntime["options"]["spinning"]["takes"] == "off or run or always"


def test_refusals(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"those of onnxruntime \(spinning, prepacking, .*nhwc\); found 'colour'$"):
        build(tiny_bundle, engine="onnxruntime", engine_options={"colour": "red"}, quiet=True)
    with pytest.raises(InputError, match=r"found 'streams', an option of openvino$"):
        build(tiny_bundle, engine="onnxruntime", engine_options={"streams": 2}, quiet=True)
    with pytest.raises(InputError, match="option spinning=off or run or always for onnxruntime; found 'maybe'"):
        build(tiny_bundle, engine="onnxruntime", engine_options={"spinning": "maybe"}, quiet=True)


def test_every_engine_tried_must_have_it() -> None:
    targets = [backend("onnxruntime"), backend("openvino")]
    with pytest.raises(InputError, match=r"all engines tried have \(onnxruntime, openvino\); found hint, which onnxruntime"):
        read(targets, {"hint": "throughput"})
    with pytest.raises(InputError, match="spinning, which openvino has not; run again with --engine onnxruntime"):
        read(targets, {"spinning": "off"})
    with pytest.raises(InputError, match=r"found 'colour'$"):
        read(targets, {"colour": "red"})


@pytest.mark.parametrize(
    ("given", "entries", "level"),
    [
        (
            {},
            {"session.force_spinning_stop": "1", "session.disable_prepacking": "0", "session.use_env_allocators": "1"},
            "ORT_ENABLE_ALL",
        ),
        ({"spinning": "off"}, {"session.intra_op.allow_spinning": "0"}, "ORT_ENABLE_ALL"),
        ({"prepacking": "off", "optimization": "basic"}, {"session.disable_prepacking": "1"}, "ORT_ENABLE_BASIC"),
        ({"arena": "own"}, {"session.disable_prepacking": "0"}, "ORT_ENABLE_ALL"),
    ],
)
def test_onnxruntime_gets_them(given: dict[str, str], entries: dict[str, str], level: str, tiny_bundle: Path) -> None:
    session = ONNXRUNTIME.open(Bundle.open(tiny_bundle), GRAPH, "cpu", {"threads": 1, "engine_options": given})
    settings = session._session.get_session_options()
    assert {key: settings.get_session_config_entry(key) for key in entries} == entries
    assert settings.graph_optimization_level.name == level
    if given.get("spinning") == "off":
        with pytest.raises(RuntimeError, match="force_spinning_stop"):
            settings.get_session_config_entry("session.force_spinning_stop")
    if given.get("arena") == "own":
        with pytest.raises(RuntimeError, match="use_env_allocators"):
            settings.get_session_config_entry("session.use_env_allocators")


def _compiled(session: Any) -> Any:
    """OpenVINO's graph for one image."""
    return session._sessions[1]._compiled


def test_openvino_gets_them(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")

    def properties(**given: object) -> tuple[str, int, bool]:
        options = {"engine_options": read([backend("openvino")], given)}
        compiled = _compiled(backend("openvino").open(Bundle.open(tiny_bundle), GRAPH, "cpu", options))
        hint, streams = compiled.get_property("PERFORMANCE_HINT"), compiled.get_property("NUM_STREAMS")
        return str(hint).rsplit(".", 1)[-1], int(streams), compiled.get_property("ENABLE_CPU_PINNING")

    assert properties()[:2] == ("LATENCY", 1)
    assert properties(hint="throughput")[0] == "THROUGHPUT"
    assert properties(hint="throughput", streams=2)[1] == 2
    assert {properties(pinning=value)[2] for value in ("on", "off")} == {True, False}


def test_they_are_in_the_key_and_the_record(bundle_copy: Path) -> None:
    first = build(bundle_copy, engine="onnxruntime", engine_options={"spinning": "off"}, **QUICK)
    assert record(first)["parts"]["options"]["engine_options"] == {"spinning": "off"}
    assert record(first)["missed"]["changed"] == ["spinning changed not given -> off"]
    again = build(bundle_copy, engine="onnxruntime", engine_options={"spinning": "off"}, **QUICK)
    assert again == first and record(again)["missed"] is None
    other = build(bundle_copy, engine="onnxruntime", batch=[1, 8], **QUICK)
    assert other != first
    assert record(other)["missed"] == {
        "name": first.name,
        "changed": ["batch changed not given -> 1,8", "spinning changed off -> not given"],
    }
    last = build(bundle_copy, engine="onnxruntime", batch=[8, 1], **(QUICK | {"threads": 2}))
    assert record(last)["missed"]["changed"] == ["threads changed 1 -> 2", "batch changed 1,8 -> 8,1"]
    assert Sampler.load(bundle_copy).built.options["threads"] == 2  # type: ignore[union-attr]


def test_a_stale_one_is_built_again_with_its_options(bundle_copy: Path) -> None:
    directory = build(bundle_copy, engine="onnxruntime", batch=[2, 1], engine_options={"prepacking": "off"}, **QUICK)
    edit_json(directory / "engine.json", lambda found: found["parts"].update(engine_version="0.1"))
    for path in bundle_copy.glob("engines/*"):
        if path != directory:
            (path / "engine.json").unlink()
    with pytest.raises(BundleError, match=r"build \S+ --engine onnxruntime --threads 1 --batch 2,1 --option prepacking=off$"):
        Sampler.load(bundle_copy, engine="onnxruntime")
    with pytest.raises(BundleError, match=r"build \S+ --threads 1 --batch 2,1 --engine onnxruntime --option prepacking=off$"):
        Sampler.load(bundle_copy)


def test_an_option_that_went_is_named(bundle_copy: Path) -> None:
    directory = build(bundle_copy, engine="onnxruntime", engine_options={"prepacking": "off"}, **QUICK)
    edit_json(directory / "engine.json", lambda found: found["parts"]["options"].update(engine_options={"colour": "red"}))
    with pytest.raises(BundleError, match="found 'colour', as another version of mteo-deploy has"):
        cache.check(Bundle.open(bundle_copy), directory / "engine.json")
    edit_json(directory / "engine.json", lambda found: found["parts"]["options"].update(engine_options="red"))
    with pytest.raises(BundleError, match=r"engine\.json cannot be read"):
        cache.check(Bundle.open(bundle_copy), directory / "engine.json")


def test_openvino_opens_a_stored_graph_only_with_its_options(tiny_bundle: Path, tmp_path: Path) -> None:
    """What is stored is opened with the settings of its record; other settings are another built engine."""
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    path = altered(tiny_bundle, tmp_path / "bundle")
    quick = QUICK | {"threads": 2}  # one thread is one stream
    first = build(path, engine="openvino", engine_options={"hint": "throughput", "streams": 2}, **quick)
    second = build(path, engine="openvino", **quick)
    assert first != second and record(second)["missed"]["changed"] == [
        "hint changed throughput -> not given",
        "streams changed 2 -> not given",
    ]
    streams = []
    for directory in (first, second):
        built = cache.check(Bundle.open(path), directory / "engine.json")
        session = built.backend.open(Bundle.open(path), "graphs/fused.onnx", "cpu", built.options, directory)
        streams.append(int(_compiled(session).get_property("NUM_STREAMS")))
    assert streams == [2, 1]
    edit_json(second / "engine.json", lambda found: found["parts"]["options"].update(engine_options={"streams": 2}))
    with pytest.raises(BundleError, match="moved from another key"):
        cache.check(Bundle.open(path), second / "engine.json")
