"""Engines send nothing and leave nothing in the user's home, and need none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import altered

from mteo_deploy import telemetry

SAMPLE = """
import os, sys
from mteo_deploy import build, Sampler
path, engine = sys.argv[1:]
before = dict(os.environ)
build(path, engine=engine, realisation="fused", threads=1, seconds=0.1, quiet=True)
with Sampler.load(path, engine=engine) as sampler:
    assert sampler(num=1).shape == (1, 1, 8, 8)
assert dict(os.environ) == before
assert "openvino_telemetry" not in sys.modules
"""
NO_HOME = """
import os, pwd
os.environ.pop("HOME", None)
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
import pathlib
try:
    pathlib.Path.home()
except RuntimeError:
    pass
else:
    raise AssertionError("there is a home")
"""
ON_CI = ("CI", "TF_BUILD", "JENKINS_URL", "GITHUB_ACTIONS")
"""Where one of these is set the engines send nothing by themselves."""


def python(code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in (*ON_CI, telemetry.ONNXRUNTIME, telemetry.LEAVE)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**kept, **variables})


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_nothing_is_kept_in_the_home(engine: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime 1.32 would leave an identifier and a database there, OpenVINO 2026 an identifier, both when imported."""
    pytest.importorskip(engine, reason=f"the engine {engine} is not installed")
    path, home = altered(tiny_bundle, tmp_path / "bundle"), tmp_path / "home"
    home.mkdir()
    places = {"HOME": home, "XDG_CACHE_HOME": home / "cache", "XDG_CONFIG_HOME": home / "config", "TMPDIR": home}
    done = python(SAMPLE, path, engine, **{name: str(value) for name, value in places.items()})
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_no_home_and_an_unknown_user(engine: str, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip(engine, reason=f"the engine {engine} is not installed")
    pytest.importorskip("pwd", reason="no such users here")
    done = python(NO_HOME + SAMPLE, altered(tiny_bundle, tmp_path / "bundle"), engine)
    assert done.returncode == 0, done.stderr


def test_no_home_where_the_engine_looks_for_it() -> None:
    pytest.importorskip("openvino_telemetry", reason="the extra openvino is not installed")
    pytest.importorskip("pwd", reason="no such users here")
    code = NO_HOME + "from mteo_deploy.engines import backend; backend('openvino').version()"
    done = python(code, **{telemetry.LEAVE: "1"})
    assert done.stderr.splitlines()[-1].endswith(f"Could not determine home directory.; set HOME, or unset {telemetry.LEAVE}")


def test_who_decides() -> None:
    """The package does, unless the user gave ONNX Runtime's own variable or left everything to the engines."""
    code = f"import os, json, mteo_deploy; print(json.dumps(os.environ.get({telemetry.ONNXRUNTIME!r})))"
    assert json.loads(python(code).stdout) == "1"
    assert json.loads(python(code, **{telemetry.ONNXRUNTIME: "0"}).stdout) == "0"
    assert json.loads(python(code, **{telemetry.LEAVE: "1"}).stdout) is None


def test_doctor_says_so() -> None:
    pytest.importorskip("onnxruntime", reason="the extra cpu is not installed")
    code = "import json; from mteo_deploy.engines import doctor; print(json.dumps(doctor()))"
    for variables, expected in (({}, "off"), ({telemetry.ONNXRUNTIME: "0"}, "left to the engine")):
        found = {entry["engine"]: entry.get("usage_events") for entry in json.loads(python(code, **variables).stdout)}
        assert (found["onnxruntime"], found["tensorrt"]) == (expected, None)
