"""Latency: interleaved comparison of two callables, with medians and a bootstrap interval on their ratio.

A and B alternate in pairs, in random order within a pair, so that a machine that slows down slows both. What makes a result
doubtful (another program on the processors, a drift, a clock too coarse) is measured in the same run and said with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BUSY = 0.10
"""Share of the processors used by other programs from which a measurement is called doubtful."""

DRIFT = 0.10
"""Change of the median from the first third of a run to its last from which a measurement is called doubtful."""

CLOCK_TICKS = 1000
"""Resolutions of the clock that a median should last."""


@dataclass(frozen=True)
class Comparison:
    """Times in milliseconds and the ratio A/B of paired runs with its 95 % bootstrap interval.

    Attributes:
        a_cv: coefficient of variation of A's times: standard deviation over mean.
        drift: median of a pair's time in the last third of the run over the first third's, less one.
        busy: share of the processors that other programs used during the run; None where the platform does not tell.
        resolution: of the clock, in milliseconds.
        ratios: of every pair, in order.
        a_times, b_times: of every pair, in order, in milliseconds.
    """

    a_p50: float
    a_p90: float
    a_p95: float
    a_p99: float
    a_cv: float
    b_p50: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int
    drift: float
    busy: float | None
    resolution: float
    ratios: tuple[float, ...]
    a_times: tuple[float, ...]
    b_times: tuple[float, ...]

    @property
    def doubts(self) -> list[str]:
        """Why the times are not to be trusted, in words; empty when nothing speaks against them."""
        return _doubts(min(self.a_p50, self.b_p50), self.drift, self.busy, self.resolution)

    def to_json(self, ratios: bool = False) -> dict[str, Any]:
        """Every figure and ``doubts``; with ``ratios`` the ratio and the times of every pair too, rounded."""
        found = asdict(self) | {"doubts": self.doubts}
        for name in ("ratios", "a_times", "b_times"):
            pairs = [round(value, 6) for value in found.pop(name)]
            found |= {name: pairs} if ratios else {}
        return found


def _doubts(shortest: float, drift: float, busy: float | None, resolution: float) -> list[str]:
    found = []
    if busy is not None and busy > BUSY:
        found.append(f"other programs used {busy:.0%} of the processors")
    if abs(drift) > DRIFT:
        found.append(f"times changed by {drift:+.0%} during the run: load or throttling")
    if shortest < CLOCK_TICKS * resolution:
        found.append(f"medians of less than {CLOCK_TICKS} ticks of the clock")
    return found


def bootstrap_median(values: NDArray[np.float64], resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Median and its 95 % percentile-bootstrap interval (Efron & Tibshirani 1993, chapter 13)."""
    low, high = np.percentile(_medians(values, resamples, np.random.default_rng(seed)), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def bootstrap_quotient(
    new: NDArray[np.float64], old: NDArray[np.float64], level: float = 0.99, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Median of ``new`` over median of ``old``, two independent samples, and its percentile-bootstrap interval."""
    generator = np.random.default_rng(seed)
    quotients = _medians(new, resamples, generator) / _medians(old, resamples, generator)
    low, high = np.quantile(quotients, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(new) / np.median(old)), float(low), float(high)


def _medians(values: NDArray[np.float64], resamples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    return np.asarray(np.median(values[generator.integers(len(values), size=(resamples, len(values)))], axis=1))


def processor_seconds() -> tuple[float, float] | None:
    """Seconds that all processors were at work since the start of the machine, and this process's part; None if unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    except (OSError, ValueError):
        return None
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own.user + own.system


class OtherPrograms:
    """Measures from its making on what share of the processors other programs use."""

    def __init__(self) -> None:
        self.start, self.clock = processor_seconds(), time.perf_counter()

    def share(self) -> float | None:
        now = processor_seconds()
        if now is None or self.start is None:
            return None
        work = (now[0] - self.start[0]) - (now[1] - self.start[1])
        return max(0.0, work / ((time.perf_counter() - self.clock) * (os.cpu_count() or 1)))


@dataclass(frozen=True)
class Rounds:
    """Times of several callables, each once per round.

    Attributes:
        times: ``[rounds, callables]``, in milliseconds.
        busy: share of the processors that other programs used meanwhile; None where the platform does not tell.
    """

    times: NDArray[np.float64]
    busy: float | None

    @property
    def medians(self) -> list[float]:
        """Per callable, in milliseconds."""
        return [float(value) for value in np.median(self.times, axis=0)]

    @property
    def drift(self) -> float:
        """Median of a round's time in the last third over the first third's, less one."""
        third = len(self.times) // 3
        return float(np.median(self.times[-third:].sum(axis=1)) / np.median(self.times[:third].sum(axis=1)) - 1)

    @property
    def doubts(self) -> list[str]:
        """Why the times are not to be trusted, in words."""
        return _doubts(min(self.medians), self.drift, self.busy, resolution())


def resolution() -> float:
    """Of the clock, in milliseconds."""
    return time.get_clock_info("perf_counter").resolution * 1e3


def _warm_up(functions: Sequence[Callable[[], object]], seconds: float) -> None:
    """Run rounds until the medians of two blocks of three in a row agree within 5 %, for ``seconds`` at most."""
    end, previous = time.perf_counter() + seconds, float("inf")
    while True:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for function in functions:
                function()
            times.append(time.perf_counter() - start)
            if time.perf_counter() > end:
                return
        median = float(np.median(times))
        if abs(median / previous - 1) < 0.05:
            return
        previous = median


def interleave(
    functions: Sequence[Callable[[], object]], *, seconds: float = 2.0, rounds: int = 200, least: int = 10
) -> Rounds:
    """Time callables in rounds, in random order within each, until ``seconds`` or ``rounds`` are over (at least ``least``).

    All run beforehand until their times are stable, or half of ``seconds`` have passed.
    """
    _warm_up(functions, seconds / 2)
    order, others = np.random.default_rng(0), OtherPrograms()
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (len(times) < rounds and time.perf_counter() < end):
        one = [0.0] * len(functions)
        for which in order.permutation(len(functions)):
            start = time.perf_counter()
            functions[which]()
            one[which] = time.perf_counter() - start
        times.append(one)
    return Rounds(np.asarray(times) * 1e3, others.share())


def compare(a: Callable[[], object], b: Callable[[], object], *, seconds: float = 2.0, pairs: int = 200) -> Comparison:
    """Time ``a`` against ``b`` until ``seconds`` have passed or ``pairs`` pairs are done (at least 10 pairs).

    Both run beforehand until their times are stable. The median of the per-pair ratios is reported: it is robust to a drift
    that both share.
    """
    found = interleave([a, b], seconds=seconds, rounds=pairs)
    table = found.times
    ratios = table[:, 0] / table[:, 1]
    ratio, low, high = bootstrap_median(ratios)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(table[:, 0], [50, 90, 95, 99]))
    return Comparison(
        a_p50=p50,
        a_p90=p90,
        a_p95=p95,
        a_p99=p99,
        a_cv=float(table[:, 0].std() / table[:, 0].mean()),
        b_p50=float(np.median(table[:, 1])),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        pairs=len(table),
        drift=found.drift,
        busy=found.busy,
        resolution=resolution(),
        ratios=tuple(float(value) for value in ratios),
        a_times=tuple(table[:, 0].tolist()),
        b_times=tuple(table[:, 1].tolist()),
    )


def share(part: Callable[[], object], rest: Callable[[], object], *, seconds: float = 1.0) -> dict[str, float]:
    """What a part takes of itself and the rest, interleaved: ``milliseconds``, ``loop_milliseconds`` of the rest, ``share``.

    Three rounds where they take longer than ``seconds``: a share needs no interval, and minutes of large models are dear.
    """
    ours, others = interleave([part, rest], seconds=seconds, least=3).medians
    return {"milliseconds": ours, "loop_milliseconds": others, "share": ours / (ours + others)}
