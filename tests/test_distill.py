"""Distillation: it lowers the error, leaves the backbone alone, and an interrupted run ends where it would have."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mteo_deploy.distillation import Recipe, distill, run, training
from mteo_deploy.distillation.trajectories import reference_trajectories
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.plan import compile_plan
from mteo_deploy.sampler import noise_for

QUICK = Recipe(trajectories=32, iterations=8, batch=16, teacher_evaluations=12)


def same(a: EmbeddingSet, b: EmbeddingSet) -> bool:
    return a.deltas.keys() == b.deltas.keys() and all(np.array_equal(a.deltas[name], b.deltas[name]) for name in a.deltas)


def test_error_falls(learned: EmbeddingSet) -> None:
    assert 0 < learned.training["error_after"] < 0.7 * learned.training["error_before"]


def test_report(learned: EmbeddingSet, tiny_adapter: Adapter) -> None:
    training = learned.training
    assert training["parameters"] == learned.parameters == 3 * sum(site.width for site in tiny_adapter.sites)
    assert training["share_of_backbone"] == pytest.approx(learned.parameters / tiny_adapter.parameter_count, rel=1e-12)
    assert training["reference"]["solver"] == "heun"
    assert training["reference"]["evaluations"] == 2 * 3 * 4
    assert training["recipe"]["iterations"] == 40
    assert training["seconds"] > 0
    assert learned.backbone == tiny_adapter.fingerprint()


def test_backbone_is_left_alone(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = load_backbone(tiny_model)
    before = {name: value.clone() for name, value in adapter.network.state_dict().items()}
    monkeypatch.setattr(run, "load_backbone", lambda path: adapter)
    result = distill(tiny_model, tmp_path / "e.safetensors", steps=2, recipe=QUICK, quiet=True)
    assert max(float(np.abs(delta).max()) for delta in result.deltas.values()) > 0.01
    for name, value in adapter.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in adapter.parameters())


def test_reference_trajectory_is_near_a_finer_one(tiny_adapter: Adapter) -> None:
    """Heun is of order 2: halving the substeps' length cuts the distance to the finest by about 4, at least by 2."""
    plan = compile_plan(tiny_adapter.levels, steps=2)
    ends = [
        reference_trajectories(
            tiny_adapter, plan, count=4, seed=3, batch=4, substeps=substeps, progress=lambda n: None
        ).states.numpy()
        for substeps in (8, 16, 64)
    ]
    coarse, fine = (float(np.linalg.norm(end - ends[-1])) for end in ends[:2])
    assert fine < coarse / 2 and fine < 0.2 * float(np.linalg.norm(ends[-1]))


def test_reference_trajectory_does_not_depend_on_batch(tiny_adapter: Adapter) -> None:
    plan = compile_plan(tiny_adapter.levels, steps=3)
    counts: list[int] = []
    found = [
        reference_trajectories(tiny_adapter, plan, count=5, seed=7, batch=batch, substeps=2, progress=counts.append)
        for batch in (2, 5)
    ]
    assert counts == [2, 2, 1, 5]
    assert found[0].states.shape == (3, 5, *tiny_adapter.sample_shape)
    np.testing.assert_array_equal(found[0].noise.numpy(), noise_for(tiny_adapter.sample_shape, 7, range(5)))
    torch.testing.assert_close(found[0].states, found[1].states, rtol=1e-4, atol=1e-5)


class Interrupt:
    """Stands in for the loss: counts its calls and raises KeyboardInterrupt at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.calls, self.at, self.loss = 0, at, training.objective

    def __call__(self, *args: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.loss(*args)


def checkpoint_every_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(step=31)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


@pytest.mark.parametrize("options", [{}, {"share": "time", "learn": ("points", "coefficients")}], ids=["vectors", "numbers"])
def test_resumed_run_is_the_uninterrupted_run(
    options: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(QUICK, **options)
    whole = distill(tiny_model, tmp_path / "whole.safetensors", steps=2, recipe=recipe, quiet=True)
    path = tmp_path / "cut.safetensors"
    with monkeypatch.context() as patch:
        checkpoint_every_iteration(patch)
        patch.setattr(training, "objective", Interrupt(at=6))
        with pytest.raises(KeyboardInterrupt):
            distill(tiny_model, path, steps=2, recipe=recipe, quiet=True)
    checkpoint = path.with_suffix(".checkpoint.safetensors")
    with safe_open(checkpoint, "pt") as file:
        assert file.metadata()["iteration"] == "5"
    assert not path.exists()
    rest = Interrupt()
    monkeypatch.setattr(training, "objective", rest)
    resumed = distill(tiny_model, path, steps=2, recipe=recipe, quiet=True)
    assert rest.calls == QUICK.iterations - 5
    assert same(resumed, whole) and resumed.training["error_after"] == whole.training["error_after"]
    assert not checkpoint.exists()
    assert same(EmbeddingSet.load(path), whole) and resumed.plan == whole.plan


@pytest.mark.parametrize("options", [{"lr": 0.01}, {"loss": "squared"}, {"learn": ("points",)}], ids=str)
def test_checkpoint_of_other_arguments_is_not_used(
    options: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "e.safetensors", replace(QUICK, **options)
    with monkeypatch.context() as patch:
        checkpoint_every_iteration(patch)
        patch.setattr(training, "objective", Interrupt(at=4))
        with pytest.raises(KeyboardInterrupt):
            distill(tiny_model, path, steps=2, recipe=QUICK, quiet=True)
    counted = Interrupt()
    monkeypatch.setattr(training, "objective", counted)
    distill(tiny_model, path, steps=2, recipe=other, quiet=True)
    assert counted.calls == other.iterations


def test_loss_not_finite(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    with pytest.raises(InputError, match=r"loss is (nan|inf) at iteration 1; lower --lr \(now 1e\+37\)"):
        distill(tiny_model, path, steps=2, recipe=replace(QUICK, lr=1e37), quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["iterations", "trajectories", "batch"])
@pytest.mark.parametrize("value", [0, -1])
def test_recipe_out_of_range(field: str, value: int, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1 trajectory, iteration and batch"):
        distill(tiny_model, tmp_path / "e.safetensors", steps=2, recipe=replace(QUICK, **{field: value}), quiet=True)


@pytest.mark.parametrize("lr", [0.0, -0.1, math.nan, math.inf])
def test_learning_rate_out_of_range(lr: float, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="learning rate above 0"):
        distill(tiny_model, tmp_path / "e.safetensors", steps=2, recipe=replace(QUICK, lr=lr), quiet=True)


def test_bad_arguments(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ending in \.safetensors; found .*e\.bin"):
        distill(tiny_model, tmp_path / "e.bin", steps=2, recipe=QUICK, quiet=True)
    with pytest.raises(InputError, match="--steps 4"):
        distill(tiny_model, tmp_path / "e.safetensors", steps=0, recipe=QUICK, quiet=True)
    with pytest.raises(InputError, match=r"expected a diffusers pipeline directory.*found nothing"):
        distill(tmp_path / "nowhere", tmp_path / "e.safetensors", steps=2, recipe=QUICK, quiet=True)
    assert list(tmp_path.iterdir()) == []
