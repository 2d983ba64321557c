"""``bench``: bundles, engines and precisions in one run, each by the error of its images and the time they take.

The error is against the reference trajectory of the same noise, which is what a step count or a precision gives up; so it
compares bundles of one backbone only. It is measured with one candidate open at a time; the times with all of them open,
because they alternate.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mteo_deploy import latency
from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import cache
from mteo_deploy.errors import InputError
from mteo_deploy.numerics import relative_error
from mteo_deploy.precision import HINTS, LABELS, parts, rank
from mteo_deploy.progress import Reporter, reporter
from mteo_deploy.requests import Arrays
from mteo_deploy.sample_request import SampleRequest
from mteo_deploy.sampler import Array, Sampler, noise_for
from mteo_deploy.tradeoff import Point, Tradeoff
from mteo_deploy.verification import environment

ALL = "all"
PER_CALL = 16
"""Images per engine call where the error is measured."""


@dataclass(frozen=True)
class Candidate:
    """A bundle in one of its built engines, or the plain solver with its plan there."""

    name: str
    bundle: Bundle
    built: cache.Built
    plain: bool

    def open(self) -> Sampler:
        return Sampler.of(self.bundle, self.built)

    def point(self, sampler: Sampler, error: float, batch: int, times: tuple[float, float, float, float]) -> Point:
        """What is known of it, with its times: median, ratio and the ratio's interval."""
        plan, (p50, ratio, low, high) = self.bundle.plan, times
        return Point(
            bundle=self.name,
            evaluations=len(plan.evaluations),
            solver=plan.solver,
            plain=self.plain,
            engine=self.built.backend.name,
            device=self.built.device,
            precision=self.built.precision,
            realisation="time-conditioned" if self.plain else sampler.loop.name,
            batch=batch,
            error=error if np.isfinite(error) else None,
            p50=p50,
            ratio=ratio,
            ratio_low=low,
            ratio_high=high,
        )

    def images(self, sampler: Sampler, num: int, seed: int, requests: Arrays) -> Array:
        """``num`` images, and no state kept."""
        if self.plain:
            return sampler.conditioned(self.bundle.plain_plan, num, seed, PER_CALL, requests=requests, latents=True)
        return sampler.together(SampleRequest(num, seed, PER_CALL, requests, latents=True, finite=False))

    def sampling(self, sampler: Sampler, batch: int, seed: int) -> Callable[[], object]:
        """One batch from noise to images, to be timed."""
        noise, given = noise_for(self.bundle.sample_shape, seed, range(batch)), self.bundle.reference_requests(batch)
        if self.plain:
            return lambda: sampler.conditioned_states(self.bundle.plain_plan, noise, given)
        return lambda: sampler.image(noise, given)


def bench(
    bundles: Sequence[Path | str],
    *,
    engine: str = ALL,
    device: str | None = None,
    precision: str = ALL,
    batch: Sequence[int] = (1,),
    seconds: float = 10.0,
    num: int = 64,
    seed: int = 0,
    plain: bool = False,
    quiet: bool = False,
) -> Tradeoff:
    """Compare bundles of one backbone, in every engine and precision they are built for.

    Args:
        bundles: paths, each with at least one built engine.
        engine: names by comma, each of which every bundle must be built for; or ``all``: those that it is built for.
        device: None for any.
        precision: names by comma, or ``all``.
        batch: batch sizes to time.
        seconds: for the times, all batch sizes together.
        num: images for the error.
        plain: add the bundles' plain plans on the time-conditioned graph: what one would run with nothing learned.

    Raises:
        InputError: for bundles of different backbones or noise ranges, the same one twice, an engine or precision that none
            is built for, or a number out of range.
        BundleError, EngineError: as :meth:`Sampler.load`.
    """
    if not bundles or num < 1 or seconds <= 0 or not batch or min(batch) < 1:
        raise InputError(
            f"expected bundles, --num and --batch of 1 or more and --seconds above 0; found {len(bundles)} bundles, {num}, "
            f"{list(batch)} and {seconds}"
        )
    opened = [Bundle.open(path) for path in bundles]
    check_one_backbone(opened)
    candidates = _candidates(opened, engine, device, precision, plain)
    with reporter(quiet) as report:
        errors, reference = _errors(candidates, num, seed, report)
        task = report.task("opening all", len(candidates))
        samplers: list[Sampler] = []
        for candidate in candidates:
            samplers.append(_shared(candidate, candidates, samplers) or candidate.open())
            report.advance(task, 1, candidate.name)
        points: list[Point] = []
        doubts: list[str] = []
        rounds: dict[int, int] = {}
        task = report.task("timing", len(dict.fromkeys(batch)))
        for size in dict.fromkeys(batch):
            functions = [c.sampling(s, size, seed) for c, s in zip(candidates, samplers, strict=True)]
            found = latency.interleave(functions, seconds=seconds / len(batch))
            rounds[size] = len(found.times)
            doubts += [f"batch {size}: {doubt}" for doubt in found.doubts]
            times = against_fastest(found)
            points += [c.point(s, e, size, t) for c, s, e, t in zip(candidates, samplers, errors, times, strict=True)]
            report.advance(task, 1, f"batch {size}")
    versions = {**environment(samplers[0]), "python": platform.python_version()}
    versions["engine"] = ", ".join(dict.fromkeys(environment(sampler)["engine"] for sampler in samplers))
    versions["options"] = "; ".join(dict.fromkeys(environment(sampler)["options"] for sampler in samplers))
    return Tradeoff.of(points, reference=reference, images=num, seed=seed, rounds=rounds, doubts=doubts, environment=versions)


def check_one_backbone(bundles: Sequence[Bundle]) -> None:
    """Refuse what has no reference trajectory in common.

    Raises:
        InputError: naming the two bundles and what differs.
    """
    first, *others = bundles
    if len({bundle.path.resolve() for bundle in bundles}) < len(bundles):
        raise InputError(f"expected every bundle once; found {', '.join(str(bundle.path) for bundle in bundles)}")
    for bundle in others:
        for what, of in (
            ("backbone", lambda b: b.manifest["backbone"]["fingerprint"]),
            ("noise range", lambda b: (b.plan.sigmas[0], b.plan.sigmas[-1])),
        ):
            if of(first) != of(bundle):
                raise InputError(
                    f"expected bundles of one {what}, because the error is against one reference trajectory; {first.path} has "
                    f"{of(first)!s:.40}, {bundle.path} {of(bundle)!s:.40}; bench them in runs of their own"
                )


def _candidates(bundles: Sequence[Bundle], engine: str, device: str | None, precision: str, plain: bool) -> list[Candidate]:
    """MTEO's first, then the plain ones; each bundle's engines in order."""
    engines = [] if engine == ALL else [name.strip() for name in engine.split(",")]
    precisions = LABELS if precision == ALL else tuple(name.strip() for name in precision.split(","))
    unknown = [name for name in precisions if name not in LABELS]
    if unknown:
        raise InputError(f"expected --precision out of {', '.join(LABELS)}, {ALL}; found {', '.join(unknown)}")
    alike = len({bundle.path.resolve().name for bundle in bundles}) < len(bundles)
    found = [
        Candidate(str(bundle.path) if alike else bundle.path.resolve().name, bundle, built, False)
        for bundle in bundles
        for built in cache.every(bundle, engines, device)
        if built.precision in precisions
    ]
    missing = [bundle for bundle in bundles if not any(candidate.bundle is bundle for candidate in found)]
    if missing:
        wanted = precisions[0]
        verb = f"build {missing[0].path} --precision {wanted}" if wanted in HINTS else f"export --precision {parts(wanted)[0]}"
        raise InputError(
            f"expected {missing[0].path} built for {', '.join(precisions)}; found other precisions only; "
            f"run: mteo-deploy {verb}"
        )
    return found + [Candidate(one.name, one.bundle, one.built, True) for one in found if plain]


def _shared(candidate: Candidate, candidates: Sequence[Candidate], samplers: Sequence[Sampler]) -> Sampler | None:
    """The sampler of the same built engine, where one is open: the plain solver runs beside MTEO in it."""
    return next((s for c, s in zip(candidates, samplers, strict=False) if c.built is candidate.built), None)


def _errors(candidates: Sequence[Candidate], num: int, seed: int, report: Reporter) -> tuple[list[float], dict[str, object]]:
    """Every candidate's error, and which reference trajectory it is against: one for all, one candidate open at a time.

    The finest of the bundles' reference plans, in fp32 where there is an engine that has it.
    """
    source = min(
        (one for one in candidates if not one.plain),
        key=lambda one: (rank(one.built.precision), -len(one.bundle.reference_plan.evaluations)),
    )
    plan, requests = source.bundle.reference_plan, source.bundle.reference_requests(num)
    task = report.task("reference trajectory", num)
    expected = source.open().conditioned(
        plan, num, seed, PER_CALL, lambda count: report.advance(task, count), requests, latents=True
    )
    task, errors = report.task("errors", len(candidates)), []
    for candidate in candidates:
        errors.append(relative_error(candidate.images(candidate.open(), num, seed, requests), expected))
        report.advance(task, 1, candidate.name)
    return errors, {
        "evaluations": len(plan.evaluations),
        "bundle": source.name,
        "engine": source.built.backend.name,
        "precision": source.built.precision,
    }


def against_fastest(found: latency.Rounds) -> list[tuple[float, float, float, float]]:
    """Per callable: median in milliseconds, and the median over the rounds of its ratio to the fastest with its interval."""
    fastest = int(np.argmin(found.medians))
    ratios = [latency.bootstrap_median(found.times[:, i] / found.times[:, fastest]) for i in range(found.times.shape[1])]
    return [(median, *ratio) for median, ratio in zip(found.medians, ratios, strict=True)]
