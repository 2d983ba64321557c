"""``verify --engine all``: every built engine through the whole gate, and their images against one another's.

Each engine is compared with torch on the stored noise. The images compared here are of another seed and another batch
size, so that an engine which is right on what is stored and off elsewhere is noticed, with no torch in reach.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import cache
from mteo_deploy.errors import InputError
from mteo_deploy.files import write_atomic
from mteo_deploy.numerics import Check, psnr, relative_error, tolerance_of, worst_region
from mteo_deploy.page import page
from mteo_deploy.precision import rank
from mteo_deploy.report import Report, check_outputs, junit
from mteo_deploy.sample_request import SampleRequest
from mteo_deploy.sampler import Sampler
from mteo_deploy.verification import verify

ALL = "all"
SEED, COUNT = 21, 3
"""Of the images compared: neither the stored reference's seed and batch size nor the canaries'."""


@dataclass(frozen=True)
class Reports:
    """What ``verify`` found in several engines.

    Attributes:
        engines: one report per engine, device and precision.
        agreement: whether they agree, as a report of its own.
    """

    engines: list[Report]
    agreement: Report

    @property
    def every(self) -> list[Report]:
        """The engines' reports, and that of their agreement where there is more than one."""
        return [*self.engines, *([self.agreement] if self.agreement.checks else [])]

    @property
    def passed(self) -> bool:
        return all(report.passed for report in self.every)

    def to_json(self) -> dict[str, Any]:
        engines = [report.to_json() for report in self.engines]
        return {"passed": self.passed, "engines": engines, "agreement": self.agreement.to_json()}

    def save(self, path: Path) -> None:
        """Write the reports: a page for a path ending in ``.html``, JUnit XML for ``.xml``, else JSON.

        Raises:
            InputError: for a picture, which shows one engine.
        """
        check_outputs([path], several=True)
        make = {".html": page, ".xml": junit}.get(path.suffix.lower())
        text = make(*self.every) if make else json.dumps(self.to_json(), indent=1) + "\n"
        write_atomic(path, text)


def names_several(engine: str) -> bool:
    """Does ``--engine`` name more than one engine?"""
    return engine == ALL or "," in engine


def verify_engines(
    bundle: Path | str | Sequence[Sampler],
    *,
    engine: str = ALL,
    device: str | None = None,
    realisation: str | None = None,
    older: Report | None = None,
    **options: Any,
) -> Reports:
    """Verify a bundle in several engines, one after the other, and compare their images.

    Args:
        bundle: or samplers of one bundle, already open.
        engine: names by comma, each of which must be built; or ``all`` that are, at least one.
        options: as :func:`mteo_deploy.verification.verify` takes them.

    Raises:
        InputError: with an older report, which is of one engine; or as ``verify``.
        BundleError: for an engine of the list that is not built, or a bundle without any that fits.
        EngineError: as :meth:`Sampler.load`.
    """
    if older is not None:
        raise InputError(f"expected one engine with --against, whose report is of {older.engine}; found --engine {engine}")
    reports: list[Report] = []
    images: dict[tuple[str, str], NDArray[np.float32]] = {}
    for opened in _samplers(bundle, engine, device, realisation):
        reports.append(verify(opened, **options))
        place = (f"{reports[-1].engine}-{reports[-1].device} {reports[-1].precision}", reports[-1].precision)
        requests = opened.bundle.reference_requests(COUNT)
        images[place] = opened.together(SampleRequest(COUNT, SEED, COUNT, requests, finite=False))  # the check says so
    checks = [_agree(images, *pair) for pair in combinations(images, 2)]

    def all_of(what: str) -> str:
        return ", ".join(dict.fromkeys(getattr(report, what) for report in reports))

    agreement = Report(reports[0].bundle, all_of("engine"), all_of("device"), all_of("precision"), checks)
    return Reports(reports, agreement)


def _samplers(
    bundle: Path | str | Sequence[Sampler], engine: str, device: str | None, realisation: str | None
) -> Iterator[Sampler]:
    """Opened one at a time: weights of several engines need not be in memory together."""
    if not isinstance(bundle, str | Path):
        yield from bundle
        return
    opened = Bundle.open(bundle)
    names = [] if engine == ALL else [name.strip() for name in engine.split(",")]
    for built in cache.every(opened, names, device):
        yield Sampler.of(opened, built, realisation)


def _agree(images: dict[tuple[str, str], NDArray[np.float32]], a: tuple[str, str], b: tuple[str, str]) -> Check:
    """One pair: the finer precision's images are the expected ones, the coarser precision says what is allowed."""
    finer, coarser = sorted((a, b), key=lambda place: rank(place[1]))
    found, expected, allowed = images[coarser], images[finer], tolerance_of(coarser[1])["trajectory"]
    error = relative_error(found, expected)
    detail = f"relative error of the images {error:.1e} (allowed {allowed:.0e}), {psnr(found, expected):.0f} dB"
    if not error <= allowed:
        detail += f"; most of it in {worst_region(found, expected)}"
    return Check(f"engines agree: {a[0]} and {b[0]}", error <= allowed, detail)
