"""Several engines in one run: the whole gate for each, and one's images against another's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import Array, Faulty, altered, edit_json, failed

from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.comparison import COUNT, verify_engines
from mteo_deploy.engines import cache
from mteo_deploy.engines.base import Session
from mteo_deploy.engines.build import build
from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.report import Report
from mteo_deploy.sampler import Sampler

pytest.importorskip("openvino", reason="the extra openvino is not installed")

AGREE = "engines agree: onnxruntime-cpu fp32 and openvino-cpu fp32"
Fault = Callable[[Array, Mapping[str, Array]], Array]


@pytest.fixture(scope="module")
def both(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle built in both engines; a test that alters it copies it first."""
    path = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("both") / "bundle"))
    build(path, engine="openvino", realisation="baked", threads=1, quiet=True)
    return path


def planted(path: Path, engine: str, fault: Fault, precision: str = "fp32") -> Sampler:
    """A sampler of that engine whose last evaluation is faulty, and which claims a precision."""
    good = Sampler.load(path, engine=engine)
    assert good.built is not None
    parts = good.built.record["parts"]
    record = {**good.built.record, "parts": {**parts, "options": {**parts["options"], "precision": precision}}}

    def open_graph(graph: str) -> Session:
        session = good.open_graph(graph)
        return Faulty(session, fault) if graph == good.bundle.step_graphs[-1]["graph"] else session

    return Sampler(good.bundle, open_graph, built=replace(good.built, record=record))


def test_good_engines(both: Path, tmp_path: Path) -> None:
    found = verify_engines(both, seconds=0, quiet=True)
    assert found.passed and [report.engine for report in found.engines] == ["onnxruntime", "openvino"]
    assert all("evaluation 2" in {check.name for check in report.checks} for report in found.engines)
    assert [check.name for check in found.agreement.checks] == [AGREE]
    for name in ("r.json", "r.xml", "r.html"):
        found.save(tmp_path / "r" / name)
    data = json.loads((tmp_path / "r" / "r.json").read_text())
    assert data["passed"] and len(data["engines"]) == 2 and data["agreement"]["checks"][0]["name"] == AGREE
    suites = ElementTree.parse(tmp_path / "r" / "r.xml").getroot().findall("testsuite")
    assert len(suites) == 3 and suites[2].find("testcase").get("name") == AGREE  # type: ignore[union-attr]
    text = (tmp_path / "r" / "r.html").read_text()
    assert "in onnxruntime on cpu" in text and "in openvino on cpu" in text and AGREE in text


def test_right_on_what_is_stored_and_off_elsewhere(both: Path) -> None:
    """No check of the engine itself has this batch size; only the other engine notices."""
    samplers = [Sampler.load(both, engine="onnxruntime")]
    samplers += [planted(both, "openvino", lambda y, feeds: y * (1.01 if len(y) == COUNT else 1.0))]
    found = verify_engines(samplers, seconds=0, quiet=True)
    assert [failed(report) for report in found.engines] == [set(), set()]
    assert failed(found.agreement) == {AGREE} and not found.passed
    assert "most of it in image " in found.agreement.checks[0].detail


def test_one_engine_off(both: Path) -> None:
    samplers = [planted(both, "onnxruntime", lambda y, feeds: y * 1.01), Sampler.load(both, engine="openvino")]
    found = verify_engines(samplers, seconds=0, quiet=True)
    assert [failed(report) for report in found.engines] == [{"evaluation 2", "trajectory"}, set()]
    assert failed(found.agreement) == {AGREE}


def test_nan_in_one_engine(both: Path) -> None:
    samplers = [Sampler.load(both, engine="onnxruntime"), planted(both, "openvino", lambda y, feeds: y * np.nan)]
    assert failed(verify_engines(samplers, seconds=0, quiet=True).agreement) == {AGREE}


@pytest.mark.parametrize(("factor", "wrong"), [(1.01, False), (1.2, True)])
def test_the_coarser_precision_says_what_is_allowed(factor: float, wrong: bool, both: Path) -> None:
    samplers = [planted(both, "openvino", lambda y, feeds: y * factor, "bf16"), Sampler.load(both, engine="onnxruntime")]
    found = verify_engines(samplers, seconds=0, quiet=True)
    assert failed(found.agreement) == ({"engines agree: openvino-cpu bf16 and onnxruntime-cpu fp32"} if wrong else set())


def test_one_engine_has_nobody_to_agree_with(tiny_bundle: Path) -> None:
    found = verify_engines(tiny_bundle, seconds=0, quiet=True)
    assert found.passed and len(found.engines) == len(found.every) == 1


def test_engines_that_are_not_built(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"built engine of openvino .*--engine openvino"):
        verify_engines(tiny_bundle, engine="onnxruntime, openvino", seconds=0, quiet=True)
    with pytest.raises(InputError, match=r"expected an engine out of .*found 'torch'"):
        verify_engines(tiny_bundle, engine="onnxruntime,torch", seconds=0, quiet=True)
    with pytest.raises(BundleError, match="found none"):
        verify_engines(altered(tiny_bundle, tmp_path / "b"), seconds=0, quiet=True)
    with pytest.raises(InputError, match="one engine with --against"):
        verify_engines(tiny_bundle, older=Report("b", "onnxruntime", "cpu", "fp32", []), quiet=True)


def test_newest_of_each_precision(both: Path, tmp_path: Path) -> None:
    """Two builds of one engine, the older one with another option; a stale one does not count."""
    path = Path(shutil.copytree(both, tmp_path / "b"))
    newest = build(path, engine="onnxruntime", realisation="table", threads=2, quiet=True)
    for built in (path / "engines").iterdir():
        os.utime(built / "engine.json", (0, 0) if built != newest else None)
    found = cache.every(Bundle.open(path))
    assert [(one.backend.name, one.precision) for one in found] == [("onnxruntime", "fp32"), ("openvino", "fp32")]
    assert found[0].directory == newest
    edit_json(newest / "engine.json", lambda record: record["parts"]["options"].update(threads=3))
    assert cache.every(Bundle.open(path), ["onnxruntime"])[0].options["threads"] == 1


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_command(both: Path, tmp_path: Path) -> None:
    good = run("verify", both, "--engine", "all", "--seconds", 0, "-o", tmp_path / "r.json")
    assert good.exit_code == 0 and good.stdout.endswith("\nverified\n") and "openvino on cpu, fp32" in good.stdout
    assert json.loads((tmp_path / "r.json").read_text())["passed"]
    path = altered(both, tmp_path / "b", lambda manifest: manifest["reference"].update(seed=1))
    for engine in ("onnxruntime", "openvino"):
        build(path, engine=engine, realisation="baked", threads=1, quiet=True)
    bad = run("verify", path, "--engine", "openvino,onnxruntime", "--seconds", 0)
    assert bad.exit_code == 1 and bad.stdout.endswith("NOT verified: openvino noise, onnxruntime noise\n")
    as_json = run("verify", path, "--engine", "all", "--seconds", 0, "--json")
    assert as_json.exit_code == 1 and json.loads(as_json.stdout)["passed"] is False
    missing = run("verify", path, "--engine", "openvino,tensorrt", "--seconds", 0)
    assert missing.exit_code == 2 and "tensorrt" in missing.stderr and missing.stdout == ""
