"""Latency: interleaved comparison of two callables, with medians and a bootstrap interval on their ratio.

A and B alternate in pairs, in random order within a pair, so that a machine that slows down slows both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Comparison:
    """Times in milliseconds and the ratio A/B of paired runs with its 95 % bootstrap interval."""

    a_p50: float
    a_p90: float
    a_p99: float
    b_p50: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap_median(values: NDArray[np.float64], resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Median and its 95 % percentile-bootstrap interval (Efron & Tibshirani 1993, chapter 13)."""
    generator = np.random.default_rng(seed)
    medians = np.median(values[generator.integers(len(values), size=(resamples, len(values)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def compare(a: Callable[[], object], b: Callable[[], object], *, seconds: float = 2.0, pairs: int = 200) -> Comparison:
    """Time ``a`` against ``b`` until ``seconds`` have passed or ``pairs`` pairs are done (at least 10 pairs).

    The median of the per-pair ratios is reported: it is robust to a drift that both share.
    """
    for _ in range(3):
        a()
        b()
    order = np.random.default_rng(0)
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or (len(times) < pairs and time.perf_counter() < end):
        pair = [0.0, 0.0]
        for which in order.permutation(2):
            start = time.perf_counter()
            (a, b)[which]()
            pair[which] = time.perf_counter() - start
        times.append((pair[0], pair[1]))
    table = np.asarray(times) * 1e3
    ratio, low, high = bootstrap_median(table[:, 0] / table[:, 1])
    p50, p90, p99 = np.percentile(table[:, 0], [50, 90, 99])
    return Comparison(float(p50), float(p90), float(p99), float(np.median(table[:, 1])), ratio, low, high, len(times))
