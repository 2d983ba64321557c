"""What ``verify`` holds a bundle to beside its correctness: budgets, and an older report."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy.errors import InputError, border
from mteo_deploy.latency import bootstrap_quotient
from mteo_deploy.numerics import Check
from mteo_deploy.report import Report
from mteo_deploy.text import read_text

LARGEST = 1e12
"""Of a budget: milliseconds, ratios and errors are smaller."""


def _short(value: object) -> str:
    """A value out of a file, in a few words; it may be of any length or depth."""
    if isinstance(value, int):
        return "an integer" if value.bit_length() > 64 else str(value)
    return repr(value)[:40] if isinstance(value, str | float) else type(value).__name__


@dataclass(frozen=True)
class Budgets:
    """What is allowed; None for no limit.

    Attributes:
        max_p50_ms: median time to sample one batch, in milliseconds.
        max_p99_ms: its 99th percentile.
        max_overhead: the evaluations over the time-conditioned ones, e.g. 0.02; missed only when the whole 95 % interval
            lies above it.
        max_error: relative error of the images against torch's, where it should be below the precision's own tolerance.
    """

    max_p50_ms: float | None = None
    max_p99_ms: float | None = None
    max_overhead: float | None = None
    max_error: float | None = None

    @classmethod
    def read(cls, path: Path) -> Budgets:
        """Read a TOML file whose keys are the names above.

        Raises:
            InputError: for a file that is no TOML, a key that is no budget, or a value that is no number.
        """
        with border(f"expected {path} to be TOML", "write lines such as max_p50_ms = 25"):
            found = tomllib.loads(read_text(path, "a TOML file of budgets"))
        names = [field.name for field in fields(cls)]
        for name, value in found.items():
            if name not in names:
                raise InputError(f"{path}: expected budgets named {', '.join(names)}; found {name!r}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{path}: expected {name} to be a number; found {_short(value)}")
            if not abs(value) <= LARGEST:  # NaN neither; an integer may be too long to become a float
                raise InputError(f"{path}: expected {name} to be a number that can be; found {_short(value)}")
        return cls(**found)

    def override(self, **given: float | None) -> Budgets:
        """These budgets, with those of ``given`` that are not None in their place."""
        return Budgets(**{**asdict(self), **{name: value for name, value in given.items() if value is not None}})

    @property
    def need_latency(self) -> bool:
        return any(limit is not None for limit in (self.max_p50_ms, self.max_p99_ms, self.max_overhead))

    def checks(self, error: float, latency: dict[str, Any]) -> list[Check]:
        """One check per limit.

        Args:
            error: relative error of the images.
            latency: as :attr:`Report.latency`.
        """
        doubts = f"; unreliable: {'; '.join(latency['doubts'])}" if latency.get("doubts") else ""
        found = []
        for name, limit in (("p50", self.max_p50_ms), ("p99", self.max_p99_ms)):
            if limit is not None:
                took = latency["loop"][f"a_{name}"]
                detail = f"one batch takes {took:.2f} ms (allowed {limit} ms){doubts}"
                found.append(Check(f"budget {name}", took <= limit, detail))
        if self.max_overhead is not None:
            ratio, low = latency["step"]["ratio"] - 1, latency["step"]["ratio_low"] - 1
            detail = (
                f"{latency['realisation']} over time-conditioned: {ratio:+.1%}, at least {low:+.1%} "
                f"(allowed {self.max_overhead:+.1%}){doubts}"
            )
            found.append(Check("budget overhead", low <= self.max_overhead, detail))
        if self.max_error is not None:
            detail = f"relative error of the images {error:.1e} (allowed {self.max_error:.1e})"
            found.append(Check("budget error", error <= self.max_error, detail))
        return found


def check_comparable(old: Report, new: Report) -> None:
    """Check that two reports are of the same thing.

    Args:
        new: of which only ``engine``, ``device``, ``precision`` and the latency part's ``batch`` and ``evaluations`` count.

    Raises:
        InputError: where one of these differs, or a report has no latency part.
    """
    if not (old.latency and new.latency):
        raise InputError("expected two reports with a latency part; found one without; use --seconds above 0 in both")
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in ("engine", "device", "precision")}
    pairs |= {name: (old.latency[name], new.latency[name]) for name in ("batch", "evaluations")}
    for name, (before, now) in pairs.items():
        if before != now:
            raise InputError(
                f"expected an older report of {name} {now}; found {before}; compare with a report of the same {name}"
            )


def against(old: Report, new: Report) -> list[Check]:
    """Is ``new`` slower than ``old``?

    Times of two runs do not compare: the machine is another, or busy with something else. Both runs hold the ratio to the
    time-conditioned network of the same minute, and that compares: a regression is where the whole 99 % bootstrap interval of
    the quotient of the two medians lies above one.

    Raises:
        InputError: as :func:`check_comparable`.
    """
    check_comparable(old, new)
    checks = []
    for name in ("step", "sample"):
        samples = [np.asarray(report.latency[name]["ratios"]) for report in (new, old)]
        quotient, low, high = bootstrap_quotient(samples[0], samples[1])
        detail = f"{quotient - 1:+.1%} against the older report [{low - 1:+.1%}, {high - 1:+.1%}], both over time-conditioned"
        checks.append(Check(f"no slower: {name}", low <= 1, detail))
    return checks
