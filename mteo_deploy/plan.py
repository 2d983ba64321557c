"""The plan: schedule and solver compiled to plain coefficients, one row per evaluation.

The state is what the network takes, of about unit variance, ``y = x / scale(sigma)``: ``x`` reaches sigma = 80, which half
precision and int8 cannot carry well, and no scaling is left. A backbone trained with added noise, whatever it predicts, is
solved in ``x = x0 + sigma noise``; flow matching in its own ``x = (1 - t) x0 + t noise``, with ``t`` in sigma's place.
For evaluation ``i`` with network output ``o_i`` the whole sampler is

    kept_i = keep_state[i] * y_i + keep_output[i] * o_i
    y_i+1  = carry[i] * y_i + sum_j weights[i][j] * kept_(i-j)

and after the last evaluation ``y`` is the image itself (the last scale is folded in).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mteo_deploy import schedules, solvers
from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.schedules import EDMLevels, FlowLevels, Levels

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "edm", "flow_prediction")


@dataclass(frozen=True)
class Evaluation:
    """One call of the network.

    Attributes:
        sigma: noise level of the state the network sees (variance-exploding form); flow matching's time t.
        timestep: the backbone's own time at that noise level.
        keep_state, keep_output: what is kept of this call, as a combination of state and output.
        carry: factor on the state in the update.
        weights: factors on the kept quantities, this call's first, then the one before, ...
        time_point: index of the schedule's time point that the update reaches, or None inside an interval.
    """

    sigma: float
    timestep: float
    keep_state: float
    keep_output: float
    carry: float
    weights: tuple[float, ...]
    time_point: int | None


@dataclass(frozen=True)
class Plan:
    """What the loop does, with no torch and no solver left in it.

    Attributes:
        steps: intervals of the schedule; ``len(evaluations)`` is the number of function evaluations (NFE).
        sigmas: the ``steps + 1`` noise levels.
        initial_scale: factor from standard normal noise to the first state (the terminal noise at unit variance).
    """

    solver: str
    schedule: str
    prediction_type: str
    steps: int
    sigmas: tuple[float, ...]
    initial_scale: float
    evaluations: tuple[Evaluation, ...] = field(repr=False)

    @property
    def history(self) -> int:
        """How many earlier kept quantities the updates reach back to."""
        return max(len(e.weights) for e in self.evaluations) - 1

    def summary(self, plain: Plan) -> str:
        """In words; ``plain`` is what it was before any of its numbers was learned."""
        if self.sigmas != plain.sigmas:
            return f"{self.solver}, {self.steps} steps, {self.schedule} schedule"
        coefficients = "" if self == plain else ", learned coefficients"
        return f"{self.solver}, {self.steps} steps, {plain.schedule} schedule{coefficients}"

    def to_json(self) -> dict[str, Any]:
        """Exact JSON form: every float as a C99 hexadecimal string."""
        return {
            "solver": self.solver,
            "schedule": self.schedule,
            "prediction_type": self.prediction_type,
            "steps": self.steps,
            "sigmas": [s.hex() for s in self.sigmas],
            "initial_scale": self.initial_scale.hex(),
            "evaluations": [
                {
                    "sigma": e.sigma.hex(),
                    "timestep": e.timestep.hex(),
                    "keep_state": e.keep_state.hex(),
                    "keep_output": e.keep_output.hex(),
                    "carry": e.carry.hex(),
                    "weights": [w.hex() for w in e.weights],
                    "time_point": e.time_point,
                }
                for e in self.evaluations
            ],
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Inverse of :meth:`to_json`.

        Raises:
            BundleError: when a field is missing or of another type.
        """
        try:
            return cls(
                solver=str(data["solver"]),
                schedule=str(data["schedule"]),
                prediction_type=str(data["prediction_type"]),
                steps=int(data["steps"]),
                sigmas=tuple(float.fromhex(s) for s in data["sigmas"]),
                initial_scale=float.fromhex(data["initial_scale"]),
                evaluations=tuple(
                    Evaluation(
                        sigma=float.fromhex(e["sigma"]),
                        timestep=float.fromhex(e["timestep"]),
                        keep_state=float.fromhex(e["keep_state"]),
                        keep_output=float.fromhex(e["keep_output"]),
                        carry=float.fromhex(e["carry"]),
                        weights=tuple(float.fromhex(w) for w in e["weights"]),
                        time_point=e["time_point"],
                    )
                    for e in data["evaluations"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"expected a plan with hexadecimal floats; found a bad field ({error}); export again") from None

    def before_learning(self, training: Mapping[str, Any]) -> Plan:
        """This plan before any of its numbers was learned, from what the training of the embedding set reported."""
        start = training.get("plain_plan")
        return self if start is None else Plan.from_json(start)


def denoised_coefficients(prediction_type: str, sigma: float, levels: Levels) -> tuple[float, float]:
    """``(p, q)`` with ``D = p * y + q * output`` for the network's input ``y``.

    Salimans & Ho 2022, appendix D; for ``edm`` Karras et al. 2022, table 1: ``D = c_skip x + c_out output``.
    """
    scale = levels.scale(sigma)
    if prediction_type == "epsilon":
        return scale, -sigma
    if prediction_type == "v_prediction":
        return 1 / scale, -sigma / scale
    if prediction_type == "sample":
        return 0.0, 1.0
    if prediction_type == "edm" and isinstance(levels, EDMLevels):
        return levels.sigma_data**2 / scale, sigma * levels.sigma_data / scale
    if prediction_type == "flow_prediction" and isinstance(levels, FlowLevels):
        return 1.0, -sigma
    raise InputError(f"expected a prediction type out of {', '.join(PREDICTION_TYPES)}; found {prediction_type!r}")


def kept_coefficients(keeps: str, prediction_type: str, sigma: float, levels: Levels) -> tuple[float, float]:
    """``(p, q)`` with ``kept = p * y + q * output``: the denoised estimate, or the slope ``d``."""
    p, q = denoised_coefficients(prediction_type, sigma, levels)
    if keeps == "D":
        return p, q
    if prediction_type == "flow_prediction":
        return 0.0, 1.0
    return (levels.scale(sigma) - p) / sigma, -q / sigma


def compile_plan(
    levels: Levels,
    *,
    steps: int,
    solver: str = "euler",
    schedule: str | None = None,
    prediction_type: str = "epsilon",
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    points: Sequence[float] | None = None,
) -> Plan:
    """Compile schedule and solver to a plan for a backbone trained at ``levels``.

    Args:
        schedule: out of :data:`mteo_deploy.schedules.SCHEDULES`; None for the default of ``levels``, or ``given`` with points.
        sigma_max, sigma_min: noise levels of the first and last time point; by default those of ``levels``.
        points: ``steps + 1`` noise levels, highest first, in place of the schedule's, which then is only a name. The last may
            be zero.

    Raises:
        InputError: for an unknown solver, schedule or prediction type, a range outside the backbone's, or a solver that does
            not go with flow matching.
    """
    method = solvers.get(solver)
    schedule = schedule or (levels.default_schedule if points is None else schedules.GIVEN)
    if isinstance(levels, FlowLevels) and method.keeps == "D":
        usable = ", ".join(
            name for name, one in solvers.SOLVERS.items() if one.keeps == "d" and not name.startswith("deis-log")
        )
        raise InputError(f"expected a solver out of {usable} for a flow-matching backbone; found {solver!r}")
    if points is None:
        sigma_max = levels.high if sigma_max is None else sigma_max
        sigma_min = levels.low if sigma_min is None else sigma_min
        points = schedules.grid(schedule, steps, sigma_max, sigma_min, levels).tolist()
    if len(points) != steps + 1:
        raise InputError(f"expected {steps + 1} noise levels for {steps} steps; found {len(points)}")
    _check_range(points, levels)
    grid = np.asarray(points, dtype=np.float64)
    traced = solvers.trace(method, grid)
    timesteps = levels.timestep(np.asarray(traced.sigmas))
    scales = [levels.scale(s) for s in traced.sigmas] + [1.0]
    states = [s.weights for s in [*traced.states, traced.last]]
    rows = []
    for i, sigma in enumerate(traced.sigmas):
        carry = states[i + 1][0] / states[i][0]
        weights = (states[i + 1] - carry * states[i])[1 : i + 2][::-1] / scales[i + 1]
        weights[np.abs(weights) < 1e-13 * np.abs(weights).max()] = 0.0
        used = int(np.flatnonzero(weights)[-1]) + 1
        p, q = kept_coefficients(method.keeps, prediction_type, sigma, levels)
        interval, inside = divmod(i + 1, method.evaluations_per_interval)
        last = i + 1 == len(traced.sigmas)  # of two evaluations an interval that ends at zero has the first only
        rows.append(
            Evaluation(
                sigma=sigma,
                timestep=float(timesteps[i]),
                keep_state=p,
                keep_output=q,
                carry=float(carry * scales[i] / scales[i + 1]),
                weights=tuple(float(w) for w in weights[:used]),
                time_point=steps if last else None if inside else interval,
            )
        )
    return Plan(
        solver=solvers.canonical(solver),
        schedule=schedule,
        prediction_type=prediction_type,
        steps=steps,
        sigmas=tuple(float(s) for s in grid),
        initial_scale=float(grid[0] / scales[0]),
        evaluations=tuple(rows),
    )


def _check_range(points: Sequence[float], levels: Levels) -> None:
    if not all(a > b for a, b in itertools.pairwise(points)):
        raise InputError(f"expected noise levels that fall from one time point to the next; found {list(points)}")
    low, high = levels.limits
    if not np.isfinite(points).all() or points[0] > high * 1.0001 or points[-1] < 0 or 0 < points[-1] < low * 0.9999:
        raise InputError(
            f"expected noise levels inside the backbone's [{low:.4g}, {high:.4g}]; found [{points[-1]:.4g}, {points[0]:.4g}]"
        )


def run(
    plan: Plan, noise: Any, network: Callable[[int, Any], Any], between: Callable[[Any], Any] | None = None
) -> Sequence[Any]:
    """The loop, for numpy arrays and torch tensors alike: the state after every evaluation, the last one the image.

    Args:
        noise: standard normal ``[batch, ...]``.
        network: ``(evaluation index, state) -> output``.
        between: what the state and everything kept goes through at each time point on its way to the next; None: nothing.
    """
    state = noise * plan.initial_scale
    kept: list[Any] = []
    states = []
    for i, row in enumerate(plan.evaluations):
        output = network(i, state)
        value = output if row.keep_output == 1.0 else row.keep_output * output
        kept.insert(0, value if row.keep_state == 0.0 else value + row.keep_state * state)
        state = row.carry * state
        for weight, quantity in zip(row.weights, kept, strict=False):
            if weight != 0.0:
                state = state + weight * quantity
        del kept[plan.history + 1 :]
        states.append(state)
        if between is not None and row.time_point is not None:
            state, kept = between(state), [between(quantity) for quantity in kept]
    return states


def default_substeps(plan: Plan) -> int:
    """Intervals of the reference inside each interval of the plan: about 18 in all (36 evaluations of Heun)."""
    return max(3, -(-18 // plan.steps))


def reference_plan(plan: Plan, levels: Levels, substeps: int, solver: str = "heun") -> Plan:
    """The reference trajectory's plan: ``substeps`` intervals inside each interval of ``plan``, from the same first state."""
    fine = compile_plan(
        levels,
        steps=plan.steps * substeps,
        solver=solver,
        schedule=plan.schedule,
        prediction_type=plan.prediction_type,
        points=schedules.refine(np.asarray(plan.sigmas), substeps, levels.rho).tolist(),
    )
    return replace(fine, initial_scale=plan.initial_scale)
