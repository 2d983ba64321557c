"""Numeric verification: does the engine compute what torch computed, and do the images depend on what they should?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

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


def psnr(found: Array, expected: Array) -> float:
    """Peak signal-to-noise ratio in decibels; the peak is the range of the values expected."""
    with np.errstate(invalid="ignore"):
        error = float(np.sqrt(np.mean((found.astype(np.float64) - expected) ** 2)))
    if not np.isfinite(error):
        return float("-inf")
    return 20 * float(np.log10(max(float(np.ptp(expected)), 1e-12) / max(error, 1e-12)))


def worst_region(found: Array, expected: Array, tiles: int = 4) -> str:
    """Where in ``[batch, channels, height, width]`` the squared error is largest: image, channel, and which tile of each.

    Args:
        tiles: how many tiles an image is cut into, per side.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        error = (found.astype(np.float64) - expected) ** 2
    error = np.where(np.isfinite(error), error, np.inf)
    edges = [np.unique(np.linspace(0, size, tiles + 1).round().astype(int)) for size in error.shape[2:]]
    sums = np.add.reduceat(np.add.reduceat(error, edges[0][:-1], axis=2), edges[1][:-1], axis=3)
    image, channel, *tile = np.unravel_index(int(sums.argmax()), sums.shape)
    rows, columns = (f"{edge[i]}-{edge[i + 1] - 1}" for edge, i in zip(edges, tile, strict=True))
    return f"image {image}, channel {channel}, rows {rows}, columns {columns}"


@dataclass(frozen=True)
class Check:
    """One thing that was checked: passed or not, and the figures behind it in words.

    Attributes:
        errors: relative errors per evaluation, where it is about those; None for one that is not finite.
        allowed: how large they may be.
    """

    name: str
    passed: bool
    detail: str
    errors: list[float | None] = field(default_factory=list)
    allowed: float | None = None


def _finite(errors: Iterable[float]) -> list[float | None]:
    """JSON has no infinity."""
    return [error if np.isfinite(error) else None for error in errors]


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
        outputs = {"next state": (next_state, states[i])}
        if kept_now is not None:
            outputs["kept"] = (kept_now, kept[i])
        errors = {name: relative_error(*pair) for name, pair in outputs.items()}
        worst = max(errors, key=errors.__getitem__)
        detail = f"relative error {errors[worst]:.1e} (allowed {tolerance:.0e})"
        if not errors[worst] <= tolerance:
            detail += f"; most of it in {worst}, {worst_region(*outputs[worst])}"
        passed = errors[worst] <= tolerance
        checks.append(Check(f"evaluation {i}", passed, detail, _finite([errors[worst]]), tolerance))
    return checks


def _free_running(sampler: Sampler) -> tuple[list[Array], Array]:
    """The state after every evaluation from the stored noise, and torch's."""
    reference = sampler.bundle.reference()
    return sampler.states(reference["noise"], sampler.bundle.reference_requests(len(reference["noise"]))), reference["states"]


def trajectory_check(sampler: Sampler, tolerance: float) -> Check:
    """Free-running: the whole loop from the stored noise; names the first and the worst evaluation over the tolerance."""
    found, expected = _free_running(sampler)
    errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
    over = [i for i, error in enumerate(errors) if not error <= tolerance]
    worst = int(np.argmax(errors))
    detail = f"worst after evaluation {worst}: {errors[worst]:.1e} (allowed {tolerance:.0e})"
    if over:
        detail += f"; first over it: evaluation {over[0]}, {worst_region(found[over[0]], expected[over[0]])}"
    detail += f"; images {psnr(found[-1], expected[-1]):.0f} dB"
    return Check("trajectory", not over, detail, _finite(errors), tolerance)


def image_error(sampler: Sampler) -> float:
    """Relative error of the images drawn from the stored noise."""
    found, expected = _free_running(sampler)
    return relative_error(found[-1], expected[-1])


def canaries(sampler: Sampler, tolerance: float, batch: int = 4) -> list[Check]:
    """Faults that a table of latencies does not show.

    The images of one seed are drawn three times: at first, by a second sampler with sessions of its own, and by the first one
    again after that, after another seed and after another batch size.
    """
    requests = sampler.bundle.reference_requests(batch)
    images = sampler(num=batch, seed=11, batch=batch, requests=requests)
    others = sampler(num=batch, seed=12, batch=batch, requests=requests)
    single = sampler(num=batch, seed=11, batch=1, requests=requests)
    beside = sampler.reopen()(num=batch, seed=11, batch=batch, requests=requests)
    again = sampler(num=batch, seed=11, batch=batch, requests=requests)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite images fail below, by name
        spread = float(images.std(axis=(1, 2, 3)).min())
    bad = int((~np.isfinite(images)).sum())
    by_seed = relative_error(others, images)
    by_image = min(relative_error(images[i], images[0]) for i in range(1, batch))
    with np.errstate(invalid="ignore"):
        repeat = float(np.abs(again - images).max())
    by_batch, by_session = relative_error(single, images), relative_error(beside, images)
    return [
        Check("finite", bad == 0, f"{bad} values are NaN or infinite"),
        Check("not flat", spread > 1e-3, f"smallest standard deviation within an image {spread:.3g}"),
        Check("seed matters", by_seed > 1e-2, f"relative difference between two seeds {by_seed:.3g}"),
        Check("images differ", by_image > 1e-2, f"smallest relative difference within a batch {by_image:.3g}"),
        Check("repeatable", repeat == 0.0, f"largest difference between two runs, with others between them, {repeat:.3g}"),
        Check(
            "second session",
            by_session <= tolerance,
            f"relative difference between two samplers side by side {by_session:.1e} (allowed {tolerance:.0e})",
        ),
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
