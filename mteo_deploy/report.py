"""What ``verify`` found, and the files it becomes: JSON, JUnit XML, a self-contained page, or one picture of its panels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mteo_deploy import bisection, costs, plots
from mteo_deploy.errors import InputError
from mteo_deploy.files import check_file, write_atomic
from mteo_deploy.numerics import Check
from mteo_deploy.page import page
from mteo_deploy.pictures import Pictures
from mteo_deploy.text import read_text, shown


@dataclass(frozen=True)
class Report:
    """What ``verify`` found.

    Attributes:
        checks: numbers, canaries, budgets and comparison with an older report, each passed or not.
        latency: ``decoder``: as :func:`mteo_deploy.latency.share` gives it, for a bundle with one; ``step``: the
            evaluations against the conditioned ones; ``sample``: the whole loop; ``loop``: the whole loop
            against its own engine calls; each with the times of its pairs in milliseconds; ``waterfall``: one sampling, as
            :func:`mteo_deploy.waterfall.record` gives it; ``doubts``: why the times are not to be trusted.
        environment: versions, machine and options it was found with.
        costs: as :func:`mteo_deploy.costs.measure` gives them; empty when they were not asked for, and in older reports.
        bisection: as :func:`mteo_deploy.bisection.bisect` gives it; empty when not asked for, and in older reports.
        compiler: as :func:`mteo_deploy.inspection.compiler` gives it; empty in older reports.
        pictures: images after every evaluation, for the page; not in the JSON.
    """

    bundle: str
    engine: str
    device: str
    precision: str
    checks: list[Check]
    latency: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    bisection: dict[str, Any] = field(default_factory=dict)
    compiler: dict[str, Any] = field(default_factory=dict)
    pictures: Pictures | None = field(default=None, compare=False, repr=False)

    @property
    def title(self) -> str:
        """Bundle, engine, device and precision."""
        return f"{self.bundle} in {self.engine} on {self.device}, {self.precision}"

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        found = asdict(replace(self, pictures=None))
        del found["pictures"]
        return {"passed": self.passed, **found}

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read the JSON that :meth:`save` wrote.

        Raises:
            InputError: for a file that is no such report.
        """
        try:
            found = json.loads(read_text(path, "a report of verify"))
            found.pop("passed")
            report = cls(**{**found, "checks": [Check(**check) for check in found["checks"]]})
            complete = not report.latency or (
                {"batch", "evaluations"} <= report.latency.keys()
                and all("ratios" in report.latency[name] for name in ("step", "sample"))
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(f"expected {path} to be a report.json that verify wrote; found something else") from None
        if not complete:
            raise InputError(f"expected the ratio of every pair in {path}; found none: an older version wrote it; verify again")
        return report

    def latency_lines(self) -> list[str]:
        """The latency part in words; empty when it was left out."""
        if not self.latency:
            return []
        step, sample, loop = (self.latency[name] for name in ("step", "sample", "loop"))

        def ratio(found: Mapping[str, Any]) -> str:
            return f"{found['ratio']:.3f} [{found['ratio_low']:.3f}, {found['ratio_high']:.3f}]"

        lines = [
            f"latency, batch {self.latency['batch']}, {self.latency['evaluations']} evaluations: p50 {loop['a_p50']:.2f} ms, "
            f"p90 {loop['a_p90']:.2f} ms, p95 {loop['a_p95']:.2f} ms, p99 {loop['a_p99']:.2f} ms, variation {loop['a_cv']:.0%}",
            f"{self.latency['realisation']} / time-conditioned, engine calls: {ratio(step)}, whole sampling: {ratio(sample)} "
            f"(medians of {step['pairs']} and {sample['pairs']} interleaved pairs, 95 % intervals)",
            f"sampling loop / its engine calls: {ratio(loop)}",
        ]
        if decoder := self.latency.get("decoder"):
            lines.append(
                f"decoder: {decoder['milliseconds']:.2f} ms, {decoder['share']:.0%} of a whole sampling with it (the loop "
                f"{decoder['loop_milliseconds']:.2f} ms)"
            )
        if self.latency["doubts"]:
            lines.append(f"times marked unreliable: {'; '.join(self.latency['doubts'])}")
        return lines

    def further_lines(self) -> list[str]:
        """Bisection and costs in words; empty when they were not asked for."""
        return [*bisection.lines(self.bisection), *costs.lines(self.costs)]

    def save(self, path: Path) -> None:
        """Write the report: a page for a path ending in ``.html``, JUnit XML for ``.xml``, one picture for ``.png``, else JSON.

        Raises:
            MissingPackageError: for a picture without matplotlib.
        """
        if path.suffix.lower() == ".png":
            plots.sheet(self, path)
            return
        if path.suffix.lower() == ".html":
            text = page(self)
        elif path.suffix.lower() == ".xml":
            text = junit(self)
        else:
            text = json.dumps(self.to_json(), indent=1) + "\n"
        write_atomic(path, text)


DRAWN = (".html", ".png")
"""Endings of the files that show images."""


def check_outputs(paths: Sequence[Path], several: bool = False) -> None:
    """Refuse what cannot be written, before any work is done.

    Args:
        several: reports of several engines.

    Raises:
        InputError: for what cannot be written, the same path twice, or one picture of several engines.
        MissingPackageError: for a picture without matplotlib.
    """
    for path in paths:
        check_file(path)
        if path.suffix.lower() == ".png" and several:
            raise InputError(f"expected one engine for a picture; found several for {path}; write a page (.html) instead")
        if path.suffix.lower() == ".png":
            plots.require(path)
    if len(set(paths)) < len(paths):
        raise InputError(f"expected every -o once; found {', '.join(map(str, paths))}")


def junit(*reports: Report) -> str:
    """JUnit XML as CI systems read it: a test suite per report, a test case per check, a failure where one did not pass."""
    root = ElementTree.Element("testsuites")
    for report in reports:
        _suite(root, report)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + shown(ElementTree.tostring(root, encoding="unicode")) + "\n"


def _suite(root: ElementTree.Element, report: Report) -> None:
    failures = sum(not check.passed for check in report.checks)
    suite = ElementTree.SubElement(
        root, "testsuite", name=f"verify {report.bundle}", tests=str(len(report.checks)), failures=str(failures), errors="0"
    )
    for check in report.checks:
        name = f"{report.engine}.{report.device}.{report.precision}"
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=check.name)
        if check.passed:
            ElementTree.SubElement(case, "system-out").text = check.detail
        else:
            ElementTree.SubElement(case, "failure", message=check.detail)
    ElementTree.SubElement(suite, "system-out").text = "\n".join(report.latency_lines() + report.further_lines())
