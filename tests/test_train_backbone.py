"""The training script: what autoguidance learns, and that it learns it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import MODEL, ROOT

SCRIPT = ROOT / "examples" / "train_backbone.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = spec_from_file_location("train_backbone", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Constant(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.full_like(x, self.value))


@pytest.mark.parametrize(("guidance", "expected"), [(0.0, 1.0), (1.0, 3.0), (2.5, 6.0)])
def test_autoguidance(guidance: float, expected: float, script: ModuleType) -> None:
    guided = script.Guided(Constant(3.0), Constant(1.0), guidance, (200, 900))
    assert guided(torch.zeros(2, 1, 4, 4), torch.tensor([200, 900])).unique().tolist() == [expected]
    assert guided(torch.zeros(2, 1, 4, 4), torch.tensor([199, 901])).unique().tolist() == [3.0]


def train(model: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    data = model.parents[1] / "digits.npz"
    command = [
        sys.executable,
        str(SCRIPT),
        str(data),
        "-o",
        str(output),
        *MODEL.split(),
        "--iterations",
        "100",
        "--batch",
        "8",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("guide", "lowest", "highest"), [(True, 0.0, 1e-9), (False, 1e-3, 1.0)])
def test_guided_by_itself_has_nothing_to_learn(
    guide: bool, lowest: float, highest: float, tiny_model: Path, tmp_path: Path
) -> None:
    """Away from itself is nowhere: the loss is that of rounding; without a guide it is that of the noise."""
    arguments = ["--init", str(tiny_model), "--no-autocast", "--lr", "0", *(["--guide", str(tiny_model)] if guide else [])]
    done = train(tiny_model, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lowest <= json.loads(line)["loss"] < highest


def test_guide_wants_init(tiny_model: Path, tmp_path: Path) -> None:
    done = train(tiny_model, tmp_path, "--guide", str(tiny_model))
    assert done.returncode == 2 and "--init" in done.stderr
