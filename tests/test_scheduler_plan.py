"""``--solver scheduler``: plans against the diffusers schedulers that they are made of, and what is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import redraw
from helpers import edit_json, relative

from mteo_deploy import plan as plans
from mteo_deploy.cli import main
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import load_backbone
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.scheduler_options import DISCRETE, EDM, FLOW, OPTIONS, REFUSED, left_out, taken
from mteo_deploy.exporters.scheduler_plan import scheduler_plan
from mteo_deploy.exporters.schedulers import noise_levels, scheduler_points
from mteo_deploy.plan import Plan
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.schedules import EDMLevels, FlowLevels, NoiseLevels

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers with numpy 2.4
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers on algorithm_type dpmsolver
]

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
V = {"prediction_type": "v_prediction"}
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SD1 = {**SD, **LEADING, "skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False, "trained_betas": None}
"""PNDM as Stable Diffusion 1's repositories have it."""

TABLE: list[tuple[str, dict[str, Any], int]] = [
    ("CogVideoXDDIMScheduler", {**V, **TRAILING, "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}, 0),
    ("DDIMScheduler", {**SD, **LEADING, "clip_sample": False, "set_alpha_to_one": False}, 0),
    ("DDIMScheduler", {**TRAILING, **V, "clip_sample": False, "rescale_betas_zero_snr": True}, 0),
    ("DDIMScheduler", {"timestep_spacing": "linspace", "prediction_type": "sample", "clip_sample": False}, 0),
    ("DDIMParallelScheduler", {"clip_sample": False}, 0),
    ("PNDMScheduler", SD1, 4),
    ("PNDMScheduler", {**SD1, "set_alpha_to_one": True, **V}, 4),
    ("PNDMScheduler", {**SD, "skip_prk_steps": False}, 12),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True}, 4),
    ("EulerDiscreteScheduler", {**SD, **LEADING}, 0),
    ("EulerDiscreteScheduler", {**SD, **V, "use_karras_sigmas": True}, 0),
    ("EulerDiscreteScheduler", {**SD, "use_exponential_sigmas": True, "prediction_type": "sample"}, 0),
    ("EulerDiscreteScheduler", {**SD, "use_beta_sigmas": True, "final_sigmas_type": "sigma_min"}, 0),
    ("EulerDiscreteScheduler", {**SD, "interpolation_type": "log_linear"}, 0),
    (
        "EulerDiscreteScheduler",
        {**V, "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 70.0, "use_karras_sigmas": True},
        0,
    ),
    ("LMSDiscreteScheduler", SD, 3),
    ("HeunDiscreteScheduler", {**SD, **V}, 1),
    ("HeunDiscreteScheduler", {**SD, "use_karras_sigmas": True}, 1),
    ("KDPM2DiscreteScheduler", SD, 1),
    ("DPMSolverMultistepScheduler", SD, 1),
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 3, "use_karras_sigmas": True}, 2),
    ("DPMSolverMultistepScheduler", {**SD, "solver_type": "heun", "lower_order_final": False, "use_lu_lambdas": True}, 1),
    ("DPMSolverMultistepScheduler", {**SD, **V, "euler_at_final": True, "final_sigmas_type": "sigma_min"}, 1),
    ("DPMSolverMultistepScheduler", {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, 1),
    ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, 1),
    ("DPMSolverMultistepScheduler", {**V, **TRAILING, "rescale_betas_zero_snr": True}, 1),
    ("DPMSolverMultistepScheduler", FLOW_SIGMAS, 1),
    ("DPMSolverSinglestepScheduler", SD, 1),
    ("DPMSolverSinglestepScheduler", {**SD, "solver_order": 3, "lower_order_final": True}, 2),
    ("UniPCMultistepScheduler", SD, 2),
    ("UniPCMultistepScheduler", {**SD, "solver_order": 3, "disable_corrector": [0, 1]}, 3),
    ("UniPCMultistepScheduler", {**SD, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, 2),
    ("UniPCMultistepScheduler", {**SD, **V, "predict_x0": False, "final_sigmas_type": "sigma_min"}, 2),
    ("UniPCMultistepScheduler", FLOW_SIGMAS, 2),
    ("DEISMultistepScheduler", {**SD, "solver_order": 3}, 2),
    ("TCDScheduler", {}, 0),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential", "sigma_data": 1.0}, 0),
    ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}, 0),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, 2),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 0),
    ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1, "use_karras_sigmas": True}, 0),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, 1),
]
"""Class, options, and how far back the plan's updates reach in 6 steps."""


def config_of(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"_class_name": name, **settings}


def plan_of(config: dict[str, Any], steps: int, **options: Any) -> Plan:
    return scheduler_plan(config, steps, *noise_levels(config), **options)


def network(state: torch.Tensor, timestep: float) -> torch.Tensor:
    """Not linear, and another one at every timestep."""
    return torch.tanh(1.3 * state + math.sin(timestep)) + 0.2 * state


def by_diffusers(config: dict[str, Any], steps: int, noise: torch.Tensor, **given: Any) -> tuple[torch.Tensor, list[float]]:
    """The loop of diffusers' pipelines, and the timesteps that it hands to the network."""
    options = {name: value for name, value in config.items() if name in taken(getattr(diffusers, config["_class_name"]))}
    scheduler = getattr(diffusers, config["_class_name"])(**options)
    scheduler.set_timesteps(steps, **given)
    sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    more = {"eta": 0.0} if config["_class_name"] == "TCDScheduler" else {}  # as Stable Diffusion's pipeline passes it
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(network(scaled, float(t)), t, sample, **more).prev_sample
    return sample, [float(t) for t in scheduler.timesteps]


def by_plan(plan: Plan, noise: torch.Tensor) -> torch.Tensor:
    return plans.run(plan, noise, lambda i, state: network(state, plan.evaluations[i].timestep))[-1]


@pytest.mark.parametrize("steps", [1, 4, 6, 20])
@pytest.mark.parametrize(("name", "settings", "history"), TABLE)
def test_the_plan_is_the_scheduler(name: str, settings: dict[str, Any], history: int, steps: int) -> None:
    """From the same noise the same image, with the same timesteps for the network; diffusers computes in float32."""
    config = config_of(name, settings)
    if steps == 1 and (settings.get("skip_prk_steps") is False or "shift_terminal" in settings):  # diffusers cannot either
        with pytest.raises(InputError, match=f"{name}.*pass another --steps"):
            plan_of(config, steps)
        return
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 3, 4, 4)).astype(np.float32))
    expected, timesteps = by_diffusers(config, steps, noise)
    plan = plan_of(config, steps)
    assert [e.timestep for e in plan.evaluations] == timesteps
    assert relative(by_plan(plan, noise).numpy(), expected.numpy()) < 2e-5
    assert (plan.solver, plan.schedule, plan.steps, len(plan.sigmas)) == ("scheduler", "scheduler", steps, steps + 1)
    assert [e.time_point for e in plan.evaluations if e.time_point is not None] == list(range(1, steps + 1))
    assert plan.history <= history if steps != 6 else plan.history == history
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


INEXACT = [
    ("TCDScheduler", {}),  # not an ODE's step
    ("PNDMScheduler", {**SD1, "set_alpha_to_one": True, **V}),  # it mixes velocities of several timesteps
    *(
        (name, settings) for name, settings, _ in TABLE if settings.get("timestep_spacing") == "linspace"
    ),  # DDIM steps elsewhere
]


@pytest.mark.parametrize(("name", "settings"), [one for *one, _ in TABLE if tuple(one) not in INEXACT])
def test_time_points_are_those_of_the_states(name: str, settings: dict[str, Any]) -> None:
    """Of data that is one point every scheduler is exact: its states are ``(x0 + sigma noise) / scale`` at its own levels."""
    config = config_of(name, settings)
    levels, kind = noise_levels(config)
    plan = plan_of(config, 5)
    for x0, noise in ((1.0, 0.0), (0.0, 1.0)):

        def exact(sigma: float, x0: float = x0, noise: float = noise) -> float:
            mixed = (1 - sigma) * x0 + sigma * noise if kind == "flow_prediction" else x0 + sigma * noise
            return float(mixed / levels.scale(sigma))

        def output(i: int, state: float, x0: float = x0) -> float:
            p, q = plans.denoised_coefficients(kind, plan.evaluations[i].sigma, levels)
            return (x0 - p * state) / q

        states = plans.run(plan, exact(plan.evaluations[0].sigma) / plan.initial_scale, output)
        assert max(abs(s - exact(e.sigma)) for s, e in zip(states, plan.evaluations[1:], strict=False)) < 1e-3
        reached = {e.time_point: after for e, after in zip(plan.evaluations, plan.evaluations[1:], strict=False)}
        assert all(after.sigma == pytest.approx(plan.sigmas[k], rel=1e-6) for k, after in reached.items() if k is not None)


def test_pndm_doubles_its_first_step() -> None:
    """Stable Diffusion 1: the second timestep twice, one evaluation more than steps; time points without it."""
    config = config_of("PNDMScheduler", SD1)
    plan = plan_of(config, 4)
    assert [e.timestep for e in plan.evaluations] == [751, 501, 501, 251, 1]
    assert [e.time_point for e in plan.evaluations] == [None, 1, 2, 3, 4]
    levels, _ = noise_levels(config)
    assert isinstance(levels, NoiseLevels)
    np.testing.assert_allclose(plan.sigmas, levels.sigma[[751, 501, 251, 1, 0]], rtol=1e-9)
    assert scheduler_points(config, 4) == list(plan.sigmas)
    assert plan.initial_scale == 1.0


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flow_pipelines_hand_over_times(kind: str) -> None:
    """FLUX's pipeline gives its scheduler 1, .., 1/steps and the shift of its size; Stable Diffusion 3's the shift alone."""
    config = config_of("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "time_shift_type": kind})
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 3, 4, 4)).astype(np.float32))
    mu = 0.5 + (1.15 - 0.5) * (1000 - 256) / (4096 - 256)
    for pipeline, given in (("FluxPipeline", {"sigmas": np.linspace(1, 1 / 4, 4)}), ("StableDiffusion3Pipeline", {})):
        plan = plan_of(config, 4, tokens=1000, pipeline=pipeline)
        expected, timesteps = by_diffusers(config, 4, noise, mu=mu, **given)
        np.testing.assert_allclose([e.timestep for e in plan.evaluations], timesteps, rtol=1e-6)
        assert relative(by_plan(plan, noise).numpy(), expected.numpy()) < 1e-5


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("DDIMScheduler", {}, "linear.*DDIMScheduler with clip_sample; switch it off.*--solver euler"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "with thresholding"),
        ("HeunDiscreteScheduler", {"clip_sample": True}, "with clip_sample"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "with thresholding"),
        (
            "DDPMScheduler",
            {"clip_sample": False},
            "draws no noise.*DDPMScheduler: noise drawn at every step; pass --solver euler",
        ),
        ("EulerAncestralDiscreteScheduler", {}, "draws no noise.*EulerAncestral"),
        ("KDPM2AncestralDiscreteScheduler", {}, "draws no noise.*KDPM2Ancestral"),
        ("LCMScheduler", {}, "draws no noise.*LCM"),
        ("SASolverScheduler", {}, "draws no noise.*SASolver"),
        ("UnCLIPScheduler", {}, "draws no noise.*UnCLIP"),
        ("FlowMatchLCMScheduler", {}, "draws no noise.*FlowMatchLCM"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, r"noise drawn at every step \(algorithm_type\)"),
        ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, r"at every step \(algorithm_type\)"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, r"at every step \(stochastic_sampling\)"),
        ("CogVideoXDPMScheduler", {}, "CogVideoXDPMScheduler does not run as its pipelines run it.*--solver euler"),
        ("PNDMScheduler", {"prediction_type": "sample"}, "prediction_type given as sample.*--solver euler"),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "finite numbers.*--solver euler"),
        ("DDIMScheduler", {"clip_sample": False, "rescale_betas_zero_snr": True, **TRAILING}, "finite numbers"),
    ],
)
def test_what_is_no_plan_is_refused_by_name(name: str, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        plan_of(config_of(name, settings), 4)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "_class_name.*found none.*trained_betas"),
        ({"beta_schedule": "linear"}, "_class_name.*found none"),
        (None, "_class_name"),
        ({"_class_name": ["module", "Class"]}, r"_class_name.*\['module', 'Class'\]"),
        ({"_class_name": "DreamScheduler"}, "'DreamScheduler'; name in scheduler_config.json"),
        *(({"_class_name": name}, f"'{name}' \\(") for name in REFUSED),
        ({"_class_name": "DDIMScheduler", "curvature": 2}, "DDIMScheduler that are known; found 'curvature': 2"),
        ({"_class_name": "DDPMScheduler", "predict_epsilon": False}, "predict_epsilon.*prediction_type: sample"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "staircase"}, "beta_schedule.*scaled_linear.*trained_betas there"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "sigmoid"}, "sigmoid is not implemented"),
        ({"_class_name": "DDPMScheduler", "beta_start": "0.0001"}, "beta_start of DDPMScheduler as a number.*'0.0001'"),
        ({"_class_name": "DDPMScheduler", "beta_end": math.nan}, "beta_end.*nan"),
        ({"_class_name": "DDPMScheduler", "beta_end": -0.1}, "beta_end.*-0.1"),
        ({"_class_name": "DDPMScheduler", "beta_end": None}, "beta_end.*None"),
        ({"_class_name": "DDPMScheduler", "beta_start": 0.0, "beta_end": 0.0}, "the noise rises at every timestep"),
        ({"_class_name": "DDPMScheduler", "beta_start": 0.02, "beta_end": 1.0}, "the noise rises at every timestep"),
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": 0}, "num_train_timesteps.*found 0"),
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": True}, "num_train_timesteps.*True"),
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": "1000"}, "num_train_timesteps.*'1000'"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "velocity"}, "prediction_type.*'velocity'"),
        (
            {"_class_name": "DDPMScheduler", "prediction_type": "flow_prediction"},
            "together with prediction_type flow_prediction",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas.*together with"),
        ({"_class_name": "DDPMScheduler", "timestep_spacing": "sideways"}, "timestep_spacing.*'sideways'"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "cyclic"}, "timestep_type.*'cyclic'"),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1, 0.2]}, "as many trained_betas.*1000; found 2"),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1, "0.2"], "num_train_timesteps": 2}, "trained_betas.*a list of"),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1, math.nan], "num_train_timesteps": 2}, "trained_betas.*nan"),
        ({"_class_name": "DDPMScheduler", "trained_betas": [[0.1], [0.2]], "num_train_timesteps": 2}, "trained_betas"),
        ({"_class_name": "DDPMScheduler", "clip_sample": "false"}, "clip_sample.*true or false; found 'false'"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 80.0, "sigma_max": 0.002}, "sigma_min < sigma_max"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": "0.5"}, "sigma_data"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "prediction_type epsilon of EDMEuler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "shift.*above 0.*found 0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "time_shift_type": "cubic"}, "time_shift_type.*'cubic'"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_p": {"a": 1}}, "solver_p.*null"),
        ({"_class_name": "DDIMScheduler", "use_karras_sigmas": True, "x": 1}, "found 'x'"),
    ],
)
def test_unknown_is_never_a_default(config: Any, named: str) -> None:
    with pytest.raises(InputError, match=named) as refused:
        noise_levels(config)
    assert "\n" not in str(refused.value)


def test_every_scheduler_of_diffusers_is_known_or_refused() -> None:
    """Whatever its class, a configuration of diffusers has noise levels that are its own, or is refused in one line."""
    everything = [name for name in dir(diffusers) if name.endswith("Scheduler") and isinstance(getattr(diffusers, name), type)]
    taken_here = {*DISCRETE, *EDM, *FLOW}
    assert taken_here <= {*everything} and not taken_here & {*REFUSED}
    for name in everything:
        if name in taken_here:
            levels, _ = noise_levels({"_class_name": name})
            own = EDMLevels if name in EDM else FlowLevels if name in FLOW else NoiseLevels
            assert isinstance(levels, own), name
        else:
            with pytest.raises(InputError, match="noise levels are known"):
                noise_levels({"_class_name": name})


def test_options_of_the_classes_are_all_known() -> None:
    """A diffusers that gives a class another option is found here."""
    for name in (*DISCRETE, *EDM, *FLOW):
        if name != "DPMSolverSDEScheduler":
            cls = getattr(diffusers, name)
            assert {*taken(cls)} <= {*OPTIONS}, name
            noise_levels({"_class_name": name, **{k: v for k, v in cls().config.items() if not k.startswith("_")}})


@pytest.mark.parametrize("name", [name for name in DISCRETE if name not in ("DPMSolverSDEScheduler", "UnCLIPScheduler")])
def test_noise_levels_are_the_classes_own(name: str) -> None:
    """Defaults differ from class to class, and trained betas are taken as they are."""
    cls = getattr(diffusers, name)
    betas = np.linspace(0.001, 0.3, 40) ** 1.5
    for settings in ({}, {"trained_betas": betas.tolist(), "num_train_timesteps": 40}):
        levels, _ = noise_levels({"_class_name": name, **settings})
        abar = cls(**settings).alphas_cumprod.double().numpy()
        assert isinstance(levels, NoiseLevels)
        np.testing.assert_allclose(levels.sigma, np.sqrt((1 - abar) / abar), rtol=1e-12)
    if not name.startswith("CogVideoX"):  # which shift them
        np.testing.assert_allclose(1 / (1 + levels.sigma**2), np.cumprod(1 - betas), rtol=1e-5)


def test_options_of_other_classes_are_passed_over() -> None:
    """As diffusers does: Stable Diffusion's repositories have leftovers of PNDM and DDIM beside every scheduler."""
    leftovers = {"skip_prk_steps": True, "clip_sample": True, "rescale_betas_zero_snr": True, "timestep_values": None}
    plain, _ = noise_levels({"_class_name": "LMSDiscreteScheduler"})
    found, _ = noise_levels({"_class_name": "LMSDiscreteScheduler", **leftovers, "_diffusers_version": "0.2.2"})
    assert isinstance(plain, NoiseLevels) and isinstance(found, NoiseLevels)
    np.testing.assert_array_equal(found.sigma, plain.sigma)
    assert left_out({"_class_name": "LMSDiscreteScheduler", **leftovers}) == []


def test_continuous_time_is_log_sigma() -> None:
    """Stable Video Diffusion's scheduler: v-prediction, and a time of log(sigma)/4 in place of a timestep."""
    config = config_of(*next((name, s) for name, s, _ in TABLE if "timestep_type" in s))
    levels, kind = noise_levels(config)
    assert (levels, kind) == (EDMLevels(0.002, 70.0, 1.0), "v_prediction")
    plan = plan_of(config, 4)
    np.testing.assert_allclose([e.timestep for e in plan.evaluations], levels.timestep(np.array(plan.sigmas[:-1])), rtol=1e-5)
    assert noise_levels({**config, "prediction_type": "epsilon"})[1] == "epsilon"  # diffusers passes it over there
    assert isinstance(noise_levels({**config, "prediction_type": "epsilon"})[0], NoiseLevels)


@pytest.mark.parametrize(
    ("schedule", "steps", "named"),
    [
        ("14,3,1", 3, r"expected 4 noise levels for 3 steps; found 3; pass --steps 2"),
        ("14,3,nan", None, "fall from one.*nan"),
        ("14,inf,3", None, "fall from one"),
        ("inf,3,1", None, "fall from one"),
        ("1,3,14", None, "the highest comes first"),
        ("14,3,3", None, "fall from one"),
        ("14,3,-1", None, "0 or above"),
        ("14", None, "two or more"),
        ("14,x", None, "found 'x'"),
        ("14,", None, "found ''"),
        ("500,3,1", None, "inside the backbone's"),
        ("14,3,0.001", None, "inside the backbone's"),
        (None, None, "expected --steps"),
        ("scheduled", 3, "expected a schedule out of"),
    ],
)
def test_wrong_lists_of_noise_levels(schedule: str | None, steps: int | None, named: str, tiny_model: Path) -> None:
    with pytest.raises(InputError, match=named):
        load_backbone(tiny_model).compile_plan(steps, schedule=schedule)


def test_lists_of_noise_levels(tiny_model: Path) -> None:
    adapter = load_backbone(tiny_model)
    plan = adapter.compile_plan(schedule="14.6146, 3.861,1.886,0.963,0", solver="dpmpp-2m")
    assert plan == adapter.compile_plan(4, "dpmpp-2m", [14.6146, 3.861, 1.886, 0.963, 0])
    assert plan.sigmas == (14.6146, 3.861, 1.886, 0.963, 0.0)
    assert (plan.schedule, plan.steps, plan.solver) == ("given", 4, "dpmpp-2m")
    with pytest.raises(InputError, match=r"--solver scheduler on the scheduler's own.*found --schedule 14,3"):
        adapter.compile_plan(schedule="14,3", solver="scheduler")


def scheduled(model: Path, target: Path, config: dict[str, Any]) -> Path:
    """A copy of a pipeline directory with another scheduler."""
    shutil.copytree(model, target)
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    edit_json(target / "model_index.json", lambda index: index.update(scheduler=["diffusers", config["_class_name"]]))
    return target


def test_what_another_solver_leaves_out_is_recorded(tiny_model: Path, tmp_path: Path) -> None:
    """``clip_sample`` and noise of the pipeline's DDPMScheduler: a note, and a line in the manifest and in the set."""
    arguments = [
        "export",
        "--model",
        str(tiny_model),
        "--plain",
        "--realisation",
        "baked",
        "-q",
        "-o",
        str(tmp_path / "bundle"),
    ]
    done = CliRunner().invoke(main, [*arguments, "--schedule", "14.6,3.8,0.9"])
    note = "not in the plan of euler: clip_sample and noise drawn at every step, as DDPMScheduler has it"
    assert done.exit_code == 0, done.output
    assert f"note: {note}" in done.stderr
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["backbone"]["scheduler"] == {"class": "DDPMScheduler", "left_out": note}
    assert [float.fromhex(sigma) for sigma in manifest["plan"]["sigmas"]] == [14.6, 3.8, 0.9]
    refused = CliRunner().invoke(main, [*arguments, "--steps", "2", "--solver", "scheduler"])
    assert refused.exit_code == 2 and "DDPMScheduler: noise drawn at every step" in refused.stderr
    recipe = Recipe(trajectories=4, iterations=1, batch=4, teacher_evaluations=6)
    found = distill(tiny_model, tmp_path / "set.safetensors", schedule=[14.6, 3.8, 0.9], recipe=recipe, quiet=True)
    assert found.plan.sigmas == (14.6, 3.8, 0.9) and found.training["scheduler_left_out"] == note


@pytest.mark.parametrize("realisation", ["baked", "table", "fused"])
def test_images_of_the_pipeline(realisation: str, tiny_model: Path, once: Callable[..., Path]) -> None:
    """PNDM's history has gaps: an evaluation between two that are kept is not. Exported, built and sampled as DDPMPipeline's
    parts with that scheduler would."""
    config = config_of("PNDMScheduler", {**SD1, "beta_schedule": "linear"})

    def make(directory: Path) -> None:
        directory.mkdir()
        model = scheduled(tiny_model, directory / "model", config)
        bundle = export(directory / "bundle", model=model, plain=True, steps=6, solver="scheduler", quiet=True)
        build(bundle, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)

    directory = once("pndm", make)
    pipe = diffusers.DiffusionPipeline.from_pretrained(directory / "model")
    noise = noise_for((1, 8, 8), 0, range(2))
    sampler = Sampler.load(directory / "bundle", realisation=realisation)
    assert len(sampler.plan.evaluations) == 7
    pipe.scheduler.set_timesteps(6)
    sample = torch.from_numpy(noise)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            sample = pipe.scheduler.step(pipe.unet(sample, t).sample, t, sample).prev_sample
    assert relative(sampler.image(noise), sample.numpy()) < 1e-3


def test_stable_diffusions_own_images(tmp_path: Path) -> None:
    """Stable Diffusion 1 as published, small: ``StableDiffusionPipeline`` with PNDM under guidance, from the same latents."""
    torch.manual_seed(0)
    network = redraw(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            norm_num_groups=8,
            cross_attention_dim=12,
        )
    )
    scheduler, model = diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1), tmp_path / "model"
    network.save_pretrained(model / "unet")
    scheduler.save_pretrained(model / "scheduler")
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "PNDMScheduler"]}
    (model / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
    options: dict[str, Any] = {"steps": 5, "solver": "scheduler", "guidance_scale": 3.0, "realisations": ["baked"]}
    bundle = export(tmp_path / "bundle", model=model, plain=True, quiet=True, **options)
    build(bundle, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    noise, prompts = noise_for((2, 8, 8), 0, range(2)), np.random.default_rng(1).standard_normal((2, 2, 77, 12), np.float32)
    given = {"encoder_hidden_states": prompts[0], "negative_encoder_hidden_states": prompts[1]}
    found = Sampler.load(bundle.path).image(noise, {**given, "guidance_scale": np.full(2, 3, np.float32)})
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = diffusers.StableDiffusionPipeline(unet=network.eval(), scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt_embeds=torch.from_numpy(prompts[0]),
        negative_prompt_embeds=torch.from_numpy(prompts[1]),
        latents=torch.from_numpy(noise),
        guidance_scale=3.0,
        num_inference_steps=5,
        output_type="latent",
    ).images
    assert relative(found, expected.numpy()) < 1e-3


def test_ddim_pipelines_own_images(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``DDIMPipeline`` takes no latents: its noise is the sampler's; its images are clamped to [0, 1]."""
    config = config_of("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"})
    model = scheduled(tiny_model, tmp_path / "model", config)
    edit_json(model / "model_index.json", lambda index: index.update(_class_name="DDIMPipeline"))
    bundle = export(
        tmp_path / "bundle", model=model, plain=True, steps=6, solver="scheduler", realisations=["baked"], quiet=True
    )
    build(bundle, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    noise, pipe = noise_for((1, 8, 8), 0, range(2)), diffusers.DDIMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.pipelines.ddim.pipeline_ddim, "randn_tensor", lambda *a, **b: torch.from_numpy(noise))
    expected = pipe(batch_size=2, num_inference_steps=6, output_type="np").images
    found = np.clip(Sampler.load(bundle.path).image(noise) / 2 + 0.5, 0, 1)
    assert relative(found.transpose(0, 2, 3, 1), expected) < 1e-3
