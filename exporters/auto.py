"""Precision by measurement: export in each, build each on this machine, keep the fastest whose images are near enough.

What a precision gains depends on the processor, the engine and the layers, and what it costs on the network; so both are
measured, on whole samplings, interleaved. float32 stays where the times do not tell. int8 is made for each engine by itself:
layers that one gains by cost another time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy import latency
from mteo_deploy.bundle import MANIFEST, Bundle, whole_directory, write_manifest
from mteo_deploy.engines import AUTO, installed
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError, MteoError
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.options import SCALED
from mteo_deploy.files import Scratch
from mteo_deploy.numerics import relative_error
from mteo_deploy.sample_request import SampleRequest
from mteo_deploy.sampler import Array, Sampler, noise_for

CANDIDATES = ("fp32", "fp32+bf16", "fp16", "bf16", "int8", "int8+bf16")
"""Types in the graphs and, behind a plus, what an engine may compute in where they say no less; from the finest. The first is
what the others are measured against."""
SEED, COUNT = 30_000, 16
"""Of the noise whose images are compared: neither the stored reference's nor what scales are calibrated on."""


@dataclass(frozen=True)
class Tried:
    """One candidate in one engine.

    Attributes:
        precision: of the graphs.
        hint: what the engine may compute in.
        error: of the median image against float32, relative.
        ratio: time of a sampling over float32's, median, with the ends of its 95 % interval.
        refused: why there is no such bundle, or no engine for it; error and ratio are None then.
    """

    precision: str
    hint: str = "fp32"
    engine: str | None = None
    error: float | None = None
    ratio: tuple[float, float, float] | None = None
    refused: str | None = None


def pick(tried: Sequence[Tried], max_error: float) -> Tried:
    """The fastest within the error; the first, unless another is faster by more than the noise of the measurement.

    Args:
        tried: the first is float32.
    """
    good = [one for one in tried[1:] if one.error is not None and one.error <= max_error and one.ratio and one.ratio[2] < 1]
    return min(good, key=lambda one: one.ratio or (1.0,), default=tried[0])


def export_fastest(
    output: Path | str,
    *,
    max_error: float | None = None,
    engine: str = AUTO,
    candidates: Sequence[str] = CANDIDATES,
    seconds: float = 8.0,
    quiet: bool = False,
    **options: Any,
) -> Bundle:
    """Export in the precision that samples fastest here, of those whose images are near enough to float32's.

    Args:
        output: as :func:`~mteo_deploy.exporters.export.export` takes it, and so the ``options``, but for the precision. While
            this runs there are bundles of all candidates beside it.
        max_error: relative error of the median image against float32; None for 0.05. int8 meets it by leaving layers
            in float32.
        engine: a backend's name, or ``auto`` for those that are installed: the fastest for each precision; int8, and what an
            engine may compute in, in each.
        candidates: as :data:`CANDIDATES`.
        seconds: how long to measure, at the first of the batch sizes of the export, or 1.

    Returns:
        The bundle; ``compiler.auto`` of its manifest lists what was tried, and what was found.

    Raises:
        InputError: as ``export``, for the first candidate; a later one that it has nothing for is left out.
        EngineError: when no engine takes the first.
    """
    limit = 0.05 if max_error is None else max_error
    if not limit > 0 or not candidates:
        raise InputError(f"expected --max-error above 0 and precisions to try; found {max_error} and {list(candidates)}")
    output = Path(output)
    with whole_directory(output, replace=MANIFEST) as directory, ExitStack() as open_until_the_end:
        work = Path(open_until_the_end.enter_context(Scratch(".auto-", directory.parent)))
        tried: list[Tried] = []
        samplers: dict[int, Sampler] = {}
        exported: dict[Path, MteoError | None] = {}

        def bundle_in(precision: str, target: str) -> Path:
            """The bundle of a candidate, made once; the error of one that could not be made, each time."""
            here = work / (f"{precision}-{target}" if precision in SCALED else precision)
            if here not in exported:
                try:
                    export(here, precision=precision, quiet=quiet, **_options_for(precision, target, options, limit))
                    exported[here] = None
                except MteoError as error:
                    exported[here] = error
            if (failed := exported[here]) is not None:
                raise failed
            return here

        for candidate in candidates:
            precision, _, hint = candidate.partition("+")
            for target in _engines(precision, hint, engine):
                try:
                    here = bundle_in(precision, target)
                    build(here, engine=target, precision=hint or "fp32", seconds=min(2.0, seconds), quiet=quiet)
                except MteoError as error:
                    if not samplers:
                        raise
                    tried.append(Tried(precision, hint or "fp32", None if target == AUTO else target, refused=str(error)))
                else:
                    samplers[len(tried)] = open_until_the_end.enter_context(Sampler.load(here, engine=target))
                    tried.append(Tried(precision, hint or "fp32", samplers[len(tried)].built_engine("times").backend.name))
        for index, measured in _measured(samplers, seconds).items():
            tried[index] = replace(tried[index], **measured)
        chosen = tried.index(pick(tried, limit))
        bundle = samplers[chosen].bundle
        shutil.copytree(bundle.path, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("engines"))
        manifest = Bundle.open(bundle.path).manifest
        manifest["compiler"]["auto"] = {"chosen": chosen, "max_error": limit, "tried": [asdict(one) for one in tried]}
        write_manifest(directory, manifest)
    return Bundle.open(output)


def _engines(precision: str, hint: str, engine: str) -> list[str]:
    """In which engines to try a candidate; ``auto`` is the fastest, which ``build`` finds."""
    if engine != AUTO or not (hint or precision in SCALED):
        return [engine]
    return [one.name for one in installed() if not hint or hint in one.precisions]


def _options_for(precision: str, engine: str, options: dict[str, Any], limit: float) -> dict[str, Any]:
    """Options of the export, but for those that another precision has."""
    without = {"keep"} if precision == "fp32" else set()
    without |= {"full_range"} if precision != "int8" else set()
    found = {name: value for name, value in options.items() if name not in without}
    return found | ({"max_error": limit, "engine": engine} if precision in SCALED else {})


def _measured(samplers: Mapping[int, Sampler], seconds: float) -> dict[int, dict[str, Any]]:
    """``ratio`` and ``error`` of each, against the first."""
    first = next(iter(samplers.values())).bundle
    batch = first.batches[0] if first.batches else 1
    times = latency.interleave([_sampling(sampler, batch) for sampler in samplers.values()], seconds=seconds).times
    images = [_images(sampler, batch) for sampler in samplers.values()]
    return {
        index: {
            "error": float(np.median([relative_error(a, b) for a, b in zip(found, images[0], strict=True)])),
            "ratio": latency.bootstrap_median(times[:, i] / times[:, 0]),
        }
        for i, (index, found) in enumerate(zip(samplers, images, strict=True))
    }


def _sampling(sampler: Sampler, batch: int) -> Callable[[], object]:
    noise, given = noise_for(sampler.bundle.sample_shape, SEED, range(batch)), sampler.bundle.reference_requests(batch)
    return lambda: sampler.image(noise, given)


def _images(sampler: Sampler, batch: int) -> Array:
    """At least :data:`COUNT` images, before any decoder."""
    count = -(-COUNT // batch) * batch
    requests = sampler.bundle.reference_requests(count)
    return sampler.together(SampleRequest(count, SEED, batch, requests, latents=True, finite=False))
