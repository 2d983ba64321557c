"""``evaluate``: how close a bundle's images are to the data, beside the plain solver and the reference trajectory.

Three samplers run from the same noise in the same engine: MTEO (the bundle), plain (the bundle's plan on the backbone with
ordinary time conditioning) and the reference trajectory. So what differs between plain and MTEO is the embedding set, and how
far the reference is from the data is the backbone's own share of the distance.

Images are clipped to [-1, 1] first: that is the image a user saves. The Fréchet distance is biased upwards by finite samples,
more so for fewer: compare figures of one count and one feature network only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy import dataset
from mteo_deploy.bundle import Bundle
from mteo_deploy.errors import EngineError, InputError
from mteo_deploy.progress import Reporter, reporter
from mteo_deploy.quality import Features, Statistics, features_of, frechet_distance, gap_closed
from mteo_deploy.requests import Arrays, draw_parts
from mteo_deploy.requests import read as read_requests
from mteo_deploy.sampler import Array, Sampler, noise_for

MTEO, PLAIN, REFERENCE = "mteo", "plain", "reference"
Draw = Callable[[Array, Arrays], Array]


@dataclass(frozen=True)
class Quality:
    """One sampler's images, a figure for each seed.

    Attributes:
        frechet: Fréchet distance to the data.
        error: mean squared error against the reference trajectory of the same noise, on the scale of [-1, 1].
    """

    evaluations: int
    frechet: tuple[float, ...]
    error: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {"evaluations": self.evaluations, "frechet": list(self.frechet), "error": list(self.error)}


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
        samplers: name (``mteo``, ``plain``, ``reference``) -> its figures.
        context: what they depend on: features, data, counts, seeds, engine.
    """

    samplers: Mapping[str, Quality]
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def gap_closed(self) -> tuple[float | None, ...]:
        """For each seed, the share of the distance between plain and reference that MTEO removes."""
        mteo, plain, reference = (self.samplers[name].frechet for name in (MTEO, PLAIN, REFERENCE))
        return tuple(gap_closed(p, m, r) for p, m, r in zip(plain, mteo, reference, strict=True))

    def to_json(self) -> dict[str, Any]:
        found = {name: quality.to_json() for name, quality in self.samplers.items()}
        return {**self.context, "samplers": found, "gap_closed": list(self.gap_closed)}


def evaluate(
    bundle: Path | str,
    data: Path | str,
    *,
    features: str = "inception",
    num: int = 10_000,
    seeds: Sequence[int] = (0,),
    batch: int = 250,
    engine: str = "auto",
    device: str | None = None,
    realisation: str | None = None,
    requests: Path | str | Arrays | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Fréchet distance of a built bundle's images to data, with the plain solver's and the reference trajectory's.

    Args:
        data: image folder, zip or tar of one, npz of uint8 images, or npz of reference statistics (``mu``, ``sigma``) of the
            same feature network.
        features: ``inception`` (torch-fidelity), or a feature network as an ``.onnx`` file (:func:`quality.features_of`).
        num: images of each sampler, for each seed.
        seeds: of the noise; the spread over them is what a difference has to exceed.
        batch: images per engine call.
        requests: what the backbone wants beside the noise: an npz file or arrays ``[rows, ...]`` by name, of which images draw
            rows. None draws at random, which only class labels allow.

    Raises:
        InputError: for data or features that do not go with the bundle, or a count out of range.
        EngineError: when a sampler makes images that are not finite.
    """
    if num < 2 or batch < 1 or not seeds:
        raise InputError(f"expected --num of 2 or more, --batch of 1 or more and a seed; found {num}, {batch}, {list(seeds)}")
    opened, network = Bundle.open(bundle), features_of(features)
    given = read_requests(Path(requests)) if isinstance(requests, (Path, str)) else requests
    real = statistics(Path(data), opened.image_shape_at(None), network, batch)
    with Sampler.load(opened.path, engine=engine, device=device, realisation=realisation) as sampler, reporter(quiet) as report:
        ways = _ways(sampler)
        runs = [_run(sampler, ways, network, real, num, seed, batch, given, report) for seed in seeds]
        built = sampler.built_engine("evaluate")
        context = {
            "bundle": opened.path.resolve().name,
            "features": features if features == "inception" else Path(features).name,
            "data": Path(data).name,
            "num": num,
            "seeds": list(seeds),
            "engine": f"{built.backend.name}-{built.device}",
            "precision": sampler.precision,
            "realisation": sampler.loop.name,
            "solver": sampler.plan.solver,
        }
    counts = {name: len(plan.evaluations) for name, (plan, _) in ways.items()}
    found = {
        name: Quality(counts[name], tuple(run[name][0] for run in runs), tuple(run[name][1] for run in runs)) for name in ways
    }
    return Evaluation(found, context)


def statistics(data: Path, shape: tuple[int, ...], network: Features, batch: int) -> Statistics:
    """Statistics of images of a ``shape`` ``(channels, height, width)``, or those in an npz of reference statistics.

    Raises:
        InputError: when there are none.
    """
    if data.suffix == ".npz" and data.is_file() and (known := Statistics.load(data)) is not None:
        return known
    if len(shape) != 3:
        raise InputError(f"expected a backbone of images [channels, height, width]; found samples {list(shape)}")
    channels, height, width = shape
    pixels = dataset.read(data, (height, width), channels)
    parts = [network(pixels[i : i + batch].astype(np.float32) / 127.5 - 1) for i in range(0, len(pixels), batch)]
    return Statistics.of(np.concatenate(parts))


def _ways(sampler: Sampler) -> dict[str, tuple[Any, Draw]]:
    """Name -> (plan, how it draws), the reference first: the others' errors are against it."""

    def conditioned(plan: Any) -> Draw:
        return lambda noise, given: sampler.conditioned_states(plan, noise, given)[-1]

    plain, reference = sampler.bundle.plain_plan, sampler.reference_plan
    ways = {REFERENCE: (reference, conditioned(reference)), PLAIN: (plain, conditioned(plain))}
    return {**ways, MTEO: (sampler.plan, sampler.image)}


def _run(
    sampler: Sampler,
    ways: Mapping[str, tuple[Any, Draw]],
    network: Features,
    real: Statistics,
    num: int,
    seed: int,
    batch: int,
    given: Arrays | None,
    report: Reporter,
) -> dict[str, tuple[float, float]]:
    """Of one seed, name -> (Fréchet distance, mean squared error against the reference)."""
    shape, task = sampler.bundle.sample_shape, report.task(f"seed {seed}", num)
    requests = draw_parts(sampler.bundle.requests, num, seed, given)
    features: dict[str, list[NDArray[Any]]] = {name: [] for name in ways}
    squares = dict.fromkeys(ways, 0.0)
    for start in range(0, num, batch):
        rows = range(start, min(start + batch, num))
        noise, part = noise_for(shape, seed, rows), requests(slice(start, rows.stop))
        reference: Array | None = None
        for name, (_, draw) in ways.items():
            found = sampler.decode(draw(noise, part))
            if not np.isfinite(found).all():
                raise EngineError(f"expected finite images of {name}; found NaN or infinity; run: mteo-deploy verify BUNDLE")
            found = found.clip(-1, 1)
            reference = found if reference is None else reference
            apart = np.square(found - reference, dtype=np.float64).reshape(len(rows), -1)
            squares[name] += float(apart.mean(axis=1).sum())
            features[name].append(network(found))
        report.advance(task, len(rows))
    distances = {name: frechet_distance(Statistics.of(np.concatenate(parts)), real) for name, parts in features.items()}
    return {name: (distances[name], squares[name] / num) for name in ways}
