"""How many processors a process may use, from control groups as containers show them, and that engines keep to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mteo_deploy import processors
from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.engines import onnxruntime

TREES: dict[str, tuple[str, dict[str, str], int]] = {
    "none": ("0::/", {}, 8),
    "v2, container": ("0::/", {"cpu.max": "300000 100000\n"}, 3),
    "v2, no limit": ("0::/", {"cpu.max": "max 100000\n"}, 8),
    "v2, own group": ("0::/pod/app", {"pod/app/cpu.max": "200000 100000\n"}, 2),
    "v2, group above": ("0::/pod/app", {"pod/app/cpu.max": "max 100000\n", "pod/cpu.max": "50000 10000\n"}, 5),
    "v2, path outside": ("0::/../../app", {"cpu.max": "200000 100000\n"}, 2),
    "v1, container": ("4:memory:/m\n2:cpu,cpuacct:/docker/x", {"cpu/cpu.cfs_quota_us": "400000\n"}, 4),
    "v1, own group": ("2:cpu:/q", {"cpu/q/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_quota_us": "-1\n"}, 1),
    "v1, no limit": ("2:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n"}, 8),
    "another controller's": ("4:cpuset:/q", {"cpu/q/cpu.cfs_quota_us": "100000\n"}, 8),
    "a share left out": ("0::/", {"cpu.max": "290000 100000\n"}, 2),
    "less than one": ("0::/", {"cpu.max": "20000 100000\n"}, 1),
    "more than there are": ("0::/", {"cpu.max": "9900000 100000\n"}, 8),
    "not a number": ("0::/", {"cpu.max": "many\n"}, 8),
}


@pytest.mark.parametrize("case", TREES)
def test_quotas(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, files, expected = TREES[case]
    (tmp_path / "own").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if name.endswith("quota_us"):
            path.with_name("cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr(processors, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(processors, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert processors.processors() == expected
    assert processors.fewer_processors() == (None if expected == 8 else expected)
    assert processors.in_words() == ("8 processors" if expected == 8 else f"{expected} of 8 processors")


def test_not_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "OWN_GROUPS", tmp_path / "none")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert processors.processors() == os.cpu_count() and processors.fewer_processors() is None


COUNT = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import backend

bundle, engine = Bundle.open(sys.argv[1]), backend("onnxruntime")
engine.version()
before = len(os.listdir("/proc/self/task"))
session = engine.open(bundle, bundle.step_graphs[0]["graph"], "cpu", eval(sys.argv[2]))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="needs Linux and two processors")
@pytest.mark.parametrize(("options", "workers"), [({}, 0), ({"threads": 3}, 2)], ids=["own", "asked"])
def test_threads_of_onnx_runtime(options: dict[str, Any], workers: int, tiny_bundle: Path) -> None:
    """On one processor it opens no worker threads beside the caller, unless it was asked for them."""
    environment = {name: value for name, value in os.environ.items() if name != onnxruntime.THREADS}
    command = [sys.executable, "-c", COUNT, str(tiny_bundle), repr(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(workers)), done.stderr


def test_the_variable_of_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is set the session names no number, or ONNX Runtime would not look at it."""
    monkeypatch.setattr(onnxruntime, "fewer_processors", lambda: 1)
    monkeypatch.setenv(onnxruntime.THREADS, "4")
    assert onnxruntime.session_options().intra_op_num_threads == 0
    assert onnxruntime.session_options(2).intra_op_num_threads == 2
    monkeypatch.delenv(onnxruntime.THREADS)
    assert onnxruntime.session_options().intra_op_num_threads == 1


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_threads_of_openvino(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was compiled for two threads runs with one where it may use one."""
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    from mteo_deploy.engines import openvino

    bundle, graph = Bundle.open(tiny_bundle), "graphs/step_00.onnx"

    def opened(options: dict[str, Any], built: Path | None = None) -> Any:
        sizes: Any = openvino.BACKEND.open(bundle, graph, "cpu", {"batch": [1], **options}, built)
        return sizes.sessions[1]

    def threads(session: Any) -> int:
        return int(session._compiled.get_property("INFERENCE_NUM_THREADS"))

    monkeypatch.setattr(openvino, "fewer_processors", lambda: 2)
    wide = opened({})
    wide.save(tmp_path, graph)
    monkeypatch.setattr(openvino, "fewer_processors", lambda: 1)
    narrow = opened({}, tmp_path)
    assert narrow._read is not None and (threads(wide), threads(narrow)) == (2, 1)
    assert threads(opened({"threads": 2})) == 2


@pytest.mark.parametrize(("set_to", "expected"), [(None, "1"), ("5", "5")])
def test_threads_of_torch(set_to: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verbs give torch, which counts a container's processors wrongly, their number; a number that is set stays."""
    monkeypatch.setenv("OMP_NUM_THREADS", set_to or "")
    if set_to is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("mteo_deploy.cli.fewer_processors", lambda: 1)
    assert CliRunner().invoke(main, ["cache", "--help"]).exit_code == 0
    assert os.environ["OMP_NUM_THREADS"] == expected


def test_doctor_and_reports_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # set back at the end
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(processors, "processors", lambda: 3)
    assert "this process may use 3 of 8 processors" in CliRunner().invoke(main, ["doctor"]).output
    monkeypatch.setattr(processors, "processors", lambda: 8)
    assert "may use" not in CliRunner().invoke(main, ["doctor"]).output
