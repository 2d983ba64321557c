"""Calibration: the scale of each activation, from what it is on trajectories.

Each evaluation has a graph of its own, so it has scales of its own too: at high noise a layer's input may be a tenth of what
it is at the end, and one scale for both gives away bits at each. A scale is chosen per tensor out of candidates (the largest
magnitude, percentiles, and clips between 30 % and 100 % of the largest) by the squared error of the numbers it rounds. A
threshold by entropy is one more such clip and could not do better by that measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.exporters.passes.quantize import SMALLEST, Format, rounded

Array = NDArray[np.float32]
KEPT = 2**15
"""Numbers of a tensor, from one batch, that are kept to choose a scale by."""
PERCENTILES = (99.99, 99.9)
CLIPS = np.linspace(0.3, 0.95, 14)


@dataclass
class Sample:
    """Numbers of one tensor: a random part of them, and their largest magnitude."""

    parts: list[Array] = field(default_factory=list)
    largest: float = 0.0

    def add(self, values: Array) -> None:
        flat = values.reshape(-1)
        generator = np.random.default_rng(len(self.parts))
        self.parts.append(flat if flat.size <= KEPT else flat[generator.integers(0, flat.size, KEPT)])
        self.largest = max(self.largest, float(np.abs(flat).max(initial=0.0)))

    @property
    def values(self) -> Array:
        return np.concatenate(self.parts)


@dataclass(frozen=True)
class Scale:
    """A scale, how it was found, and the mean squared error of the numbers that it rounds."""

    value: float
    method: str
    error: float


def choose(sample: Sample, form: Format, also: Mapping[str, float] | None = None) -> Scale:
    """The scale of least squared error on a sample.

    Args:
        also: further candidates, method -> scale: an evaluation may take the pooled scale, so it is never worse off.
    """
    values = sample.values
    magnitudes = np.abs(values)
    candidates = {"largest": sample.largest}
    candidates |= {f"percentile {q}": float(np.percentile(magnitudes, q)) for q in PERCENTILES}
    candidates |= {f"clip {clip:.2f}": float(clip * sample.largest) for clip in CLIPS}
    scales = {method: max(largest / form.largest, SMALLEST) for method, largest in candidates.items()} | dict(also or {})
    found = [Scale(scale, method, squared_error(values, scale, form)) for method, scale in scales.items()]
    return min(found, key=lambda one: one.error)


def squared_error(values: Array, scale: float, form: Format) -> float:
    """Mean squared error of numbers rounded by a scale."""
    return float(np.mean((rounded(values, scale, form) - values) ** 2, dtype=np.float64))


def gather(batches: Iterable[Mapping[str, Array]]) -> dict[str, Sample]:
    """Samples of tensors, by name, from their values batch by batch."""
    found: dict[str, Sample] = {}
    for batch in batches:
        for name, values in batch.items():
            found.setdefault(name, Sample()).add(values)
    return found


def pool(samples: Sequence[Mapping[str, Sample]]) -> dict[str, Sample]:
    """Samples of all evaluations as if there were one graph for them."""
    names = dict.fromkeys(name for one in samples for name in one)
    pooled = {}
    for name in names:
        found = [one[name] for one in samples if name in one]
        pooled[name] = Sample([part for one in found for part in one.parts], max(one.largest for one in found))
    return pooled


def scales(samples: Mapping[str, Sample], form: Format, pooled: Mapping[str, Scale] | None = None) -> dict[str, Scale]:
    """A scale for each tensor.

    Args:
        pooled: scales of all evaluations together, as candidates.
    """
    return {name: choose(sample, form, {"pooled": pooled[name].value} if pooled else None) for name, sample in samples.items()}
