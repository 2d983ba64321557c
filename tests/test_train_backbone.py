"""The training script: what autoguidance learns, and that it learns it; a DiT with labels, some of them left out."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT
from sklearn.datasets import load_digits

from mteo_deploy.exporters.base import load_backbone
from mteo_deploy.exporters.guidance import guided

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

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> SimpleNamespace:
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


DIT = "--architecture dit --size 8 --patch-size 2 --layers 2 --heads 2 --attention-head-dim 16"
QUICK = ["--iterations", "100", "--warmup", "10", "--lr", "0.004", "--batch", "32", "--threads", "1", "--no-autocast"]


def train_dit(directory: Path, *arguments: str, **arrays: Any) -> subprocess.CompletedProcess[str]:
    np.savez(directory / "data.npz", **arrays)
    command = [
        sys.executable,
        str(SCRIPT),
        str(directory / "data.npz"),
        "-o",
        str(directory / "run"),
        *DIT.split(),
        *QUICK,
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_dit_learns_labels(tmp_path: Path) -> None:
    """It starts from a loss of 1, that of predicting nothing; what it leaves is a pipeline that can be guided."""
    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    done = train_dit(tmp_path, images=images, labels=digits.target)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] < 0.85  # an average over the run, from 1 on
    adapter = load_backbone(tmp_path / "run" / "pipeline")
    assert adapter.family == "DiTTransformer2DModel" and adapter.requests[0].high == 11
    state = torch.randn(2, *adapter.sample_shape)
    with torch.no_grad():
        found = [adapter.at_timestep(state, 500.0, class_labels=torch.full((2,), label)) for label in (1, 10)]
    assert not torch.allclose(*found)
    assert guided(adapter, 2.0).requests[-1].default == 2.0


def test_dit_wants_labels(tmp_path: Path) -> None:
    done = train_dit(tmp_path, images=np.zeros((4, 8, 8), np.uint8), labels=np.zeros(3, np.int64))
    assert done.returncode == 1 and "an array labels or y, an integer from 0 on for each image" in done.stderr
    done = train_dit(tmp_path, "--size", "9", images=np.zeros((4, 9, 9), np.uint8))
    assert done.returncode == 2 and "--patch-size divides --size" in done.stderr


def test_labels_are_left_out_for_a_share(script: ModuleType) -> None:
    labels = torch.arange(10).repeat(1000)
    found = script.leave_out(labels, 10, 0.1, torch.Generator().manual_seed(0))
    left_out = found == 10
    assert 0.08 < left_out.float().mean() < 0.12
    assert torch.equal(found[~left_out], labels[~left_out])
    assert torch.equal(script.leave_out(labels, 10, 0.0, torch.Generator()), labels)


def test_dit_starts_as_nothing(script: ModuleType) -> None:
    """Its labels are left out by the script alone: in training the network itself is certain about them."""
    options = {"heads": 2, "attention_head_dim": 16, "channels": 1, "layers": 2, "size": 8, "patch_size": 2, "classes": 10}
    network = script.make_model(SimpleNamespace(architecture="dit", **options)).train()
    state, t, labels = torch.randn(64, 1, 8, 8), torch.full((64,), 300), torch.full((64,), 3)
    assert not network(state, timestep=t, class_labels=labels).sample.any()
    embedder = network.transformer_blocks[0].norm1.emb
    first, second = (embedder(t, labels, hidden_dtype=torch.float32) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first, first[:1].expand_as(first))
