"""``verify``: the gate. Numbers against the stored torch reference, canaries, latency against ordinary conditioning, limits."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy import __version__, bisection, inspection, latency, numerics, pictures, waterfall
from mteo_deploy.costs import measure_costs
from mteo_deploy.errors import InputError
from mteo_deploy.gates import Budgets, against, check_comparable
from mteo_deploy.numerics import Check
from mteo_deploy.processors import in_words
from mteo_deploy.progress import reporter
from mteo_deploy.report import Report
from mteo_deploy.sampler import Sampler, noise_for

NO_BUDGETS = Budgets()


def measure(sampler: Sampler, batch: int, seconds: float) -> dict[str, Any]:
    """The sampler's realisation against ordinary time conditioning, interleaved, same backbone, same engine, same plan.

    ``step`` compares the engine calls alone (ours compute the solver's update too), ``sample`` the whole sampling loops
    (the ordinary one computes its update in numpy), ``loop`` our loop with its own engine calls. ``waterfall`` is one sampling.
    A decoder is part of none of them: ``decoder`` has its time beside the loop's.
    """
    plan = sampler.plan
    noise = noise_for(sampler.bundle.sample_shape, 0, range(batch))
    put, session, given = sampler.device.put, sampler.conditioned_session, sampler.bundle.reference_requests(batch)
    state, request = put(noise * np.float32(plan.initial_scale)), sampler.prepare(given)
    timesteps = [put(np.array([e.timestep], dtype=np.float32)) for e in plan.evaluations]
    requests = {name: put(values) for name, values in given.items()}

    def calls() -> None:
        np.asarray(sampler.loop.calls(state, request))  # waits for a device to finish

    def conditioned() -> None:
        outputs = [session.run({"state": state, "timestep": timestep, **requests})[0] for timestep in timesteps]
        np.asarray(outputs[-1])

    step = latency.compare(calls, conditioned, seconds=seconds / 3)
    sample = latency.compare(
        lambda: sampler.image(noise, given), lambda: sampler.conditioned_states(plan, noise, given), seconds=seconds / 3
    )
    loop = latency.compare(lambda: sampler.image(noise, given), calls, seconds=seconds / 3)
    found = {"step": step, "sample": sample, "loop": loop}
    decoder = sampler.decoder_share(noise, given, seconds / 6)
    doubts = [f"{name}: {doubt}" for name, one in found.items() for doubt in one.doubts]
    return {
        "batch": batch,
        "realisation": sampler.loop.name,
        "evaluations": len(plan.evaluations),
        "doubts": doubts,
        "waterfall": waterfall.record(sampler, noise, given, seconds=seconds / 10),
        **({"decoder": decoder} if decoder else {}),
        **{name: one.to_json(ratios=True) for name, one in found.items()},
    }


def environment(sampler: Sampler) -> dict[str, str]:
    """Versions, machine and options, in words."""
    found = {
        "mteo-deploy": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {in_words()}",
    }
    if sampler.built is not None:
        parts = sampler.built.record["parts"]
        found |= {"engine": f"{parts['engine']} {parts['engine_version']}", "machine": parts["machine"]}
        found["options"] = ", ".join(f"{name} {value}" for name, value in parts["options"].items())
    if sampler.device.notes:
        found["notes"] = "; ".join(sampler.device.notes)
    return found


def verify(
    bundle: Path | str | Sampler,
    *,
    engine: str = "auto",
    device: str | None = None,
    realisation: str | None = None,
    batch: int = 1,
    seconds: float = 3.0,
    budgets: Budgets = NO_BUDGETS,
    older: Report | None = None,
    bisect: bool = False,
    costs: bool = False,
    draw: bool = True,
    quiet: bool = False,
) -> Report:
    """Verify a bundle in an engine.

    Args:
        realisation: ``baked``, ``table`` or ``fused``; None for what the built engine was built for.
        batch: images per engine call in the latency part.
        seconds: time for the latency part; 0 leaves it out.
        budgets: limits on latency and error.
        older: a report to be no slower than.
        bisect: where an evaluation departs, find the first layer that does (:mod:`mteo_deploy.bisection`).
        costs: measure what sampling costs in all other ways too (:mod:`mteo_deploy.costs`); takes a minute or more.
        draw: keep images after every evaluation for a page or a picture; the reference trajectory only where it is cheap.

    Raises:
        InputError: for a budget without a latency part, a batch or time out of range, a report of something else, or
            ``bisect`` or ``costs`` of a sampler without a built engine.
        MissingPackageError: for ``bisect`` without onnx and onnxruntime.
        BundleError, EngineError: as :meth:`Sampler.load`.
    """
    if batch < 1 or seconds < 0:
        raise InputError(f"expected --batch of 1 or more and --seconds of 0 or more; found {batch} and {seconds}")
    if seconds == 0 and budgets.need_latency:
        raise InputError("expected --seconds above 0 with a latency budget; found --seconds 0")
    sampler = (
        bundle if isinstance(bundle, Sampler) else Sampler.load(bundle, engine=engine, device=device, realisation=realisation)
    )
    if sampler.built is not None:
        engine, device = sampler.built.backend.name, sampler.built.device
    found = Report(sampler.bundle.path.name, engine, device or "cpu", sampler.precision, [], environment=environment(sampler))
    if bisect:
        bisection.check_possible(sampler)
    if costs:
        sampler.built_engine("--costs")
    found = replace(found, compiler=inspection.compiler(sampler.bundle.manifest))
    if older is not None:  # said before the work, not after it
        planned = {"batch": batch, "evaluations": len(sampler.plan.evaluations)} if seconds > 0 else {}
        check_comparable(older, replace(found, latency=planned))
    tolerance, beside = numerics.tolerance_of(sampler.precision), numerics.tolerance_of(sampler.hint)
    checks: list[Check] = []
    parts: dict[str, Callable[[], list[Check]]] = {
        "noise": lambda: [numerics.seed_check(sampler)],
        "adapter": lambda: [numerics.adapter_check(sampler.bundle.manifest)],
        "evaluations": lambda: numerics.evaluation_checks(sampler, tolerance["evaluation"]),
        "trajectory": lambda: [numerics.trajectory_check(sampler, tolerance["trajectory"])],
        "other size": lambda: numerics.size_checks(sampler, tolerance["trajectory"]),
        "text encoder": lambda: numerics.text_checks(sampler, beside["evaluation"]),
        "decoder": lambda: numerics.decoder_checks(sampler, beside["evaluation"]),
        "canaries": lambda: numerics.canaries(sampler, tolerance["batch"]),
    }
    asked: dict[str, tuple[bool, Callable[[], Any]]] = {  # by the report's fields
        "latency": (seconds > 0, lambda: measure(sampler, batch, seconds)),
        "bisection": (bisect, lambda: bisection.to_json(bisection.bisect(sampler))),
        "costs": (costs, lambda: measure_costs(sampler, batch, seconds or 3.0)),
        "pictures": (draw, lambda: pictures.collect(sampler)),
    }
    with reporter(quiet) as report:
        task = report.task("verifying", len(parts) + sum(wanted for wanted, _ in asked.values()))
        for name, part in parts.items():
            checks += part()
            report.advance(task, 1, name)
        for name, (wanted, find) in asked.items():
            if wanted:
                found = replace(found, **{name: find()})
                report.advance(task, 1, name)
    checks += budgets.checks(numerics.image_error(sampler) if budgets.max_error is not None else 0.0, found.latency)
    found = replace(found, checks=checks, environment=environment(sampler))
    return found if older is None else replace(found, checks=checks + against(older, found))
