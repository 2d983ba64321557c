"""The recipe for Polygraphy: another tool's comparator on a bundle's graph, with torch's inputs and outputs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

pytest.importorskip("polygraphy", reason="the extra dev is not installed")

ROOT = Path(__file__).parent.parent


def run(graph: Path, data: Path) -> subprocess.CompletedProcess[str]:
    given = ["--load-inputs", str(data / "inputs.json"), "--load-outputs", str(data / "torch.json")]
    command = [str(Path(sys.executable).with_name("polygraphy")), "run", str(graph), "--onnxrt", *given]
    return subprocess.run([*command, "--atol", "1e-3", "--rtol", "1e-3"], capture_output=True, text=True, check=False)


def test_second_opinion(tiny_history_bundle: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples" / "polygraphy_data.py"), str(tiny_history_bundle), "--evaluation", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*script, "-o", str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "state, history_1, history_2 -> next_state, kept" in done.stdout
    good = run(tiny_history_bundle / "graphs" / "step_02.onnx", tmp_path)
    assert good.returncode == 0 and "PASSED" in good.stdout, good.stdout
    shutil.copytree(tiny_history_bundle / "graphs", tmp_path / "graphs")
    model = onnx.load(tmp_path / "graphs" / "step_02.onnx")
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "conv_out.bias"]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 0.1, bias.name))
    onnx.save(model, tmp_path / "off.onnx")
    bad = run(tmp_path / "off.onnx", tmp_path)
    assert bad.returncode != 0 and "FAILED" in bad.stdout
