"""Plans: what partial evaluation leaves behind does what the solver does, and survives its file format bit by bit."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mteo_deploy import schedules, solvers
from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.plan import PREDICTION_TYPES, Plan, compile_plan, denoised_coefficients, reference_plan, run
from mteo_deploy.schedules import SCHEDULES, EDMLevels, FlowLevels, Levels, NoiseLevels
from mteo_deploy.solvers import SOLVERS

Array = NDArray[np.float64]
LEVELS = NoiseLevels.from_alphas_cumprod(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))


EDM = EDMLevels(sigma_data=0.5)
LEVELS_OF: dict[str, Levels] = dict.fromkeys(PREDICTION_TYPES, LEVELS) | {"edm": EDM, "flow_prediction": FlowLevels()}
OF_NOISE = [name for name in PREDICTION_TYPES if name != "flow_prediction"]


def output_for(prediction_type: str, x: Array, denoised: Array, sigma: float) -> Array:
    """What a network of that type puts out at ``x = x0 + sigma noise`` when it means ``denoised``, from its definition."""
    eps = (x - denoised) / sigma
    alpha, noise_level = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    total = sigma**2 + EDM.sigma_data**2
    return {
        "epsilon": eps,
        "sample": denoised,
        "v_prediction": alpha * eps - noise_level * denoised,
        "edm": (denoised - EDM.sigma_data**2 / total * x) / (sigma * EDM.sigma_data / math.sqrt(total)),
    }[prediction_type]


def denoise(x: Array, sigma: float) -> Array:
    """A denoiser that is linear in nothing."""
    return np.tanh(x / (1 + sigma)) + 0.1 * np.cos(sigma)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("prediction_type", OF_NOISE)
@pytest.mark.parametrize("name", SOLVERS)
def test_plan_run_is_the_solver(name: str, prediction_type: str, zero: bool) -> None:
    levels = LEVELS_OF[prediction_type]
    points = [*schedules.grid("polynomial", 4, levels.high, 0.1, levels), 0.0] if zero else None
    plan = compile_plan(levels, steps=5, solver=name, prediction_type=prediction_type, points=points)
    noise = np.random.default_rng(1).standard_normal((4, 3))
    rows = plan.evaluations

    def network(i: int, y: Array) -> Array:
        sigma = rows[i].sigma
        x = y * math.sqrt((EDM.sigma_data**2 if prediction_type == "edm" else 1) + sigma**2)
        return output_for(prediction_type, x, denoise(x, sigma), sigma)

    def evaluate(x: Array, sigma: float) -> Array:
        denoised = denoise(x, sigma)
        return denoised if SOLVERS[name].keeps == "D" else (x - denoised) / sigma

    expected = SOLVERS[name].solve(noise * plan.sigmas[0], np.array(plan.sigmas), evaluate)
    np.testing.assert_allclose(run(plan, noise, network)[-1], expected, rtol=1e-9, atol=1e-9)
    assert rows[-1].time_point == 5 and plan.sigmas[-1] == pytest.approx(0.0 if zero else levels.low, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].keeps == "d"])
def test_flow_plan_is_the_solver_on_the_velocity(name: str) -> None:
    """Time from 1 to 0: the network's output is the slope, its input the state, its time ``1000 t``."""
    plan = compile_plan(FlowLevels(shift=3.0), steps=5, solver=name, prediction_type="flow_prediction")
    noise = np.random.default_rng(1).standard_normal((4, 3))
    rows = plan.evaluations

    def velocity(x: Array, t: float) -> Array:
        return x - denoise(x, t)

    expected = SOLVERS[name].solve(noise, np.array(plan.sigmas), velocity)
    found = run(plan, noise, lambda i, y: velocity(y, rows[i].timestep / 1000))
    np.testing.assert_allclose(found[-1], expected, rtol=1e-12, atol=1e-12)
    uniform = np.linspace(1, 0, 6)
    np.testing.assert_allclose(plan.sigmas, 3 * uniform / (1 + 2 * uniform), rtol=1e-12)


@pytest.mark.parametrize("prediction_type", OF_NOISE)
@pytest.mark.parametrize("sigma", [0.01, 1.0, 80.0])
def test_denoised_coefficients_invert_the_definition(prediction_type: str, sigma: float) -> None:
    levels, x, denoised = LEVELS_OF[prediction_type], np.array([0.3, -1.2]), np.array([0.8, 0.5])
    p, q = denoised_coefficients(prediction_type, sigma, levels)
    found = p * x / levels.scale(sigma) + q * output_for(prediction_type, x, denoised, sigma)
    np.testing.assert_allclose(found, denoised, rtol=0, atol=1e-13 * (1 + sigma) ** 2)


def test_denoised_coefficients_of_flow() -> None:
    x0, noise, t = np.array([0.3, -1.2]), np.array([0.8, 0.5]), 0.7
    p, q = denoised_coefficients("flow_prediction", t, FlowLevels())
    np.testing.assert_allclose(p * ((1 - t) * x0 + t * noise) + q * (noise - x0), x0, rtol=1e-14)


@pytest.mark.parametrize("name", SOLVERS)
def test_state_keeps_unit_variance(name: str) -> None:
    """Data of variance 1: the exact state is ``noise * initial_scale`` at all noise levels, up to the solver's error."""
    plan = compile_plan(LEVELS, steps=200, solver=name)
    noise = np.array([1.0])
    states = run(plan, noise, lambda i, y: y * plan.evaluations[i].sigma / math.sqrt(1 + plan.evaluations[i].sigma ** 2))
    at_points = [float(y[0]) for y, e in zip(states, plan.evaluations, strict=True) if e.time_point is not None]
    tolerance = 0.05 if name in ("euler", "deis-2", "deis-3", "deis-4") else 2e-3  # the first steps from sigma 80 are long
    np.testing.assert_allclose(at_points[:-1], plan.initial_scale, rtol=tolerance)
    np.testing.assert_allclose(at_points[-1], plan.initial_scale * math.sqrt(1 + plan.sigmas[-1] ** 2), rtol=tolerance)
    assert plan.initial_scale == pytest.approx(plan.sigmas[0] / math.hypot(1, plan.sigmas[0]), rel=1e-15)


@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp-2m"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "substeps"), [(1, 18), (3, 6), (4, 5), (7, 3)])
def test_reference_grid_contains_the_plan(solver: str, schedule: str, steps: int, substeps: int) -> None:
    plan = compile_plan(LEVELS, steps=steps, solver=solver, schedule=schedule)
    fine = reference_plan(plan, LEVELS, substeps)
    assert fine.steps == steps * substeps and fine.solver == "heun"
    np.testing.assert_allclose(fine.sigmas[::substeps], plan.sigmas, rtol=1e-12)
    reached = [e.time_point for e in fine.evaluations if e.time_point is not None]
    assert reached == list(range(1, steps * substeps + 1))


@pytest.mark.parametrize("name", SOLVERS)
def test_reference_trajectory_meets_a_fine_solution_of_its_ode(name: str) -> None:
    """The reference's states at the plan's points agree with the exact states of the Gaussian ODE."""
    plan = compile_plan(LEVELS, steps=4, solver=name)
    fine = reference_plan(plan, LEVELS, 50)
    c = 0.25
    states = run(
        fine,
        np.array([1.0]),
        lambda i, y: (
            y * fine.evaluations[i].sigma * math.sqrt(1 + fine.evaluations[i].sigma ** 2) / (c + fine.evaluations[i].sigma ** 2)
        ),
    )
    sigma = np.array(plan.sigmas)
    exact = sigma[0] * np.sqrt((c + sigma[1:] ** 2) / (c + sigma[0] ** 2)) / np.sqrt(1 + sigma[1:] ** 2)
    exact[-1] *= math.sqrt(1 + sigma[-1] ** 2)
    found = [float(states[i][0]) for i, e in enumerate(fine.evaluations) if e.time_point is not None and e.time_point % 50 == 0]
    np.testing.assert_allclose(found, exact, rtol=2e-3)


@pytest.mark.parametrize("name", SOLVERS)
def test_json_round_trip_is_exact(name: str) -> None:
    plan = compile_plan(LEVELS, steps=4, solver=name, prediction_type="v_prediction")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(st.integers(1, 12), st.sampled_from(list(SOLVERS)), st.floats(1.0, 100.0), st.floats(0.011, 0.5))
def test_plans_of_any_range(steps: int, solver: str, sigma_max: float, sigma_min: float) -> None:
    plan = compile_plan(LEVELS, steps=steps, solver=solver, sigma_max=sigma_max, sigma_min=sigma_min)
    assert len(plan.evaluations) == steps * SOLVERS[solver].evaluations_per_interval
    reaches = {"euler": 0, "ipndm-3": 2, "ipndm-4": 3, "deis-3": 2, "deis-4": 3, "deis-log-3": 2, "dpmpp-3m": 2}
    assert plan.history <= reaches.get(solver, {"unipc-2": 2, "unipc-3": 3}.get(solver.removesuffix("-bh1"), 1))
    assert all(a > b for a, b in zip(plan.sigmas[:-1], plan.sigmas[1:], strict=True))
    assert all(np.isfinite([e.keep_state, e.keep_output, e.carry, *e.weights]).all() for e in plan.evaluations)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_timesteps_are_the_trained_ones_at_trained_noise_levels() -> None:
    np.testing.assert_allclose(LEVELS.timestep(LEVELS.sigma[[0, 17, 500, 999]]), [0, 17, 500, 999], rtol=0, atol=1e-9)
    between = LEVELS.timestep(np.sqrt(LEVELS.sigma[[10]] * LEVELS.sigma[[11]]))
    np.testing.assert_allclose(between, [10.5], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"solver": "rk45"}, "dpmpp-2m"),
        ({"schedule": "cosine"}, "logsnr"),
        ({"prediction_type": "score"}, "v_prediction"),
        ({"steps": 0}, "--steps 4"),
        ({"steps": -3}, "found -3"),
        ({"sigma_max": 1e4}, r"inside the backbone's \[0.01, "),
        ({"sigma_min": 1e-5}, r"inside the backbone's \[0.01, "),
        ({"sigma_max": 0.5, "sigma_min": 0.5}, "sigma_min < sigma_max"),
        ({"sigma_max": math.nan}, "sigma_max=nan"),
        ({"points": [200.0, 3.0, 1.0, 0.5, 0.1]}, "inside the backbone's"),
        (
            {"levels": FlowLevels(), "solver": "unipc-2", "prediction_type": "flow_prediction"},
            "deis-2.*flow-matching.*'unipc-2'",
        ),
        ({"prediction_type": "edm"}, "v_prediction"),
    ],
)
def test_bad_arguments_name_the_choices(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        compile_plan(**{"levels": LEVELS, "steps": 4, **arguments})


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("solver"),
        lambda data: data.update(initial_scale=1.0),
        lambda data: data.update(sigmas=["0x1.zp0"]),
        lambda data: data.update(steps=None),
        lambda data: data["evaluations"][0].pop("carry"),
        lambda data: data["evaluations"].append("text"),
        lambda data: data.update(evaluations=3),
    ],
)
def test_malformed_json_is_a_bundle_error(damage: Any) -> None:
    data = compile_plan(LEVELS, steps=2).to_json()
    damage(data)
    with pytest.raises(BundleError, match="export again"):
        Plan.from_json(data)


@pytest.mark.parametrize("data", [None, [], "plan", 3])
def test_json_of_another_kind_is_a_bundle_error(data: Any) -> None:
    with pytest.raises(BundleError):
        Plan.from_json(data)


def test_schedules_have_their_ends_and_shapes() -> None:
    def grid(name: str) -> Array:
        return schedules.grid(name, 9, 80.0, 0.02, LEVELS)

    for name in SCHEDULES:
        np.testing.assert_allclose(grid(name)[[0, -1]], [80.0, 0.02], rtol=1e-12)
    for steps in (grid("polynomial") ** (1 / 7), np.log(grid("logsnr")), LEVELS.timestep(grid("time-uniform"))):
        np.testing.assert_allclose(np.diff(steps), np.diff(steps)[0], rtol=1e-9)


@pytest.mark.parametrize("levels", [LEVELS, EDM, FlowLevels(timesteps=1.0)])
def test_time_is_invertible(levels: Levels) -> None:
    sigma = np.array([0.05, 0.3, 0.9])
    np.testing.assert_allclose(levels.sigma_at(levels.timestep(sigma)), sigma, rtol=1e-12)


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_refine_cuts_every_interval(rho: float) -> None:
    fine = schedules.refine(np.array([80.0, 3.0, 0.0]), 4, rho)
    np.testing.assert_array_equal(fine[::4], [80.0, 3.0, 0.0])
    roots = fine ** (1 / rho)
    np.testing.assert_allclose(np.diff(roots[:5]), (roots[4] - roots[0]) / 4, rtol=1e-12)
    assert np.all(np.diff(fine) < 0)


def test_trace_of_heun_is_the_trapezoid() -> None:
    """One interval by hand: ``x + h (d + d') / 2`` with ``d'`` evaluated at ``x + h d``."""
    traced = solvers.trace(SOLVERS["heun"], np.array([2.0, 0.5]))
    np.testing.assert_allclose(traced.states[1].weights, [1, -1.5, 0], rtol=0, atol=0)
    np.testing.assert_allclose(traced.last.weights, [1, -0.75, -0.75], rtol=0, atol=0)
