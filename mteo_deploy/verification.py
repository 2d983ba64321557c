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
        latency: ``step``: the baked evaluation against the conditioned one, per batch size; ``sample``: the whole loop.
    """

    bundle: str
    engine: str
    device: str
    checks: list[Check]
    latency: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


def measure(sampler: Sampler, batch: int, seconds: float) -> dict[str, Any]:
    """One baked evaluation against the same backbone with ordinary time conditioning, and the whole loop, interleaved.

    Every evaluation of the plan is compared in turn; the ratio is that of the sums over the plan.
    """
    plan = sampler.bundle.plan
    noise = noise_for(sampler.bundle.sample_shape, 0, range(batch))
    state = noise * np.float32(plan.initial_scale)
    history = [noise] * plan.history
    session = sampler.conditioned_session
    timesteps = [np.array([e.timestep], dtype=np.float32) for e in plan.evaluations]

    def baked() -> None:
        for i in range(len(plan.evaluations)):
            sampler.step(i, state, history)

    def conditioned() -> None:
        for timestep in timesteps:
            session.run({"state": state, "timestep": timestep})

    step = latency.compare(baked, conditioned, seconds=seconds)
    loop = latency.compare(lambda: sampler.states(noise), baked, seconds=seconds / 2)
    return {"batch": batch, "evaluations": len(plan.evaluations), "step": step.to_json(), "loop": loop.to_json()}


def _budgets(measured: dict[str, Any], max_p50_ms: float | None, max_overhead: float | None) -> list[Check]:
    checks = []
    if max_p50_ms is not None:
        p50 = measured["loop"]["a_p50"]
        checks.append(Check("budget p50", p50 <= max_p50_ms, f"one batch takes {p50:.2f} ms (allowed {max_p50_ms} ms)"))
    if max_overhead is not None:
        low = measured["step"]["ratio_low"] - 1
        detail = f"baked over time-conditioned: {measured['step']['ratio'] - 1:+.1%}, at least {low:+.1%} (allowed {max_overhead:+.1%})"
        checks.append(Check("budget overhead", low <= max_overhead, detail))
    return checks


def verify(
    bundle: Path | str | Sampler,
    *,
    engine: str = "onnxruntime",
    device: str = "cpu",
    batch: int = 1,
    seconds: float = 3.0,
    max_p50_ms: float | None = None,
    max_overhead: float | None = None,
    quiet: bool = False,
) -> Report:
    """Verify a bundle in an engine.

    Args:
        batch: images per engine call in the latency part.
        seconds: time for the latency part; 0 leaves it out.
        max_p50_ms: budget for sampling one batch, median, in milliseconds.
        max_overhead: budget for the baked step over the time-conditioned step, e.g. 0.02; missed only when the whole
            95 % interval lies above it.

    Raises:
        InputError: for a budget without a latency part, or a batch or time out of range.
        BundleError, EngineError: as :meth:`Sampler.load`.
    """
    if batch < 1 or seconds < 0:
        raise InputError(f"expected --batch of 1 or more and --seconds of 0 or more; found {batch} and {seconds}")
    if seconds == 0 and (max_p50_ms is not None or max_overhead is not None):
        raise InputError("expected --seconds above 0 with a latency budget; found --seconds 0")
    sampler = bundle if isinstance(bundle, Sampler) else Sampler.load(bundle, engine=engine, device=device)
    tolerance = numerics.TOLERANCE[sampler.bundle.manifest["precision"]]
    measured: dict[str, Any] = {}
    checks: list[Check] = []
    parts: dict[str, Callable[[], list[Check]]] = {
        "noise": lambda: [numerics.seed_check(sampler)],
        "evaluations": lambda: numerics.evaluation_checks(sampler, tolerance["evaluation"]),
        "trajectory": lambda: [numerics.trajectory_check(sampler, tolerance["trajectory"])],
        "canaries": lambda: numerics.canaries(sampler),
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
    return Report(sampler.bundle.path.name, engine, device, checks, measured)
