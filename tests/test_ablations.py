"""The ablations' script on the small backbone: it measures what it says, goes on where it was, and refuses other arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import torch_states

from mteo_deploy.distillation import Recipe
from mteo_deploy.distillation.trajectories import Trajectories
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.exporters.base import Adapter

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BUDGET = ["--steps", "2", "--trajectories", "8", "--iterations", "2", "--batch", "4", "--held-out", "6"]
NAMES = ["per step and site (MTEO)", "iPNDM-2"]


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablations as module

    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ablations.py", *BUDGET, *arguments])
    module.main()


def test_variants_are_measured_against_the_defaults(
    ablations: ModuleType, tiny_model: Path, tiny_adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    common = ["-o", str(path), "--model", str(tiny_model)]
    run(ablations, monkeypatch, *common, "--variants", NAMES[0])
    first = json.loads(path.read_text())["rows"]
    monkeypatch.setattr(ablations, "distill", counted := Counted(ablations.distill))
    run(ablations, monkeypatch, *common, "--variants", *NAMES)
    rows = json.loads(path.read_text())["rows"]
    assert counted.calls == 1 and rows[0] == first[0]
    assert [row["variant"] for row in rows] == NAMES

    work = path.with_suffix("")
    held_out = [found for file in work.glob("traj*") if len((found := Trajectories.load(file)).noise) == 6]
    assert len(held_out) == 1
    sets = [EmbeddingSet.load(next(work.glob(f"{start}*-2-1.safetensors"))) for start in ("per-step", "iPNDM-2")]
    target = held_out[0].states[-1].numpy()
    errors = [
        np.square(torch_states(tiny_adapter, one, held_out[0].noise.numpy())[-1] - target).mean((1, 2, 3)) for one in sets
    ]
    for row, found in zip(rows, errors, strict=True):
        assert row["error"] == pytest.approx(float(found.mean()), rel=1e-4)
        assert row["error_se"] == pytest.approx(float(found.std(ddof=1) / np.sqrt(6)), rel=1e-3)
    assert rows[0]["difference"] == 0.0
    assert rows[1]["difference"] == pytest.approx(float((errors[1] - errors[0]).mean()), rel=1e-3, abs=1e-5)
    assert rows[1]["plain"]["error"] != rows[1]["error"]
    with pytest.raises(SystemExit, match="lr differ; pass another -o"):
        run(ablations, monkeypatch, *common, "--lr", "0.01")


def test_images_of_a_guided_backbone_are_of_their_labels(
    ablations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variants, plain solver and reference all draw the labels of the held-out noise: a classifier finds them again."""
    path, data = tmp_path / "a.json", tmp_path / "data.npz"
    np.savez(data, images=np.random.default_rng(0).integers(0, 256, (200, 28, 28), dtype=np.uint8))
    common = ["-o", str(path), "--model", "mnist-dit", "--guidance-scale", "2", "--variants", "absolute error", "--steps", "4"]
    common += ["--classifier", str(BENCHMARKS / "classifier.safetensors"), "--data", str(data)]
    run(ablations, monkeypatch, *common, "--held-out", "12")
    found = json.loads(path.read_text())
    (row,) = found["rows"]
    assert min(part["right"] for part in (row, row["plain"], found["reference"])) > 0.7, "the share of a guess is 0.1"
    with pytest.raises(SystemExit, match="guidance_scale differ"):
        run(ablations, monkeypatch, *common, "--held-out", "12", "--guidance-scale", "1")


class Counted:
    """A callable that counts its calls."""

    def __init__(self, function: object) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        assert callable(self.function)
        return self.function(*args, **kwargs)


def test_every_variant_is_a_recipe(ablations: ModuleType) -> None:
    """Each differs from the defaults, and from the others."""
    seen = []
    for variant in ablations.VARIANTS.values():
        plan, recipe = ablations.arranged(variant, Recipe(trajectories=64))
        seen.append((tuple(plan.items()), recipe))
    assert len(set(seen)) == len(seen) and seen[0] == ((), Recipe(trajectories=64))


def test_mean(ablations: ModuleType) -> None:
    assert ablations.mean("x", np.array([1.0, 2.0, 3.0])) == {"x": 2.0, "x_se": pytest.approx(1 / np.sqrt(3))}
