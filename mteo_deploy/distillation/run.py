"""``distill``: reference trajectories, training, and the embedding set that is written.

By default one delta per (evaluation, site), trained end to end through all evaluations of the plan, because an error made early
is then paid for where it shows. The other ways are options of the recipe; docs/distillation.md has what they gave.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mteo_deploy.distillation.losses import Features
from mteo_deploy.distillation.parallel import Processes, device_of
from mteo_deploy.distillation.placement import Use, placed
from mteo_deploy.distillation.recipe import DEFAULT, Recipe
from mteo_deploy.distillation.student import Student, check_start, start_plan
from mteo_deploy.distillation.training import error, train
from mteo_deploy.distillation.trajectories import Trajectories, digest, reference_trajectories
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, embeddings_at, load_backbone
from mteo_deploy.exporters.check_adapter import check_adapter
from mteo_deploy.exporters.fake_quantize import FakeQuantised, Quantised, quantised_layers
from mteo_deploy.exporters.guidance import guided
from mteo_deploy.exporters.text import prompt_requests
from mteo_deploy.files import check_file
from mteo_deploy.plan import Plan, reference_plan
from mteo_deploy.progress import Reporter, reporter
from mteo_deploy.requests import Arrays, draw_all, read


def _requests(adapter: Adapter, requests: Path | str | Arrays | None) -> Arrays | None:
    """What trajectories draw from; None for random class labels.

    Raises:
        InputError: when the backbone wants what cannot be drawn at random, such as prompts.
    """
    wanted = [request.name for request in adapter.requests if request.high is None and request.default is None]
    if requests is None and wanted:
        raise InputError(
            f"expected values of {', '.join(wanted)} to learn from (prompt embeddings, say); pass --requests FILE, an npz with "
            "an array [rows, ...] for each, or --prompts FILE"
        )
    found = read(Path(requests)) if isinstance(requests, (Path, str)) else requests
    if found is not None:
        draw_all(adapter.requests, 1, 0, found)  # said before the work
    return found


def _named(features: Features | None, recipe: Recipe) -> str | None:
    """The name a feature network goes by in a checkpoint's key.

    Raises:
        InputError: when there is one without a weight, or a weight without one.
    """
    if (features is None) != (recipe.feature_weight == 0):
        raise InputError(
            "expected a feature_weight above 0 together with a callable, mteo_deploy.distill(features=...); "
            f"found feature_weight {recipe.feature_weight} and {'no features' if features is None else 'features'}"
        )
    return None if features is None else getattr(features, "__qualname__", type(features).__qualname__)


def distill(
    model: Path | str | Adapter,
    output: Path | str,
    *,
    steps: int | None = None,
    solver: str = "euler",
    schedule: str | Sequence[float] | None = None,
    recipe: Recipe = DEFAULT,
    requests: Path | str | Arrays | None = None,
    init: Path | str | None = None,
    features: Features | None = None,
    cache: Path | str | None = None,
    device: str | None = None,
    guidance_scale: float | None = None,
    null_class: int | None = None,
    prompts: Path | str | Sequence[str] | None = None,
    reference_limit: int | None = None,
    quiet: bool = False,
) -> EmbeddingSet:
    """Learn an embedding set and write it to ``output``.

    Started by ``accelerate launch`` or ``torchrun``, several processes share the work: see ``parallel.py``.

    Args:
        model: diffusers pipeline directory, or a backbone that :func:`~mteo_deploy.exporters.base.load_backbone` gave; its
            network is frozen.
        output: the ``.safetensors`` file to write; a checkpoint lies beside it while the run lasts, and a second call
            with the same arguments goes on from there.
        steps: intervals of the schedule (evaluations, for solvers with one evaluation per interval); None for those of a
            ``schedule`` of noise levels.
        schedule: where the time points lie: a name, or ``steps + 1`` noise levels; None for the backbone's default.
        requests: what the backbone wants beside the noise, to learn from: an npz file or arrays ``[rows, ...]`` by name, of
            which trajectories draw rows. None draws at random, which only class labels allow.
        init: an embedding set to start from, of as many evaluations and the same sites; it may be another backbone's, such as
            this one's before it was trained further.
        features: images ``[batch, channels, height, width]`` to features, differentiable and on ``device``, whose distance
            counts with the recipe's ``feature_weight``.
        cache: a directory that keeps reference trajectories for runs that share them, mapped, not in memory; None: nothing is
            kept.
        device: ``cpu`` or ``cuda``; None for what torch has.
        guidance_scale: of classifier-free guidance, in the reference trajectories as in what is learned; None for none.
        null_class: the label of no class, where the backbone does not know its own.
        prompts: in place of ``requests``, for a pipeline with CLIP text encoders: a file with a prompt on each line, or the
            texts; under guidance the negative branch gets the empty prompt (SDXL: zeros, where the pipeline says so).
        reference_limit: bytes that reference trajectories may take: in ``cache``, with those that are there, or in memory.

    Returns:
        The set; its ``training`` holds the parameters trained, the time, and the error before and after.

    Raises:
        InputError: for a model that is not supported, an adapter that is not its network, or arguments no plan can be made of
            or that exclude each other.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise InputError(f"expected an output file ending in .safetensors; found {output}")
    check_file(output)
    if prompts is not None and requests is not None:
        raise InputError("expected --prompts or --requests; found both; leave one out")
    feature_name = _named(features, recipe)
    processes = Processes(device_of(device))
    loaded = model if isinstance(model, Adapter) else load_backbone(Path(model))
    check_adapter(loaded)
    adapter = guided(loaded, guidance_scale, null_class)
    plan = plain = adapter.compile_plan(steps, solver, schedule)
    fingerprint = adapter.fingerprint()
    given = _requests(adapter, requests if prompts is None else prompt_requests(adapter, prompts))
    first, begun = None, None
    if init is not None:
        first = EmbeddingSet.load(Path(init))
        check_start(first, adapter, plan, recipe)
        plan = start_plan(first, plan, recipe)
        begun = {"sha256": first.sha256(), "backbone": first.backbone}
    guidance = None if guidance_scale is None else {"scale": guidance_scale, "null_class": null_class}
    depends = [fingerprint, plan.to_json(), asdict(recipe), digest(given), begun, feature_name, guidance]
    key = json.dumps(depends, sort_keys=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = output.with_suffix(".checkpoint.safetensors")
    with reporter(quiet or not processes.main) as report:
        layers = _quantised(adapter, plan, recipe, first, report)
        with placed(adapter, processes.device) as use:
            student = Student(adapter, plan, recipe)
            if first is not None:
                student.start_from(first)
            clock = time.monotonic()
            everything = _references(adapter, plan, recipe, report, processes, given, cache, reference_limit)
            reference_seconds = time.monotonic() - clock
            with quantising(student, layers):
                learned = _learn(student, everything, checkpoint, key, use, report, processes, features)
            deltas = student.deltas()
    count = sum(parameter.numel() for parameter in student.parameters())
    training = {
        "recipe": asdict(recipe),
        "guidance": guidance,
        "reference": {
            "solver": recipe.teacher,
            "evaluations": len(reference_plan(plan, adapter.levels, recipe.substeps(plan), recipe.teacher).evaluations),
            "seconds": round(reference_seconds, 1),
        },
        "parameters": count,
        "share_of_backbone": count / adapter.parameter_count,
        "processes": processes.count,
        **learned,
        **({} if begun is None else {"init": begun}),
        **({"plain_plan": plain.to_json()} if recipe.learn or plan is not plain else {}),
        **({} if (note := adapter.scheduler_left_out(plan.solver)) is None else {"scheduler_left_out": note}),
        **({} if layers is None else {"quantised": {"layers": len(layers.scales), "left_in_float32": layers.left}}),
    }
    result = EmbeddingSet(deltas, student.plan, fingerprint, training)
    if processes.main:
        result.save(output)
        checkpoint.unlink(missing_ok=True)
    processes.wait()
    return result


def _quantised(adapter: Adapter, plan: Plan, recipe: Recipe, first: EmbeddingSet | None, report: Reporter) -> Quantised | None:
    """What the recipe's precision quantises of the backbone, with scales of the set that one starts from; None in float32."""
    if recipe.precision == "fp32":
        return None
    task = report.task("calibrating", 1)
    deltas = None if first is None else first.deltas
    found = quantised_layers(adapter, plan, lambda i: embeddings_at(adapter, plan, i, deltas), recipe.precision, recipe.keep)
    report.advance(task)
    return found


@contextmanager
def quantising(student: Student, layers: Quantised | None) -> Iterator[None]:
    """The student's backbone with its layers fake quantised; as it is where there are none."""
    if layers is None:
        yield
        return
    with FakeQuantised(student.adapter[0].network, layers) as quantised:
        student.quantised = quantised
        try:
            yield
        finally:
            student.quantised = None


def _references(
    adapter: Adapter,
    plan: Plan,
    recipe: Recipe,
    report: Reporter,
    processes: Processes,
    given: Arrays | None,
    cache: Path | str | None,
    limit: int | None,
) -> Trajectories:
    """Reference trajectories: those that are held out, then those that are learned from."""
    count = _held_out(recipe) + recipe.trajectories
    task = report.task("reference trajectories", count // processes.count)
    return reference_trajectories(
        adapter,
        plan,
        count=count,
        seed=recipe.seed,
        batch=recipe.batch,
        substeps=recipe.substeps(plan),
        progress=lambda n: report.advance(task, n),
        given=given,
        teacher=recipe.teacher,
        processes=processes,
        cache=None if cache is None else Path(cache),
        limit=limit,
    )


def _held_out(recipe: Recipe) -> int:
    return max(16, recipe.trajectories // 8)


def _learn(
    student: Student,
    everything: Trajectories,
    checkpoint: Path,
    key: str,
    use: Use,
    report: Reporter,
    processes: Processes,
    features: Features | None,
) -> dict[str, Any]:
    """Train the student; the seconds it took, and its error on what is held out, before and after."""
    recipe, count = student.recipe, _held_out(student.recipe)
    learn_from, test = everything.take(slice(count, None)), everything.take(slice(count))
    before = error(student, test, recipe.batch, processes.device)
    if recipe.weights == "bf16":
        use(torch.bfloat16)
    seconds = train(student, learn_from, checkpoint, key, report, processes, features)
    if recipe.weights == "bf16":
        use(torch.float32)
    after = error(student, test, recipe.batch, processes.device)
    return {"seconds": round(seconds, 1), "error_before": before, "error_after": after}
