"""``verify``: the gate. Numbers against the stored torch reference, canaries, and latency against ordinary conditioning."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy import latency, numerics
from mteo_deploy.errors import InputError
from mteo_deploy.numerics import Check
from mteo_deploy.progress import reporter
from mteo_deploy.sampler import Sampler, noise_for


@dataclass(frozen=True)
class Report:
    """What ``verify`` found.

    Attributes:
        checks: numbers, canaries and budgets, each passed or not.
        latency: ``step``: the evaluations against the conditioned ones; ``sample``: the whole loop.
    """

    bundle: str
    engine: str
    device: str
    precision: str
    checks: list[Check]
    latency: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    def latency_lines(self) -> list[str]:
        """The latency part in words; empty when it was left out."""
        if not self.latency:
            return []
        step, sample, loop = (self.latency[name] for name in ("step", "sample", "loop"))

        def ratio(found: dict[str, Any]) -> str:
            return f"{found['ratio']:.3f} [{found['ratio_low']:.3f}, {found['ratio_high']:.3f}]"

        return [
            f"latency, batch {self.latency['batch']}, {self.latency['evaluations']} evaluations: p50 {loop['a_p50']:.2f} ms, "
            f"p90 {loop['a_p90']:.2f} ms, p99 {loop['a_p99']:.2f} ms",
            f"{self.latency['realisation']} / time-conditioned, engine calls: {ratio(step)}, whole sampling: {ratio(sample)} "
            f"(medians of {step['pairs']} and {sample['pairs']} interleaved pairs, 95 % intervals)",
            f"sampling loop / its engine calls: {ratio(loop)}",
        ]

    def save(self, path: Path) -> None:
        """Write the report: JSON, or a page of its own for a path ending in ``.html``."""
        from mteo_deploy.report import page

        text = page(self) if path.suffix == ".html" else json.dumps(self.to_json(), indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def measure(sampler: Sampler, batch: int, seconds: float) -> dict[str, Any]:
    """The sampler's realisation against ordinary time conditioning, interleaved, same backbone, same engine, same plan.

    ``step`` compares the engine calls alone (ours compute the solver's update too), ``sample`` the whole sampling loops
    (the ordinary one computes its update in numpy), ``loop`` our loop with its own engine calls.
    """
    plan = sampler.plan
    noise = noise_for(sampler.bundle.sample_shape, 0, range(batch))
    state = noise * np.float32(plan.initial_scale)
    session, given = sampler.conditioned_session, sampler.bundle.reference_requests(batch)
    request = sampler.prepare(given)
    timesteps = [np.array([e.timestep], dtype=np.float32) for e in plan.evaluations]

    def calls() -> None:
        sampler.loop.calls(state, request)

    def conditioned() -> None:
        for timestep in timesteps:
            session.run({"state": state, "timestep": timestep, **given})

    step = latency.compare(calls, conditioned, seconds=seconds / 3)
    sample = latency.compare(
        lambda: sampler.states(noise, given), lambda: sampler.conditioned_states(plan, noise, given), seconds=seconds / 3
    )
    loop = latency.compare(lambda: sampler.states(noise, given), calls, seconds=seconds / 3)
    ratios = {"step": step.to_json(), "sample": sample.to_json(), "loop": loop.to_json()}
    return {"batch": batch, "realisation": sampler.loop.name, "evaluations": len(plan.evaluations), **ratios}


def _budgets(measured: dict[str, Any], max_p50_ms: float | None, max_overhead: float | None) -> list[Check]:
    checks = []
    if max_p50_ms is not None:
        p50 = measured["loop"]["a_p50"]
        checks.append(Check("budget p50", p50 <= max_p50_ms, f"one batch takes {p50:.2f} ms (allowed {max_p50_ms} ms)"))
    if max_overhead is not None:
        low = measured["step"]["ratio_low"] - 1
        ratio = measured["step"]["ratio"] - 1
        detail = (
            f"{measured['realisation']} over time-conditioned: {ratio:+.1%}, at least {low:+.1%} (allowed {max_overhead:+.1%})"
        )
        checks.append(Check("budget overhead", low <= max_overhead, detail))
    return checks


def verify(
    bundle: Path | str | Sampler,
    *,
    engine: str = "auto",
    device: str | None = None,
    realisation: str | None = None,
    batch: int = 1,
    seconds: float = 3.0,
    max_p50_ms: float | None = None,
    max_overhead: float | None = None,
    quiet: bool = False,
) -> Report:
    """Verify a bundle in an engine.

    Args:
        realisation: ``baked``, ``table`` or ``fused``; None for what the built engine was built for.
        batch: images per engine call in the latency part.
        seconds: time for the latency part; 0 leaves it out.
        max_p50_ms: budget for sampling one batch, median, in milliseconds.
        max_overhead: budget for the evaluations over the time-conditioned step, e.g. 0.02; missed only when the whole
            95 % interval lies above it.

    Raises:
        InputError: for a budget without a latency part, or a batch or time out of range.
        BundleError, EngineError: as :meth:`Sampler.load`.
    """
    if batch < 1 or seconds < 0:
        raise InputError(f"expected --batch of 1 or more and --seconds of 0 or more; found {batch} and {seconds}")
    if seconds == 0 and (max_p50_ms is not None or max_overhead is not None):
        raise InputError("expected --seconds above 0 with a latency budget; found --seconds 0")
    sampler = (
        bundle if isinstance(bundle, Sampler) else Sampler.load(bundle, engine=engine, device=device, realisation=realisation)
    )
    tolerance = numerics.TOLERANCE[sampler.precision]
    measured: dict[str, Any] = {}
    checks: list[Check] = []
    parts: dict[str, Callable[[], list[Check]]] = {
        "noise": lambda: [numerics.seed_check(sampler)],
        "evaluations": lambda: numerics.evaluation_checks(sampler, tolerance["evaluation"]),
        "trajectory": lambda: [numerics.trajectory_check(sampler, tolerance["trajectory"])],
        "canaries": lambda: numerics.canaries(sampler, tolerance["batch"]),
    }
    with reporter(quiet) as report:
        task = report.task("verifying", len(parts) + (seconds > 0))
        for name, part in parts.items():
            checks += part()
            report.advance(task, 1, name)
        if seconds > 0:
            measured = measure(sampler, batch, seconds)
            checks += _budgets(measured, max_p50_ms, max_overhead)
            report.advance(task, 1, "latency")
    if sampler.built is not None:
        engine, device = sampler.built.backend.name, sampler.built.device
    return Report(sampler.bundle.path.name, engine, device or "cpu", sampler.precision, checks, measured)
