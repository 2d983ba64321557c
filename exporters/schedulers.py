"""What a diffusers scheduler's configuration says: noise levels, prediction type, and time points of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import InputError
from mteo_deploy.schedules import EDMLevels, FlowLevels, Levels, NoiseLevels


def noise_levels(config: dict[str, Any], tokens: int | None = None) -> tuple[Levels, str]:
    """Noise levels and prediction type: of flow matching, of EDM, or of a DDPM-type schedule.

    Args:
        tokens: how many tokens the network makes of a state, which decides a dynamic shift; None for the most that the
            scheduler was made for.

    Raises:
        InputError: for a schedule or prediction type that is not supported.
    """
    name, prediction_type = _class_name(config), config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch"):
        if config.get("invert_sigmas"):
            raise InputError(f"expected a {name} whose sigmas fall; found invert_sigmas, not supported")
        return FlowLevels(_shift(config, tokens), float(config.get("num_train_timesteps", 1000))), "flow_prediction"
    if prediction_type == "flow_prediction":
        if not config.get("use_flow_sigmas"):
            raise InputError(f"expected a {name} with use_flow_sigmas for prediction type flow_prediction; found none")
        return FlowLevels(float(config.get("flow_shift", 1.0)), float(config.get("num_train_timesteps", 1000))), prediction_type
    if name.startswith("EDM"):
        if prediction_type != "epsilon":
            raise InputError(f"expected prediction type epsilon of {name}; found {prediction_type!r}")
        values = {to: float(config[key]) for to, key in _EDM.items() if key in config}
        return EDMLevels(**values), "edm"
    return NoiseLevels.from_alphas_cumprod(_alphas_cumprod(config)), prediction_type


def _dynamic(config: dict[str, Any], tokens: int | None) -> float | None:
    """``mu``, linear in the number of tokens (diffusers' ``calculate_shift``); None for a fixed shift."""
    if not config.get("use_dynamic_shifting"):
        return None
    few, many = float(config.get("base_image_seq_len", 256)), float(config.get("max_image_seq_len", 4096))
    least, most = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
    return least + (most - least) * ((many if tokens is None else tokens) - few) / (many - few)


def _shift(config: dict[str, Any], tokens: int | None) -> float:
    """The shift of times, for one size: with ``mu`` it is ``exp(mu)``, or ``mu`` for ``time_shift_type`` linear."""
    mu = _dynamic(config, tokens)
    if mu is None:
        return float(config.get("shift", 1.0))
    return mu if config.get("time_shift_type") == "linear" else float(np.exp(mu))


_EDM = {"low": "sigma_min", "high": "sigma_max", "sigma_data": "sigma_data"}


def _class_name(config: dict[str, Any]) -> str:
    return str(config.get("_class_name", "DDPMScheduler"))


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


LEAST = 2.0**-24
"""Of ``abar``, where a schedule ends in noise alone: diffusers' multistep solvers put this there; sigma has no end else."""


def _alphas_cumprod(config: dict[str, Any]) -> NDArray[np.float64]:
    import diffusers

    own = _class_name(config) if _class_name(config).startswith("CogVideoX") else "DDPMScheduler"  # its snr_shift_scale
    try:
        scheduler = getattr(diffusers, own).from_config({**_plain(config), "_class_name": own})
    except (AttributeError, NotImplementedError, ValueError, TypeError) as error:
        raise InputError(f"expected a noise schedule that diffusers' {own} knows; {error}") from None
    return np.maximum(np.asarray(scheduler.alphas_cumprod.double().numpy()), LEAST)


def scheduler_points(config: dict[str, Any], steps: int, tokens: int | None = None) -> list[float]:
    """The ``steps + 1`` noise levels (of flow matching, times) that the pipeline's own scheduler would use, highest first.

    The last is zero where the scheduler goes on to a clean image.

    Args:
        tokens: as for :func:`noise_levels`.

    Raises:
        InputError: for a scheduler that diffusers does not have, or that does not take that many steps.
    """
    import diffusers

    name = _class_name(config)
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise InputError(
            f"expected a scheduler class of diffusers for --schedule scheduler; found {name!r}; pass another --schedule"
        )
    mu = _dynamic(config, tokens)
    try:
        scheduler = cls.from_config(config)
        scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    except (NotImplementedError, ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise InputError(f"{name} has no time points for {steps} steps ({error}); pass another --steps or --schedule") from None
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        points = _from_timesteps(config, scheduler)
    else:
        found = np.asarray(sigmas, dtype=np.float64)
        points = found[np.r_[True, np.diff(found) != 0]].tolist()  # schedulers of two evaluations name each twice
    if len(points) != steps + 1:
        raise InputError(f"expected {steps + 1} noise levels of {name}; found {len(points)}; pass another --schedule")
    return points


def _from_timesteps(config: dict[str, Any], scheduler: Any) -> list[float]:
    """DDIM and its like: noise levels of the integer timesteps, and the one after the last."""
    abar = _alphas_cumprod(config)
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    at = np.array([*abar[scheduler.timesteps.numpy()], final], dtype=np.float64)
    return list(np.sqrt((1 - at) / at))
