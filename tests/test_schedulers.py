"""Our plans against diffusers' schedulers of the same name, on a real backbone; what a scheduler's configuration means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import relative

from mteo_deploy import plan as plans
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.schedulers import noise_levels, scheduler_points
from mteo_deploy.plan import Plan, compile_plan
from mteo_deploy.schedules import EDMLevels, FlowLevels, NoiseLevels
from mteo_deploy.verification import verify

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers with numpy 2.4

PURE = {"lower_order_final": False}
"""Multistep schedulers of diffusers may lower their order in the last steps; ours do so only for a step to zero."""

EXPLODING = ("Euler", "Heun", "KDPM2", "EDM")
"""Their samples are ``x0 + sigma noise``; the others' have unit variance, or are flow matching's."""

SAME: list[tuple[str, dict[str, Any], str]] = [
    ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}, "euler"),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}, "ddim"),
    ("EulerDiscreteScheduler", {}, "euler"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler"),
    ("HeunDiscreteScheduler", {}, "heun"),
    ("KDPM2DiscreteScheduler", {}, "dpm-solver-2"),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, **PURE}, "dpmpp-2m"),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "sigma_min", **PURE}, "dpmpp-2m"),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, **PURE}, "dpmpp-3m"),
    ("UniPCMultistepScheduler", {"solver_order": 2}, "unipc"),
    ("UniPCMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min", **PURE}, "unipc-3"),
    (
        "UniPCMultistepScheduler",
        {"solver_order": 2, "solver_type": "bh1", "final_sigmas_type": "sigma_min", **PURE},
        "unipc-2-bh1",
    ),
    (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min", **PURE},
        "unipc-3-bh1",
    ),
    ("DEISMultistepScheduler", {"solver_order": 2, **PURE}, "deis-log-2"),
    ("DEISMultistepScheduler", {"solver_order": 3, **PURE}, "deis-log-3"),
    ("EDMEulerScheduler", {}, "euler"),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 2, **PURE}, "dpmpp-2m"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "euler"),
    ("FlowMatchHeunDiscreteScheduler", {}, "heun"),
]


def config_of(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {**getattr(diffusers, name)(**settings).config, "_class_name": name}


def compiled(config: dict[str, Any], steps: int, solver: str) -> Plan:
    levels, prediction_type = noise_levels(config)
    points = scheduler_points(config, steps)
    return compile_plan(
        levels, steps=steps, solver=solver, prediction_type=prediction_type, schedule="scheduler", points=points
    )


@torch.no_grad()
def by_diffusers(config: dict[str, Any], steps: int, noise: torch.Tensor, network: Adapter) -> torch.Tensor:
    """diffusers' own loop, as its pipelines run it."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    sample = noise
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(network.at_timestep(scaled, float(t)), t, sample).prev_sample
    return sample


@pytest.mark.parametrize("steps", [4, 5])
@pytest.mark.parametrize(("name", "settings", "solver"), SAME)
def test_images_are_those_of_diffusers(
    name: str, settings: dict[str, Any], solver: str, steps: int, tiny_adapter: Adapter
) -> None:
    config = config_of(name, settings)
    plan = compiled(config, steps, solver)
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal((4, *tiny_adapter.sample_shape)).astype(np.float32))
    with torch.no_grad():
        found = plans.run(plan, noise, lambda i, y: tiny_adapter.at_timestep(y, plan.evaluations[i].timestep))[-1]
    first = noise * (plan.sigmas[0] if name.startswith(EXPLODING) else plan.initial_scale)
    expected = by_diffusers(config, steps, first, tiny_adapter)
    assert relative(found.numpy(), expected.numpy()) < 1e-4


def test_ipndm_is_diffusers_on_its_grid() -> None:
    """diffusers' iPNDM works in angles and begins where no signal is left; on a grid of our own it takes the same steps."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(6)
    sigmas = np.array([20.0, 6.0, 2.5, 1.2, 0.5, 0.2, 0.05])
    scheduler.alphas, scheduler.betas = torch.tensor(1 / np.hypot(1, sigmas)), torch.tensor(sigmas / np.hypot(1, sigmas))
    levels, _ = noise_levels(config_of("DDPMScheduler", {}))
    plan = compile_plan(levels, steps=6, solver="ipndm-4", prediction_type="v_prediction", points=sigmas.tolist())
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal((4, 3)))
    sample = noise * plan.initial_scale
    for i, t in enumerate(scheduler.timesteps):
        sample = scheduler.step(torch.tanh(sample + plan.evaluations[i].sigma), t, sample).prev_sample
    found = plans.run(plan, noise, lambda i, y: torch.tanh(y + plan.evaluations[i].sigma))[-1]
    assert relative(found.numpy(), sample.numpy() * np.hypot(1, sigmas[-1])) < 1e-10


def with_scheduler(model: Path, target: Path, config: dict[str, Any]) -> Path:
    """A copy of a pipeline directory with another scheduler's configuration: the network is taken for one of that kind."""
    shutil.copytree(model, target)
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("name", "settings", "solver", "schedule"),
    [
        ("DDIMScheduler", {"prediction_type": "v_prediction"}, "unipc-2", "time-uniform"),
        ("EDMEulerScheduler", {}, "deis-3", None),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "heun", None),
        ("EulerDiscreteScheduler", {"prediction_type": "sample"}, "dpmpp-3m", "scheduler"),
    ],
)
def test_engine_is_torch(
    name: str, settings: dict[str, Any], solver: str, schedule: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    """Exported, built and verified: every evaluation and the whole trajectory against torch."""
    model = with_scheduler(tiny_model, tmp_path / "model", config_of(name, settings))
    options: dict[str, Any] = {"steps": 4, "solver": solver, "schedule": schedule, "plain": True}
    bundle = export(tmp_path / "bundle", model=model, realisations=["baked"], quiet=True, **options)
    build(bundle, engine="onnxruntime", threads=1, quiet=True)
    report = verify(bundle.path, seconds=0, quiet=True)
    assert {c.name for c in report.checks if not c.passed} <= {"not flat", "seed matters", "images differ"}  # no such network
    assert (bundle.plan.sigmas[-1] == 0) == (schedule == "scheduler" or name.startswith("Flow"))


def test_distill_for_flow_matching(tiny_model: Path, tmp_path: Path) -> None:
    model = with_scheduler(tiny_model, tmp_path / "model", config_of("FlowMatchEulerDiscreteScheduler", {}))
    recipe = Recipe(trajectories=32, iterations=20, batch=16, teacher_evaluations=18)
    found = distill(model, tmp_path / "flow.safetensors", steps=3, recipe=recipe, quiet=True)
    assert found.plan.prediction_type == "flow_prediction" and found.plan.schedule == "time-uniform"
    assert found.training["error_after"] < 0.9 * found.training["error_before"]


def test_schedule_belongs_to_plain(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--schedule with --plain"):
        export(tmp_path / "bundle", steps=4, schedule="logsnr", quiet=True)


def test_what_configurations_mean() -> None:
    levels, prediction_type = noise_levels(config_of("EDMEulerScheduler", {"sigma_data": 1.5, "sigma_max": 40.0}))
    assert (levels, prediction_type) == (EDMLevels(0.002, 40.0, 1.5), "edm")
    levels, prediction_type = noise_levels(config_of("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}))
    assert (levels, prediction_type) == (FlowLevels(3.0, 1000.0), "flow_prediction")
    levels, prediction_type = noise_levels(config_of("DDIMScheduler", {"prediction_type": "v_prediction"}))
    assert prediction_type == "v_prediction" and levels.default_schedule == "polynomial"


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1000, 4096, 6000])
def test_dynamic_shift_is_that_of_the_size(tokens: int, kind: str) -> None:
    """At one size it is a fixed shift: the default schedule is FLUX's pipeline's, ``scheduler`` is SD3's."""
    config = config_of("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "time_shift_type": kind})
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    slope = (1.15 - 0.5) / (4096 - 256)
    mu = tokens * slope + 0.5 - 256 * slope  # the pipelines' calculate_shift
    levels, prediction_type = noise_levels(config, tokens)
    for steps in (1, 4):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        found = compile_plan(levels, steps=steps, solver="euler", prediction_type=prediction_type)
        np.testing.assert_allclose(found.sigmas, scheduler.sigmas.numpy(), rtol=1e-6)
        np.testing.assert_allclose([e.timestep for e in found.evaluations], scheduler.timesteps.numpy(), rtol=1e-6)
        scheduler.set_timesteps(steps, mu=mu)
        np.testing.assert_allclose(scheduler_points(config, steps, tokens), scheduler.sigmas.numpy(), rtol=1e-6)
    assert noise_levels(config) == noise_levels(config, 4096)


@pytest.mark.parametrize(
    ("config", "steps", "named"),
    [
        ({"_class_name": "DreamScheduler"}, 4, "'DreamScheduler'; name in"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "sideways"}, 4, "'sideways'; change it"),
        ({"_class_name": "DDIMScheduler"}, 0, "0 steps; pass another"),
    ],
)
def test_scheduler_without_time_points(config: dict[str, Any], steps: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        scheduler_points(config, steps)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
        {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
        {"beta_schedule": "staircase"},
    ],
)
def test_configurations_that_are_not_supported(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        noise_levels(config)


def test_noise_levels_of_the_pipelines() -> None:
    """Sana's multistep scheduler is flow matching; CogVideoX's shifts its signal-to-noise ratio and may end in noise alone."""
    flow = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    name = {"_class_name": "DPMSolverMultistepScheduler"}
    assert noise_levels({**flow.config, **name}) == (FlowLevels(3.0), "flow_prediction")
    with pytest.raises(InputError, match=r"use_flow_sigmas of DPMSolver.*; found False with flow_prediction"):
        noise_levels({**flow.config, **name, "use_flow_sigmas": False})
    video = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0)
    levels, kind = noise_levels({**video.config, "_class_name": "CogVideoXDDIMScheduler"})
    abar = video.alphas_cumprod.double().numpy()
    assert kind == "v_prediction" and abar[-1] == 0 and isinstance(levels, NoiseLevels)
    np.testing.assert_allclose(levels.sigma[:-1], np.sqrt((1 - abar) / abar.clip(1e-9))[:-1])
    assert levels.sigma[-1] == np.sqrt(2.0**24 - 1)
