"""Numeric verification: does the engine compute what torch computed, and do the images depend on what they should?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.realisations import Stepwise
from mteo_deploy.sampler import Sampler

Array = NDArray[np.float32]

TOLERANCE = {
    "fp32": {"evaluation": 1e-4, "trajectory": 1e-3, "batch": 1e-4},
    "bf16": {"evaluation": 5e-2, "trajectory": 1e-1, "batch": 5e-2},
}
"""Relative error (root mean square over root mean square) allowed by precision: one evaluation fed with the reference's
own state, the whole trajectory, and the same images drawn with another batch size. Engines in fp32 reorder sums over
thousands of terms (1e-6 to 1e-5 is typical); bf16 rounds every layer's output to 8 significant bits, an error of 0.1 % each
that adds up over the layers (1e-2 is typical). A trajectory multiplies an early difference by up to the ratio of the noise
levels."""


def relative_error(found: Array, expected: Array) -> float:
    """RMS of the difference over RMS of what was expected; infinite where anything is not finite."""
    with np.errstate(invalid="ignore"):  # infinite minus infinite
        difference = found.astype(np.float64) - expected.astype(np.float64)
    if not np.isfinite(difference).all():
        return float("inf")
    return float(np.sqrt(np.mean(difference**2)) / max(np.sqrt(np.mean(expected.astype(np.float64) ** 2)), 1e-12))


@dataclass(frozen=True)
class Check:
    """One thing that was checked: passed or not, and the figures behind it in words."""

    name: str
    passed: bool
    detail: str


def evaluation_checks(sampler: Sampler, tolerance: float) -> list[Check]:
    """Teacher-forced: every evaluation gets the torch reference's own state and history.

    The realisation ``fused`` has no single evaluations; the trajectory check looks at its every state.
    """
    if not isinstance(sampler.loop, Stepwise):
        return []
    reference, plan = sampler.bundle.reference(), sampler.bundle.plan
    states, kept = reference["states"], reference["kept"]
    request = sampler.prepare(sampler.bundle.reference_requests(len(reference["noise"])))
    first = reference["noise"] * np.float32(plan.initial_scale)
    checks = []
    for i in range(len(plan.evaluations)):
        history = [kept[j] for j in range(i - 1, -1, -1)]
        next_state, kept_now = sampler.step(i, first if i == 0 else states[i - 1], history, request)
        errors = [relative_error(next_state, states[i])]
        if kept_now is not None:
            errors.append(relative_error(kept_now, kept[i]))
        worst = max(errors)
        checks.append(Check(f"evaluation {i}", worst <= tolerance, f"relative error {worst:.1e} (allowed {tolerance:.0e})"))
    return checks


def trajectory_check(sampler: Sampler, tolerance: float) -> Check:
    """Free-running: the whole loop from the stored noise; names the first and the worst evaluation over the tolerance."""
    reference = sampler.bundle.reference()
    found = sampler.states(reference["noise"], sampler.bundle.reference_requests(len(reference["noise"])))
    errors = [relative_error(state, expected) for state, expected in zip(found, reference["states"], strict=True)]
    over = [i for i, error in enumerate(errors) if not error <= tolerance]
    worst = int(np.argmax(errors))
    detail = f"worst after evaluation {worst}: {errors[worst]:.1e} (allowed {tolerance:.0e})"
    if over:
        detail += f"; first over it: evaluation {over[0]}"
    return Check("trajectory", not over, detail)


def canaries(sampler: Sampler, tolerance: float, batch: int = 4) -> list[Check]:
    """Faults that a table of latencies does not show."""
    requests = sampler.bundle.reference_requests(batch)
    images = sampler(num=batch, seed=11, batch=batch, requests=requests)
    others = sampler(num=batch, seed=12, batch=batch, requests=requests)
    again = sampler(num=batch, seed=11, batch=batch, requests=requests)
    single = sampler(num=batch, seed=11, batch=1, requests=requests)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite images fail below, by name
        spread = float(images.std(axis=(1, 2, 3)).min())
    bad = int((~np.isfinite(images)).sum())
    by_seed = relative_error(others, images)
    by_image = min(relative_error(images[i], images[0]) for i in range(1, batch))
    with np.errstate(invalid="ignore"):
        repeat = float(np.abs(again - images).max())
    by_batch = relative_error(single, images)
    return [
        Check("finite", bad == 0, f"{bad} values are NaN or infinite"),
        Check("not flat", spread > 1e-3, f"smallest standard deviation within an image {spread:.3g}"),
        Check("seed matters", by_seed > 1e-2, f"relative difference between two seeds {by_seed:.3g}"),
        Check("images differ", by_image > 1e-2, f"smallest relative difference within a batch {by_image:.3g}"),
        Check("repeatable", repeat == 0.0, f"largest difference between two runs {repeat:.3g}"),
        Check(
            "batch size",
            by_batch <= tolerance,
            f"relative difference between batch {batch} and batch 1 {by_batch:.1e} (allowed {tolerance:.0e})",
        ),
    ]


def seed_check(sampler: Sampler) -> Check:
    """The noise generator gives what it gave where the bundle was made."""
    from mteo_deploy.sampler import noise_for

    reference, entry = sampler.bundle.reference(), sampler.bundle.manifest["reference"]
    noise = noise_for(sampler.bundle.sample_shape, entry["seed"], range(entry["count"]))
    error = relative_error(noise, reference["noise"])
    return Check("noise", error <= 1e-6, f"relative difference from the stored noise {error:.1e}")
