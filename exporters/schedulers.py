"""What a diffusers scheduler's configuration says: noise levels, prediction type, and time points of its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import InputError, border
from mteo_deploy.exporters.scheduler_options import EDM, FLOW, class_name, open_scheduler, short
from mteo_deploy.schedules import EDMLevels, FlowLevels, Levels, NoiseLevels

Config = Mapping[str, Any]

LEAST = 2.0**-24
"""Of ``abar``, where a schedule ends in noise alone: diffusers' multistep solvers put this there; sigma has no end else."""

SAME_LEVELS = {"DPMSolverSDEScheduler": "KDPM2DiscreteScheduler"}
"""Classes that need another package, torchsde, and the class with the same betas that needs none."""

UNIFORM = {"FluxPipeline", "Lumina2Pipeline", "Lumina2Text2ImgPipeline", "QwenImagePipeline"}
"""Pipelines that hand their scheduler the times 1, .., 1/steps, which it then shifts; others leave times to the scheduler."""


def noise_levels(config: Config, tokens: int | None = None) -> tuple[Levels, str]:
    """Noise levels and prediction type: of flow matching, of EDM, or of a DDPM-type schedule.

    Args:
        tokens: how many tokens the network makes of a state, which decides a dynamic shift; None for the most that the
            scheduler was made for.

    Raises:
        InputError: for a class, an option or a value that is not understood, by name.
    """
    name = class_name(config)
    scheduler = open_scheduler(config, SAME_LEVELS.get(name))
    options = scheduler.config
    prediction_type = options.get("prediction_type", "epsilon")
    if name in FLOW:
        if options.get("invert_sigmas"):
            raise InputError(f"expected a {name} whose sigmas fall; found invert_sigmas, not supported; leave it out")
        return FlowLevels(_shift(options, tokens), float(options["num_train_timesteps"])), "flow_prediction"
    if name in EDM:
        return _edm_levels(name, options), "edm"
    if bool(options.get("use_flow_sigmas")) != (prediction_type == "flow_prediction"):
        raise InputError(
            f"expected use_flow_sigmas of {name} together with prediction_type flow_prediction; found "
            f"{bool(options.get('use_flow_sigmas'))} with {prediction_type}; change either in scheduler_config.json"
        )
    if prediction_type == "flow_prediction":
        return FlowLevels(_shift(options, tokens, "flow_shift"), float(options["num_train_timesteps"])), prediction_type
    sigmas = _sigmas(name, scheduler)
    if options.get("timestep_type") == "continuous" and prediction_type == "v_prediction":  # of others diffusers passes it over
        low, high = options.get("sigma_min") or sigmas[0], options.get("sigma_max") or sigmas[-1]
        return EDMLevels(*_range(name, low, high), sigma_data=1.0), prediction_type
    return NoiseLevels(sigmas), prediction_type


def _range(name: str, low: float, high: float) -> tuple[float, float]:
    if not 0 < low < high:
        raise InputError(
            f"expected 0 < sigma_min < sigma_max of {name}; found {low:g} and {high:g}; change scheduler_config.json"
        )
    return float(low), float(high)


def _edm_levels(name: str, options: Config) -> EDMLevels:
    if options["prediction_type"] != "epsilon":
        raise InputError(
            f"expected prediction_type epsilon of {name}; found {options['prediction_type']!r}, not supported; take a network "
            "with EDM's own preconditioning"
        )
    return EDMLevels(*_range(name, options["sigma_min"], options["sigma_max"]), float(options["sigma_data"]))


def _dynamic(options: Config, tokens: int | None) -> float | None:
    """``mu``, linear in the number of tokens (diffusers' ``calculate_shift``); None for a fixed shift."""
    if not options.get("use_dynamic_shifting"):
        return None
    few, many = float(options.get("base_image_seq_len", 256)), float(options.get("max_image_seq_len", 4096))
    least, most = float(options.get("base_shift", 0.5)), float(options.get("max_shift", 1.15))
    if few == many:
        raise InputError("expected base_image_seq_len and max_image_seq_len to differ; change scheduler_config.json")
    return least + (most - least) * ((many if tokens is None else tokens) - few) / (many - few)


def _shift(options: Config, tokens: int | None, fixed: str = "shift") -> float:
    """The shift of times, for one size: with ``mu`` it is ``exp(mu)``, or ``mu`` for ``time_shift_type`` linear."""
    mu = _dynamic(options, tokens)
    if mu is None:
        return float(options[fixed])
    return mu if options.get("time_shift_type") == "linear" else float(np.exp(mu))


def _sigmas(name: str, scheduler: Any) -> NDArray[np.float64]:
    """Noise levels of a table of betas, lowest first.

    Raises:
        InputError: where they do not rise.
    """
    abar = np.asarray(scheduler.alphas_cumprod.double().numpy())
    with np.errstate(divide="ignore", invalid="ignore"):
        sigmas = np.sqrt((1 - abar) / abar)
    rises = np.isfinite(sigmas[:-1]).all() and sigmas[0] > 0 and (np.diff(sigmas[:-1]) > 0).all()
    if rises and abar[-1] in (0, LEAST):  # the end of noise alone; what comes before may have more than diffusers puts there
        end = np.sqrt((1 - LEAST) / LEAST)
        sigmas = np.minimum(np.append(sigmas[:-1], end), end * (1 - 1e-6 * np.arange(len(sigmas))[::-1]))
    if rises and np.isfinite(sigmas[-1]) and (np.diff(sigmas) > 0).all():
        return np.asarray(sigmas)
    options = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    found = ", ".join(f"{option} {short(scheduler.config.get(option))}" for option in options)
    raise InputError(
        f"expected betas of {name} by which the noise rises at every timestep; found {found}; change scheduler_config.json"
    )


def at_work(config: Config, steps: int, tokens: int | None = None, pipeline: str = "") -> Any:
    """The scheduler with its timesteps set for ``steps``, as the pipeline of that class sets them.

    Raises:
        InputError: for a configuration that is not understood, or one that does not take that many steps.
    """
    scheduler = open_scheduler(config)
    name, mu = class_name(config), _dynamic(scheduler.config, tokens)
    if steps < 1:
        raise InputError(f"expected steps of 1 or more of {name}; found {steps} steps; pass another --steps")
    given: dict[str, Any] = {} if mu is None else {"mu": mu}
    if pipeline in UNIFORM and not scheduler.config.get("use_flow_sigmas"):
        given["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    with (
        border(f"{name} has no time points for {steps} steps", "pass another --steps, --solver or --schedule"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        scheduler.set_timesteps(steps, **given)
    return scheduler


def level_at(scheduler: Any, timestep: int) -> float:
    """The noise level of one of a table of betas' timesteps; before the first it is the one a scheduler ends at."""
    final = getattr(scheduler, "final_alpha_cumprod", 1.0)
    abar = float(final if timestep < 0 else scheduler.alphas_cumprod[timestep]) or LEAST
    return float(np.sqrt((1 - abar) / abar))


def last_timestep(scheduler: Any) -> int:
    """The timestep that the last step goes to: below 0 for none.

    DDIM's and PNDM's steps are ``timesteps // steps`` long, wherever their timesteps lie.
    """
    if type(scheduler).__name__ == "TCDScheduler":
        return 0
    if not hasattr(scheduler, "final_alpha_cumprod") or hasattr(scheduler, "step_index"):
        return -1
    return int(scheduler.timesteps[-1]) - int(scheduler.config.num_train_timesteps) // int(scheduler.num_inference_steps)


def points_of(scheduler: Any, steps: int) -> list[float]:
    """The ``steps + 1`` noise levels (of flow matching, times) of a scheduler at work, highest first.

    Raises:
        InputError: where there are more or fewer, or they do not fall.
    """
    if hasattr(scheduler, "sigmas"):
        found = np.asarray(scheduler.sigmas, dtype=np.float64)[: len(scheduler.timesteps) + 1]
        *points, last = found[np.r_[True, np.diff(found[:-1]) != 0, True]].tolist()  # two evaluations of one are named twice
    else:
        timesteps = getattr(scheduler, "_timesteps", None)  # PNDM's, without those that it doubles
        timesteps = scheduler.timesteps.numpy() if timesteps is None else timesteps[::-1]
        points, last = [level_at(scheduler, int(t)) for t in timesteps], level_at(scheduler, last_timestep(scheduler))
    points.append(last if last < points[-1] * (1 - 1e-6) else 0.0)  # a step to where it is: what it leaves is the image
    name = type(scheduler).__name__
    if len(points) != steps + 1:
        raise InputError(
            f"expected {steps + 1} noise levels of {name}; found {len(points)}; pass another --steps, --solver or --schedule"
        )
    if not (np.isfinite(points).all() and (np.diff(points) < 0).all()):
        raise InputError(
            f"expected noise levels of {name} that fall; found {[f'{point:.4g}' for point in points]}; pass another --steps or "
            "--schedule"
        )
    return points


def scheduler_points(config: Config, steps: int, tokens: int | None = None, pipeline: str = "") -> list[float]:
    """The ``steps + 1`` noise levels (of flow matching, times) that the pipeline's own scheduler would use, highest first.

    The last is zero where the scheduler goes on to a clean image.

    Args:
        tokens: as for :func:`noise_levels`.
        pipeline: the pipeline's class; some hand their scheduler the times.

    Raises:
        InputError: for a scheduler that is not understood, or that does not take that many steps.
    """
    return points_of(at_work(config, steps, tokens, pipeline), steps)
