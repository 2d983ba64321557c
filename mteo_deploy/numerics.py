"""Numeric verification: does the engine compute what torch computed, and do the images depend on what they should?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import BundleError
from mteo_deploy.plan import Plan
from mteo_deploy.precision import parts
from mteo_deploy.prompts import open_tokenizers, tokenise
from mteo_deploy.realisations import Stepwise
from mteo_deploy.requests import Arrays
from mteo_deploy.sample_request import SampleRequest
from mteo_deploy.sampler import Sampler

Array = NDArray[np.float32]

TOLERANCE = {
    "fp32": {"evaluation": 1e-4, "trajectory": 1e-3, "batch": 1e-4},
    "fp16": {"evaluation": 1e-2, "trajectory": 5e-2, "batch": 1e-2},
    "bf16": {"evaluation": 5e-2, "trajectory": 1e-1, "batch": 5e-2},
    "int8": {"evaluation": 1e-1, "trajectory": 3e-1, "batch": 1e-1},
    "fp8": {"evaluation": 2e-1, "trajectory": 4e-1, "batch": 2e-1},
    "int4": {"evaluation": 2e-1, "trajectory": 4e-1, "batch": 2e-1},
}
"""Relative error (root mean square over root mean square) allowed by precision: one evaluation fed with the reference's
own state, the whole trajectory, and the same images drawn with another batch size. Engines in fp32 reorder sums over
thousands of terms (1e-6 to 1e-5 is typical); bf16 rounds every layer's output to 8 significant bits, an error of 0.1 % each
that adds up over the layers (1e-2 is typical); fp16 rounds to 11 bits, and errs by an eighth of that. Quantised layers round
what they take in to 255 steps (int8: 1e-2 is typical), to 4 significant bits (fp8: 3e-2), or their weights to 15 steps (int4:
3e-2). A trajectory multiplies an early difference by up to the ratio of the noise levels.

Two engines of the same bundle may differ by what the coarser precision's trajectory is allowed: each departs from torch by
roundings of its own, the sum of which is dominated by the coarser one's. The triangle inequality would allow the sum of the
two; typical errors lie a decade below either, so the larger one is enough and catches more."""


def tolerance_of(precision: str) -> dict[str, float]:
    """What is allowed for a label of :mod:`mteo_deploy.precision`: of several precisions, what the coarsest one is."""
    found = [TOLERANCE[name] for name in parts(precision)]
    return {what: max(one[what] for one in found) for what in found[0]}


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


def worst_place(found: Array, expected: Array) -> str:
    """Where a tensor of any shape is off most: :func:`worst_region` of images, else the index of one element."""
    if found.ndim == 4 and min(found.shape[2:]) > 1:
        return worst_region(found, expected)
    with np.errstate(invalid="ignore"):
        error = np.abs(found.astype(np.float64) - expected)
    place = np.unravel_index(int(np.where(np.isfinite(error), error, np.inf).argmax()), error.shape)
    return f"element [{', '.join(str(int(i)) for i in place)}] of {list(found.shape)}"


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


def teacher_forced(plan: Plan, reference: dict[str, Array], index: int) -> tuple[Array, list[Array]]:
    """What evaluation ``index`` of the torch reference got: state and history (newest first), of all its images."""
    first = reference["noise"] * np.float32(plan.initial_scale)
    return (first if index == 0 else reference["states"][index - 1]), [reference["kept"][j] for j in range(index - 1, -1, -1)]


def evaluation_outputs(sampler: Sampler) -> Iterator[dict[str, tuple[Array, Array]]]:
    """Teacher-forced, per evaluation: name of an output -> what the engine gives, and torch gave; none in ``fused``."""
    if not isinstance(sampler.loop, Stepwise):
        return
    reference = sampler.bundle.reference()
    request = sampler.prepare(sampler.bundle.reference_requests(len(reference["noise"])))
    for i in range(len(sampler.bundle.plan.evaluations)):
        next_state, kept = sampler.step(i, *teacher_forced(sampler.bundle.plan, reference, i), request)
        outputs = {"next state": (next_state, reference["states"][i])}
        yield outputs if kept is None else {**outputs, "kept": (kept, reference["kept"][i])}


def evaluation_checks(sampler: Sampler, tolerance: float) -> list[Check]:
    """Teacher-forced: every evaluation gets the torch reference's own state and history.

    The realisation ``fused`` has no single evaluations; the trajectory check looks at its every state.
    """
    checks = []
    for i, outputs in enumerate(evaluation_outputs(sampler)):
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
    return _trajectory("trajectory", *_free_running(sampler), tolerance)


def size_checks(sampler: Sampler, tolerance: float) -> list[Check]:
    """Free-running at another height and width than the backbone's own, where the bundle leaves them open."""
    if not {"height", "width"} & set(sampler.bundle.manifest.get("dynamic", [])):
        return []
    reference = sampler.bundle.reference()
    noise = reference["other/noise"]
    found = sampler.states(noise, sampler.bundle.reference_requests(len(noise)))
    height, width = noise.shape[-2:]
    return [_trajectory(f"size {height}x{width}", found, reference["other/states"], tolerance)]


def _trajectory(name: str, found: list[Array], expected: Array, tolerance: float) -> Check:
    errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
    over = [i for i, error in enumerate(errors) if not error <= tolerance]
    worst = int(np.argmax(errors))
    detail = f"worst after evaluation {worst}: {errors[worst]:.1e} (allowed {tolerance:.0e})"
    if over:
        detail += f"; first over it: evaluation {over[0]}, {worst_place(found[over[0]], expected[over[0]])}"
    detail += f"; images {psnr(found[-1], expected[-1]):.0f} dB"
    return Check(name, not over, detail, _finite(errors), tolerance)


def image_error(sampler: Sampler) -> float:
    """Relative error of the images drawn from the stored noise."""
    found, expected = _free_running(sampler)
    return relative_error(found[-1], expected[-1])


def _drawn(sampler: Sampler, num: int, seed: int, batch: int, requests: Arrays) -> Array:
    """Last states, finite or not: a check says so by name."""
    return sampler.together(SampleRequest(num, seed, batch, requests, latents=True, finite=False))


def canaries(sampler: Sampler, tolerance: float, batch: int = 4) -> list[Check]:
    """Faults that a table of latencies does not show.

    The images of one seed are drawn three times: at first, by a second sampler with sessions of its own, and by the first one
    again after that, after another seed and after another batch size.
    """
    requests = sampler.bundle.reference_requests(batch)
    images = _drawn(sampler, batch, 11, batch, requests)
    others = _drawn(sampler, batch, 12, batch, requests)
    single = _drawn(sampler, batch, 11, 1, requests)
    beside = _drawn(sampler.reopen(), batch, 11, batch, requests)
    again = _drawn(sampler, batch, 11, batch, requests)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite images fail below, by name
        spread = float(images.reshape(batch, -1).std(axis=1).min())
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


def decoder_checks(sampler: Sampler, tolerance: float) -> list[Check]:
    """The decoder, of the reference's own last states against torch's images, at every size stored; of what the engine sampled,
    that its images are finite. Nothing for a bundle without one."""
    if sampler.bundle.decoder is None:
        return []
    reference, checks = sampler.bundle.reference(), []
    for size in [name.removesuffix("images") for name in reference if name.endswith("images")]:
        expected = reference[f"{size}images"]
        found = sampler.decode(reference[f"{size}states"][-1][: len(expected)])
        error = relative_error(found, expected)
        detail = f"relative error of the decoder's images {error:.1e} (allowed {tolerance:.0e})"
        if not error <= tolerance:
            detail += f"; most of it in {worst_place(found, expected)}"
        name = "decoder" if not size else "decoder, size " + "x".join(map(str, expected.shape[2:]))
        checks.append(Check(name, error <= tolerance, detail, _finite([error]), tolerance))
    bad = _not_finite(sampler)
    return [*checks, Check("decoder finite", bad == 0, f"{bad} values of the decoder's images are NaN or infinite")]


def text_checks(sampler: Sampler, tolerance: float) -> list[Check]:
    """The text encoder, of torch's token ids, against what torch made of them; the ids too where tokenizers is installed."""
    entry = sampler.bundle.text_encoder
    if entry is None:
        return []
    reference, prompts = sampler.bundle.reference(), sampler.bundle.manifest["reference"]["prompts"]
    tokens = sampler.bundle.reference_tokens(len(prompts))
    found = sampler.encode(tokens)
    errors = {name: relative_error(found[name], reference[f"text/{name}"]) for name in entry["outputs"]}
    worst = max(errors, key=errors.__getitem__)
    detail = f"relative error of {worst} {errors[worst]:.1e} (allowed {tolerance:.0e})"
    checks = [Check("text encoder", errors[worst] <= tolerance, detail, _finite([errors[worst]]), tolerance)]
    if find_spec("tokenizers") is None:
        return checks
    again = tokenise(entry, open_tokenizers(sampler.bundle), prompts)
    other = sum(int((values != again[name]).sum()) for name, values in tokens.items())
    return [*checks, Check("tokenizer", other == 0, f"{other} token ids differ from those where the bundle was made")]


def _not_finite(sampler: Sampler) -> int:
    """Of the decoder's output for what the engine samples; what is not finite in the last state already is not its fault."""
    requests = sampler.bundle.reference_requests(1)
    states = _drawn(sampler, 1, 11, 1, requests)
    return int((~np.isfinite(sampler.decode(np.nan_to_num(states, nan=0.0, posinf=0.0, neginf=0.0)))).sum())


def seed_check(sampler: Sampler) -> Check:
    """The noise generator gives what it gave where the bundle was made."""
    from mteo_deploy.sampler import noise_for

    reference, entry = sampler.bundle.reference(), sampler.bundle.manifest["reference"]
    noise = noise_for(sampler.bundle.sample_shape, entry["seed"], range(entry["count"]))
    error = relative_error(noise, reference["noise"])
    return Check("noise", error <= 1e-6, f"relative difference from the stored noise {error:.1e}")


def adapter_check(manifest: Mapping[str, Any]) -> Check:
    """What ``export`` found when it compared the adapter with the network itself; all else here is compared with the adapter.

    A bundle of before that comparison passes, and says so.

    Raises:
        BundleError: for an entry that is none.
    """
    found = manifest.get("adapter")
    if found is None:
        return Check("adapter", True, "not checked: an older version exported the bundle; export again to compare it")
    try:
        error, tolerance, times = float(found["error"]), float(found["tolerance"]), len(found["times"])
    except (KeyError, TypeError, ValueError):
        raise BundleError("expected what export found of the adapter (error, tolerance, times); export again") from None
    detail = f"equals the network's own forward: {error:.0e} at {times} times (allowed {tolerance:.0e})"
    return Check("adapter", error <= tolerance, detail)
