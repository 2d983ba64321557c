"""The recipe's options: each learns, what is saved draws what the student drew, and what excludes each other is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from helpers import relative, torch_states

from mteo_deploy.benchmarking import bench
from mteo_deploy.distillation import Recipe, distill, losses, trajectories
from mteo_deploy.distillation.learned_plan import SCHEDULE, LearnedPlan
from mteo_deploy.distillation.parallel import Processes, device_of
from mteo_deploy.distillation.student import Student
from mteo_deploy.distillation.trajectories import reference_trajectories
from mteo_deploy.embeddings import EmbeddingSet, merge
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone, site_dict
from mteo_deploy.exporters.dit import DiTAdapter
from mteo_deploy.exporters.export import export
from mteo_deploy.numerics import relative_error
from mteo_deploy.plan import compile_plan, run
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.schedules import FlowLevels

BOTH = ("points", "coefficients")
QUICK = Recipe(trajectories=24, iterations=6, batch=8, teacher_evaluations=12)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference trajectories that the tests share."""
    return tmp_path_factory.mktemp("trajectories")


@pytest.mark.parametrize(
    ("options", "solver", "numbers"),
    [
        ({}, "euler", None),
        ({"share": "step"}, "euler", 2 * 64),
        ({"share": "time"}, "euler", 2),
        ({"objective": "stepwise", "lr": 0.02, "iterations": 20}, "euler", None),
        ({"loss": "squared"}, "euler", None),
        ({"teacher": "dpm-solver-2"}, "euler", None),
        ({"share": "step", "learn": ("points",)}, "dpmpp-2m", 2 * 64 + 2),
        ({"share": "time", "learn": BOTH}, "ipndm-2", 2 + 2 + 2 * 3),
        ({"learn": ("coefficients",)}, "heun", None),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else str(value),
)
def test_options(
    options: dict[str, Any],
    solver: str,
    numbers: int | None,
    tiny_model: Path,
    tiny_adapter: Adapter,
    cache: Path,
    tmp_path: Path,
) -> None:
    """The error falls; the file that is saved, run as any embedding set, has the error that was reported."""
    recipe = replace(QUICK, **options)
    distill(tiny_model, tmp_path / "e.safetensors", steps=2, solver=solver, recipe=recipe, cache=cache, quiet=True)
    found = EmbeddingSet.load(tmp_path / "e.safetensors")
    found.check(tiny_adapter.fingerprint(), site_dict(tiny_adapter.sites))
    assert found.training["recipe"] == json.loads(json.dumps(recipe.__dict__))
    assert found.training["error_after"] < found.training["error_before"]
    assert numbers in (None, found.training["parameters"])
    assert found.training["reference"] == found.training["reference"] | {"solver": recipe.teacher, "evaluations": 12}
    assert found.plan.schedule == (SCHEDULE if "points" in recipe.learn else "polynomial")
    assert (found.plan == found.plain_plan) == (not recipe.learn)
    told = {(): "polynomial schedule", ("coefficients",): "polynomial schedule, learned coefficients"}
    assert found.plan.summary(found.plain_plan) == f"{solver}, 2 steps, {told.get(recipe.learn, 'learned schedule')}"
    test = reference_trajectories(
        tiny_adapter,
        tiny_adapter.compile_plan(2),
        count=40,
        seed=recipe.seed,
        batch=8,
        substeps=recipe.substeps(found.plan),
        progress=lambda n: None,
        teacher=recipe.teacher,
        cache=cache,
    ).take(slice(16))
    images = torch_states(tiny_adapter, found, test.noise.numpy())[-1]
    assert found.training["error_after"] == pytest.approx(float(np.square(images - test.states[-1].numpy()).mean()), rel=1e-3)
    if recipe.share == "step":
        first, *others = found.deltas.values()
        assert np.abs(first).max() > 0 and all(np.array_equal(first, other) for other in others)


def test_trajectories_are_computed_once(tiny_model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = distill(tiny_model, tmp_path / "a.safetensors", steps=2, recipe=QUICK, cache=cache, quiet=True)
    monkeypatch.setattr(trajectories, "run", None)
    again = distill(tiny_model, tmp_path / "b.safetensors", steps=2, recipe=QUICK, cache=cache, quiet=True)
    assert all(np.array_equal(before.deltas[name], again.deltas[name]) for name in before.deltas)
    with pytest.raises(TypeError):  # of another teacher they are others
        distill(
            tiny_model, tmp_path / "c.safetensors", steps=2, recipe=replace(QUICK, teacher="euler"), cache=cache, quiet=True
        )


# --- the plan's own numbers ---


def test_learned_points_have_the_derivatives_of_euler(tiny_adapter: Adapter) -> None:
    """Of the closed form carry = s(t)/s(t'), weight = (t' - t)/s(t') with s = sqrt(1 + t^2), and the timestep's slope."""
    levels, plan = tiny_adapter.levels, tiny_adapter.compile_plan(3)
    learned = LearnedPlan(plan, levels, ["points"])
    assert learned.gaps is not None
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    (learned.numbers() * mix).sum().backward()
    found = learned.gaps.grad
    gaps = learned.gaps.detach().clone().requires_grad_()
    first, last = (s ** (1 / 7) for s in (plan.sigmas[0], plan.sigmas[-1]))
    inner = (first - (first - last) * torch.cumsum(torch.softmax(gaps, 0), 0)[:-1]) ** 7
    points = torch.cat([torch.tensor(plan.sigmas[:1]), inner, torch.tensor(plan.sigmas[-1:])]).double()
    scales = torch.cat([(1 + points[:-1] ** 2).sqrt(), torch.ones(1, dtype=torch.float64)])
    logs = np.log(points.detach().numpy())
    slopes = (levels.timestep(np.exp(logs + 1e-6)) - levels.timestep(np.exp(logs - 1e-6))) / 2e-6
    timesteps = torch.from_numpy(slopes[:-1]) * points[:-1].log()
    columns = {0: timesteps, 3: scales[:-1] / scales[1:], 4: (points[1:] - points[:-1]) / scales[1:]}
    total = sum((mix[:, i] * column).sum() for i, column in columns.items())
    assert isinstance(total, torch.Tensor)
    total.backward()
    assert gaps.grad is not None and float(gaps.grad.abs().min()) > 0.01
    torch.testing.assert_close(found, gaps.grad, rtol=1e-4, atol=0)


@pytest.mark.parametrize("solver", ["euler", "heun", "ipndm-3", "unipc-3", "deis-3"])
def test_learned_plan_begins_as_the_plan(solver: str, tiny_adapter: Adapter) -> None:
    plan = tiny_adapter.compile_plan(3, solver)
    learned = LearnedPlan(plan, tiny_adapter.levels, BOTH).plan()
    np.testing.assert_allclose(learned.sigmas, plan.sigmas, rtol=1e-12)
    assert (learned.sigmas[0], learned.sigmas[-1], learned.solver) == (plan.sigmas[0], plan.sigmas[-1], plan.solver)
    for found, expected in zip(learned.evaluations, plan.evaluations, strict=True):
        for name in ("timestep", "keep_state", "keep_output", "carry", "weights"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    assert json.dumps(learned.to_json())


def test_learned_points_stay_in_order_and_may_end_at_zero() -> None:
    plan = compile_plan(FlowLevels(), steps=4, prediction_type="flow_prediction")
    learned = LearnedPlan(plan, FlowLevels(), ["points"])
    assert learned.gaps is not None
    with torch.no_grad():
        learned.gaps += torch.tensor([3.0, -3.0, 5.0, 0.0])
    sigmas = learned.plan().sigmas
    assert sigmas[0] == 1.0 and sigmas[-1] == 0.0 and all(np.diff(sigmas) < 0)


def test_one_step_has_no_point_to_learn(tiny_adapter: Adapter) -> None:
    with pytest.raises(InputError, match="--steps of 2 or more with --learn points"):
        LearnedPlan(tiny_adapter.compile_plan(1), tiny_adapter.levels, ["points"])


def test_a_learned_plan_ships(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    """Exported and sampled as any other set: the engine's images are torch's. What it is held against keeps its own numbers."""
    recipe = replace(QUICK, share="time", learn=BOTH)
    found = distill(tiny_model, tmp_path / "e.safetensors", steps=2, solver="ipndm-2", recipe=recipe, cache=cache, quiet=True)
    bundle = export(
        tmp_path / "b", model=tiny_model, embeddings=tmp_path / "e.safetensors", realisations=("table",), quiet=True
    )
    build(bundle, engine="onnxruntime", realisation="table", threads=1, quiet=True)
    adapter = load_backbone(tiny_model)
    expected = torch_states(adapter, found, noise_for(adapter.sample_shape, 3, range(2)))[-1]
    plain = adapter.compile_plan(2, "ipndm-2")
    assert bundle.plain_plan == merge([found], weights=[0.5]).plain_plan == plain and bundle.plan.schedule == SCHEDULE
    with Sampler.load(bundle.path) as sampler:
        assert relative(sampler(num=2, seed=3), expected) < 1e-4
        images, reference = (sampler.conditioned(one, num=4, seed=0, batch=4) for one in (plain, sampler.reference_plan))
    benched = bench([bundle.path], plain=True, num=4, seconds=0.1, quiet=True)
    assert [p.error for p in benched.points if p.plain] == [pytest.approx(relative_error(images, reference), rel=1e-5)]


# --- objectives and losses ---


@pytest.mark.parametrize("solver", ["euler", "ipndm-3", "heun"])
def test_stepwise_gradients_stop_at_time_points(solver: str, tiny_adapter: Adapter) -> None:
    plan = tiny_adapter.compile_plan(3, solver)
    each = len(plan.evaluations) // 3
    noise = torch.randn(2, *tiny_adapter.sample_shape, generator=torch.Generator().manual_seed(0))
    reach = {}
    for name in ("end-to-end", "stepwise"):
        student = Student(tiny_adapter, plan, Recipe(objective=name))
        states = student(noise, {})
        states[-1].square().mean().backward()
        assert student.delta.grad is not None
        reach[name] = [bool(gradient.abs().max() > 0) for gradient in student.delta.grad]
    assert reach == {"end-to-end": [True] * 3 * each, "stepwise": [False] * 2 * each + [True] * each}


def test_losses() -> None:
    a, b = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    d = 64
    c = 0.00054 * math.sqrt(d)
    expected = np.mean([math.sqrt(float((x - y).square().sum()) + c * c) - c for x, y in zip(a, b, strict=True)])
    assert float(losses.distance("pseudo-huber", a, b)) == pytest.approx(expected / math.sqrt(d), rel=1e-12)
    assert float(losses.distance("squared", a, b)) == pytest.approx(float((a - b).square().mean()), rel=1e-12)
    assert float(losses.distance("absolute", a, b)) == pytest.approx(float((a - b).abs().mean()), rel=1e-12)


def test_features_of_the_image_count(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    """Their distance with its weight, beside the state's; the reference's features get no gradient; they are asked for."""
    states = [torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2)]
    targets = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    asked: list[torch.Size] = []

    def mean_of_rows(images: torch.Tensor) -> torch.Tensor:
        asked.append(images.shape)
        return images.mean(dim=3)

    plan = load_backbone(tiny_model).compile_plan(2)
    recipe = replace(QUICK, loss="squared", feature_weight=3.0)
    found = losses.objective(states, targets, plan, recipe, mean_of_rows)
    first, last = ((s - t).square().mean() for s, t in zip(states, targets, strict=True))
    rows = (states[1].mean(3) - targets[1].mean(3).detach()).square().mean()
    expected = last + 0.1 * first + 3.0 * rows
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, (states[1], targets), retain_graph=True) for value in (found, expected)]
    torch.testing.assert_close(*gradients)
    asked.clear()
    distill(tiny_model, tmp_path / "e.safetensors", steps=2, recipe=recipe, features=mean_of_rows, cache=cache, quiet=True)
    assert asked == [torch.Size([8, 1, 8, 8])] * (2 * recipe.iterations)


@pytest.mark.parametrize(("weight", "features"), [(0.0, torch.abs), (1.0, None)])
def test_features_go_with_a_weight(weight: float, features: Any, tiny_model: Path, tmp_path: Path) -> None:
    recipe = replace(QUICK, feature_weight=weight)
    with pytest.raises(InputError, match="feature_weight above 0 together with a callable"):
        distill(tiny_model, tmp_path / "e.safetensors", steps=2, recipe=recipe, features=features)


# --- where it starts ---


@pytest.mark.parametrize(("iterations", "moved"), [(1, False), (2, True)])
def test_coefficients_rest_for_half_of_the_iterations(
    iterations: int, moved: bool, tiny_model: Path, cache: Path, tmp_path: Path
) -> None:
    """Not so points, nor vectors."""
    both = replace(QUICK, learn=BOTH, iterations=iterations)
    found = distill(tiny_model, tmp_path / "a.safetensors", steps=2, recipe=both, cache=cache, quiet=True)
    levels = load_backbone(tiny_model).levels
    compiled = compile_plan(levels, steps=2, prediction_type="epsilon", points=found.plan.sigmas)
    weights = [[w for e in plan.evaluations for w in (e.carry, *e.weights)] for plan in (found.plan, compiled)]
    assert (weights[0] != pytest.approx(weights[1], rel=1e-6)) is moved
    assert found.plan.sigmas != found.plain_plan.sigmas and all(np.abs(rows).max() > 0 for rows in found.deltas.values())


def test_init(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    """It starts where the other set ended, though that was another backbone's, and says so."""
    first = distill(tiny_model, tmp_path / "a.safetensors", steps=2, recipe=QUICK, cache=cache, quiet=True)
    path, other = tmp_path / "c.safetensors", tmp_path / "b.safetensors"
    replace(first, backbone="f" * 64).save(other)
    go_on = replace(QUICK, iterations=1, lr=1e-9)
    second = distill(tiny_model, path, steps=2, recipe=go_on, init=other, cache=cache, quiet=True)
    assert second.training["error_before"] == pytest.approx(first.training["error_after"], rel=1e-5)
    assert second.training["init"] == {"sha256": first.sha256(), "backbone": "f" * 64}
    assert second.backbone == first.backbone
    learning = replace(QUICK, learn=("coefficients",), lr=1.0)
    moved = distill(tiny_model, tmp_path / "d.safetensors", steps=2, recipe=learning, cache=cache, quiet=True)
    for options, taken in (({}, True), ({"learn": ("coefficients",)}, True), ({"learn": ("points",)}, False)):
        recipe = replace(go_on, **options)
        third = distill(tiny_model, path, steps=2, recipe=recipe, init=tmp_path / "d.safetensors", cache=cache, quiet=True)
        assert (third.training["error_before"] == pytest.approx(moved.training["error_after"], rel=1e-5)) is taken
        assert third.plain_plan == moved.plain_plan == first.plan
    for options, steps, message in (
        ({"share": "step"}, 2, "--share none with --init"),
        ({}, 3, "set of 3 evaluations; found 2; pass --steps"),
    ):
        with pytest.raises(InputError, match=message):
            distill(tiny_model, path, steps=steps, recipe=replace(QUICK, **options), init=other, quiet=True)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "all"}, "--share out of none, step, time; found 'all'"),
        ({"objective": "both"}, "--objective out of end-to-end, stepwise"),
        ({"loss": "l1"}, "--loss out of squared, pseudo-huber, absolute"),
        ({"learn": ("weights",)}, "--learn out of points, coefficients; found 'weights'"),
        ({"teacher": "rk4"}, "expected a solver out of"),
        ({"teacher_evaluations": 0}, "--teacher-evaluations of 1 or more; found 0"),
        ({"feature_weight": -1.0}, "weights of 0 or more"),
        ({"objective": "stepwise", "learn": ("points",)}, "--objective end-to-end with --learn points"),
        ({"objective": "stepwise", "intermediate": 0.5}, "no weight of the intermediate states"),
        ({"learn": ("points",), "intermediate": 0.5}, "no weight of the intermediate states"),
    ],
)
def test_recipes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**options)


@pytest.mark.parametrize(
    ("teacher", "wanted", "evaluations"),
    [("heun", None, 40), ("euler", None, 40), ("heun", 30, 32), ("euler", 30, 32), ("heun", 1, 8)],
)
def test_teacher_evaluations_are_at_least_those_wanted(
    teacher: str, wanted: int | None, evaluations: int, tiny_adapter: Adapter
) -> None:
    plan = tiny_adapter.compile_plan(4)
    each = 2 if teacher == "heun" else 1
    found = Recipe(teacher=teacher, teacher_evaluations=wanted).substeps(plan) * 4 * each
    assert found == evaluations


def test_sites_with_embeddings_of_their_own_share_no_vector() -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "num_layers": 2}
    torch.manual_seed(0)
    network = DiTTransformer2DModel(**config, sample_size=8, patch_size=4, num_embeds_ada_norm=4)
    adapter = DiTAdapter(network, {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}).requires_grad_(False).eval()
    with pytest.raises(InputError, match="sites share one embedding for --share step; those of DiTTransformer2DModel differ"):
        Student(adapter, adapter.compile_plan(2), Recipe(share="step"))


# --- the device ---


def test_everything_follows_the_device(tiny_model: Path) -> None:
    """On the meta device, which refuses to meet a tensor of the CPU: embeddings, noise, times and learned numbers."""
    adapter = load_backbone(tiny_model).to("meta")
    for recipe in (Recipe(objective="stepwise"), Recipe(share="time", learn=BOTH)):
        student = Student(adapter, adapter.compile_plan(2, "ipndm-2"), recipe)
        states = student(torch.zeros(2, *adapter.sample_shape, device="meta"), {})
        assert [state.device.type for state in states] == ["meta", "meta"]


def test_device_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="--device cpu or cuda; found 'gpu'"):
        device_of("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(None) == torch.device("cpu")
    with pytest.raises(InputError, match="expected a GPU for --device cuda"):
        device_of("cuda")


def test_rows_are_shared_without_gap() -> None:
    processes = Processes(torch.device("cpu"))
    for count in (1, 2, 3):
        processes.count = count
        shares = []
        for processes.rank in range(count):
            shares += list(range(7))[processes.share(7)]
        assert shares == list(range(7))


def test_between_time_points(tiny_adapter: Adapter) -> None:
    """``run`` hands over the state and what was kept at the end of each interval of two evaluations, not inside."""
    seen: list[int] = []

    def between(value: Any) -> Any:
        seen.append(len(seen))
        return value

    plan = tiny_adapter.compile_plan(2, "heun")
    states = run(plan, np.ones(3), lambda i, y: 0.5 * y, between)
    assert len(seen) == 2 * (1 + min(2, plan.history + 1))
    np.testing.assert_array_equal(states[-1], run(plan, np.ones(3), lambda i, y: 0.5 * y)[-1])
