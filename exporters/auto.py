"""Precision by measurement: export in each, build each on this machine, keep the fastest whose images are near enough.

What a precision gains depends on the processor, the engine and the layers, and what it costs on the network; so both are
measured, on whole samplings, interleaved. float32 stays where the times do not tell.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy import latency
from mteo_deploy.bundle import MANIFEST, Bundle, whole_directory, write_manifest
from mteo_deploy.engines import AUTO
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError, MteoError
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.options import SCALED
from mteo_deploy.numerics import relative_error
from mteo_deploy.sampler import Array, Sampler, noise_for

CANDIDATES = ("fp32", "fp16", "bf16", "int8")
"""From the finest; the first is what the others are measured against."""
SEED, COUNT = 30_000, 16
"""Of the noise whose images are compared: neither the stored reference's nor what scales are calibrated on."""


@dataclass(frozen=True)
class Tried:
    """One precision in the engine that is fastest with it.

    Attributes:
        error: of the median image against float32, relative.
        ratio: time of a sampling over float32's, median, with the ends of its 95 % interval.
        refused: why there is no such bundle, or no engine for it; everything else is None then.
    """

    precision: str
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
        engine: a backend's name, or ``auto``: for each precision the fastest that is installed.
        candidates: precisions, the finest first.
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
        work = Path(open_until_the_end.enter_context(tempfile.TemporaryDirectory(prefix=".auto-", dir=output.parent)))
        samplers: dict[str, Sampler] = {}
        refused: dict[str, str] = {}
        for name in candidates:
            try:
                bundle = export(work / name, precision=name, quiet=quiet, **_options_for(name, options, limit))
                build(bundle.path, engine=engine, seconds=min(2.0, seconds), quiet=quiet)
            except MteoError as error:
                if name == candidates[0]:
                    raise
                refused[name] = str(error)
            else:
                samplers[name] = open_until_the_end.enter_context(Sampler.load(bundle.path))
        found = _measured(samplers, seconds)
        tried = [found[name] if name in found else Tried(name, refused=refused[name]) for name in candidates]
        chosen = pick(tried, limit)
        shutil.copytree(work / chosen.precision, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("engines"))
        manifest = Bundle.open(work / chosen.precision).manifest
        manifest["compiler"]["auto"] = {
            "chosen": chosen.precision,
            "max_error": limit,
            "tried": [asdict(one) for one in tried],
        }
        write_manifest(directory, manifest)
    return Bundle.open(output)


def _options_for(precision: str, options: dict[str, Any], limit: float) -> dict[str, Any]:
    """Options of the export, but for those that another precision has."""
    without = {"keep"} if precision == "fp32" else set()
    without |= {"full_range"} if precision != "int8" else set()
    found = {name: value for name, value in options.items() if name not in without}
    return found | ({"max_error": limit} if precision in SCALED else {})


def _measured(samplers: dict[str, Sampler], seconds: float) -> dict[str, Tried]:
    """Times and errors, against the first."""
    first = next(iter(samplers.values())).bundle
    batch = first.batches[0] if first.batches else 1
    functions = [_sampling(sampler, batch) for sampler in samplers.values()]
    times = latency.interleave(functions, seconds=seconds).times
    images = [_images(sampler, batch) for sampler in samplers.values()]
    found = {}
    for i, (name, sampler) in enumerate(samplers.items()):
        error = float(np.median([relative_error(a, b) for a, b in zip(images[i], images[0], strict=True)]))
        ratio = latency.bootstrap_median(times[:, i] / times[:, 0])
        found[name] = Tried(name, sampler.built_engine("times").backend.name, error, ratio)
    return found


def _sampling(sampler: Sampler, batch: int) -> Callable[[], object]:
    noise, given = noise_for(sampler.bundle.sample_shape, SEED, range(batch)), sampler.bundle.reference_requests(batch)
    return lambda: sampler.image(noise, given)


def _images(sampler: Sampler, batch: int) -> Array:
    """At least :data:`COUNT` images, before any decoder."""
    count = -(-COUNT // batch) * batch
    return sampler(count, SEED, batch, requests=sampler.bundle.reference_requests(count), latents=True)
