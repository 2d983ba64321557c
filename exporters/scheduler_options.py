"""What is understood of a diffusers scheduler's configuration: an allow-list of its classes, options and values.

diffusers passes over options that a class does not take, and an unknown class would have to be guessed. A noise level that is
guessed makes other images without a word, so whatever is not in these tables is refused.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mteo_deploy.errors import InputError, border

Config = Mapping[str, Any]

DISCRETE = (
    *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler"),
    *("DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler"),
    *("SASolverScheduler", "TCDScheduler", "UnCLIPScheduler", "UniPCMultistepScheduler"),
)
"""Their networks were trained at the noise levels of a table of betas (Ho et al. 2020), or with ``use_flow_sigmas`` at those of
flow matching."""
EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")

REFUSED = {
    "AmusedScheduler": "it unmasks tokens",
    "BlockRefinementScheduler": "it unmasks tokens",
    "CMStochasticIterativeScheduler": "a consistency model's, which is no ODE's network",
    "ConsistencyDecoderScheduler": "a consistency model's, which is no ODE's network",
    "CosineDPMSolverMultistepScheduler": "its time is an angle",
    "DDIMInverseScheduler": "it turns images into noise",
    "DDPMWuerstchenScheduler": "its time is continuous, of a cosine",
    "DPMSolverMultistepInverseScheduler": "it turns images into noise",
    "DiscreteDDIMScheduler": "it unmasks tokens",
    "EntropyBoundScheduler": "it unmasks tokens",
    "FlowMapEulerDiscreteScheduler": "its network takes two times",
    "IPNDMScheduler": "its time is an angle",
    "KarrasVeScheduler": "variance exploding, with a sigma that its pipeline gives the network",
    "RePaintScheduler": "it fills in a part of a given image",
    "SCMScheduler": "its time is an angle (TrigFlow)",
    "ScoreSdeVeScheduler": "variance exploding, with a sigma in the time's place",
    "ScoreSdeVpScheduler": "its time is continuous",
    "VQDiffusionScheduler": "it unmasks tokens",
}
"""Classes that diffusers has and that are of another process, and why."""

WAY_OUT = (
    "name in scheduler_config.json what the network was trained with: DDPMScheduler with its betas (or trained_betas, a list), "
    "EDMEulerScheduler with sigma_data, or FlowMatchEulerDiscreteScheduler"
)


@dataclass(frozen=True)
class Rule:
    """What values an option takes, in words and as a test."""

    words: str
    takes: Callable[[Any], bool]


def _number(low: float, high: float, above: bool = False) -> Rule:
    def takes(value: Any) -> bool:
        return type(value) in (int, float) and low <= value <= high and not (above and value == low)

    return Rule(f"a number {'above' if above else 'from'} {low:g} {'and up ' if above else ''}to {high:g}", takes)


def _count(low: int, high: int) -> Rule:
    return Rule(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _choice(*names: str | None) -> Rule:
    return Rule(
        f"one of {', '.join(str(name) for name in names)}", lambda value: value in names and not isinstance(value, bool)
    )


def _listed(rule: Rule, words: str) -> Rule:
    def takes(value: Any) -> bool:
        values = value.tolist() if isinstance(value, np.ndarray) else value
        return isinstance(values, (list, tuple)) and all(map(rule.takes, values))

    return Rule(words, takes)


FLAG = Rule("true or false", lambda value: value is None or isinstance(value, bool))
NOTHING = Rule("null: it is a Python object, which a file cannot hold", lambda value: value is None)
TIMESTEPS = 100_000
POSITIVE = _number(0, 1e9, above=True)

FLAGS = (
    *("clip_sample", "euler_at_final", "invert_sigmas", "lower_order_final", "predict_x0", "rescale_betas_zero_snr"),
    *("set_alpha_to_one", "skip_prk_steps", "stochastic_sampling", "thresholding", "use_beta_sigmas", "use_dynamic_shifting"),
    *("use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas", "use_lu_lambdas"),
)

OPTIONS: dict[str, Rule] = {
    **dict.fromkeys(FLAGS, FLAG),
    "algorithm_type": _choice(
        *("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis", "data_prediction", "noise_prediction")
    ),
    "base_image_seq_len": _count(1, 10**9),
    "base_shift": _number(-1e3, 1e3),
    "beta_end": _number(0, 1),
    "beta_schedule": _choice("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
    "beta_start": _number(0, 1),
    "clip_sample_range": POSITIVE,
    "corrector_order": _count(0, 4),
    "disable_corrector": _listed(_count(0, TIMESTEPS), "a list of step numbers"),
    "dynamic_thresholding_ratio": _number(0, 1),
    "final_sigmas_type": _choice("zero", "sigma_min"),
    "flow_shift": POSITIVE,
    "interpolation_type": _choice("linear", "log_linear"),
    "lambda_min_clipped": _number(-math.inf, 1e9),
    "max_image_seq_len": _count(1, 10**9),
    "max_shift": _number(-1e3, 1e3),
    "noise_sampler_seed": _count(0, 2**63),
    "num_train_timesteps": _count(1, TIMESTEPS),
    "original_inference_steps": _count(1, TIMESTEPS),
    "prediction_type": _choice("epsilon", "v_prediction", "sample", "flow_prediction"),
    "predictor_order": _count(1, 4),
    "rho": POSITIVE,
    "sample_max_value": POSITIVE,
    "scale_factors": NOTHING,
    "shift": POSITIVE,
    "shift_terminal": _number(0, 1),
    "sigma_data": POSITIVE,
    "sigma_max": POSITIVE,
    "sigma_min": POSITIVE,
    "sigma_schedule": _choice("karras", "exponential"),
    "snr_shift_scale": POSITIVE,
    "solver_order": _count(1, 4),
    "solver_p": NOTHING,
    "solver_type": _choice("midpoint", "heun", "logrho", "bh1", "bh2"),
    "steps_offset": _count(0, TIMESTEPS),
    "tau_func": NOTHING,
    "time_shift_type": _choice("exponential", "linear"),
    "timestep_scaling": POSITIVE,
    "timestep_spacing": _choice("linspace", "leading", "trailing"),
    "timestep_type": _choice("discrete", "continuous"),
    "trained_betas": _listed(_number(0, 1, above=True), "a list of numbers above 0 and up to 1"),
    "upscale_mode": Rule("a name", lambda value: isinstance(value, str)),
    "variance_type": _choice(*("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")),
}
"""Options of the classes taken, and the values whose meaning is known."""

OBSOLETE: dict[str, Rule] = {
    "predict_epsilon": Rule("true; write prediction_type: sample for false", lambda value: value is True),
    "tensor_format": _choice("pt", "np", None),
    "timestep_values": NOTHING,
}
"""Options that no class takes any more, and the values at which that changes nothing."""

DRAWS = {
    "CogVideoXDPMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "UnCLIPScheduler",
}
"""Classes whose steps draw noise, whatever their options."""
NEVER_CLIP = {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"}
"""Classes that take ``clip_sample`` and do nothing with it."""


def class_name(config: Any) -> str:
    """The class that a configuration is of, checked to be one that is understood.

    Raises:
        InputError: for none, or another.
    """
    name = config.get("_class_name") if isinstance(config, Mapping) else config
    if not isinstance(name, str):
        found = "none" if name is None else repr(name)
        raise InputError(f"expected the scheduler's _class_name, a class of diffusers; found {found}; {WAY_OUT}")
    if name not in (*DISCRETE, *EDM, *FLOW):
        why = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise InputError(f"expected a scheduler whose noise levels are known; found {name!r}{why}; {WAY_OUT}")
    return name


def scheduler_class(name: str) -> type[Any]:
    """The class itself.

    Raises:
        InputError: where the installed diffusers lacks it, or what it needs.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None:
        raise InputError(
            f"expected a diffusers that has {name}; found {diffusers.__version__}, which has not; install another, or {WAY_OUT}"
        )
    with border(f"expected {name} of diffusers to be usable", "install what it asks for, or take another scheduler"):
        found.from_config  # noqa: B018 - a stand-in for what is not installed raises here
    return found  # type: ignore[no-any-return]


def taken(cls: type[Any]) -> dict[str, Any]:
    """The options of a class, with their defaults."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {one.name: one.default for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD}


def check_options(name: str, config: Config, defaults: Config) -> dict[str, Any]:
    """The options of a configuration that its class takes, each with a value that is understood.

    Options that other classes take are passed over, as diffusers does; those that none takes are refused.

    Raises:
        InputError: naming the option.
    """
    values: dict[str, Any] = {}
    for option, value in config.items():
        if option.startswith("_"):
            continue
        if (rule := OPTIONS.get(option) or OBSOLETE.get(option)) is None:
            raise InputError(
                f"expected options of {name} that are known; found {option!r}: {short(value)}, which may change the noise "
                "levels; take it out of scheduler_config.json if it does not"
            )
        if option not in defaults and option in OPTIONS:
            continue
        absent = value is None and defaults.get(option, 0) is None
        if not absent and not rule.takes(value):
            other = ", or give the noise schedule as trained_betas there" if option.startswith("beta_") else ""
            raise InputError(
                f"expected {option} of {name} as {rule.words}; found {short(value)}; change it in scheduler_config.json{other}"
            )
        if option in defaults:
            values[option] = value
    return values


def short(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def open_scheduler(config: Any, instead: str | None = None) -> Any:
    """The scheduler object of a configuration.

    Args:
        instead: another class with the same noise levels, to make one of.

    Raises:
        InputError: for a class, an option or a value that is not understood, or that diffusers refuses.
    """
    name = class_name(config)
    cls = scheduler_class(instead or name)
    defaults = taken(cls)
    values = check_options(name, config, defaults)
    betas, steps = values.get("trained_betas"), values.get("num_train_timesteps", defaults.get("num_train_timesteps"))
    if betas is not None and len(betas) != steps:
        raise InputError(
            f"expected as many trained_betas of {name} as num_train_timesteps, {steps}; found {len(betas)}; change either in "
            "scheduler_config.json"
        )
    with (
        border(f"expected a configuration that diffusers' {name} takes", "change scheduler_config.json"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        return cls(**values)


def left_out(config: Config) -> list[str]:
    """What a scheduler's own step does and no plan of another solver does: limit what is predicted, or draw noise."""
    name = class_name(config)
    defaults: dict[str, Any] = {}
    if name != "DPMSolverSDEScheduler":  # needs torchsde, and draws noise whatever it is told
        defaults = taken(scheduler_class(name))
    values = {**defaults, **{option: value for option, value in config.items() if option in defaults}}
    found = [option for option in ("thresholding", "clip_sample") if values.get(option) and name not in NEVER_CLIP]
    if name in DRAWS or values.get("stochastic_sampling") or str(values.get("algorithm_type")).startswith("sde-"):
        own = next((o for o in ("stochastic_sampling", "algorithm_type") if name not in DRAWS and values.get(o)), None)
        found.append("noise drawn at every step" if own is None else f"noise drawn at every step ({own})")
    return found
