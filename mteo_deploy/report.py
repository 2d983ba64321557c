"""What ``verify`` found, and the files it becomes: JSON, JUnit XML, or one self-contained page (no network, no script)."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mteo_deploy.errors import InputError
from mteo_deploy.numerics import Check

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #ddd }
.ok { color: #176b34 } .failed { color: #a4161a; font-weight: 600 } img { max-width: 100%; image-rendering: pixelated }
"""


@dataclass(frozen=True)
class Report:
    """What ``verify`` found.

    Attributes:
        checks: numbers, canaries, budgets and comparison with an older report, each passed or not.
        latency: ``step``: the evaluations against the conditioned ones; ``sample``: the whole loop; ``loop``: the whole loop
            against its own engine calls; ``doubts``: why the times are not to be trusted.
        environment: versions, machine and options it was found with.
        costs: as :func:`mteo_deploy.costs.measure` gives them; empty when they were not asked for, and in older reports.
        bisection: as :func:`mteo_deploy.bisection.bisect` gives it; empty when not asked for, and in older reports.
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

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read the JSON that :meth:`save` wrote.

        Raises:
            InputError: for a file that is no such report.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            found.pop("passed")
            report = cls(**{**found, "checks": [Check(**check) for check in found["checks"]]})
            complete = not report.latency or (
                {"batch", "evaluations"} <= report.latency.keys()
                and all("ratios" in report.latency[name] for name in ("step", "sample"))
            )
        except OSError as error:
            raise InputError(f"expected a report of verify at {path}; {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError):
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
        if self.latency["doubts"]:
            lines.append(f"times marked unreliable: {'; '.join(self.latency['doubts'])}")
        return lines

    def further_lines(self) -> list[str]:
        """Bisection and costs in words; empty when they were not asked for."""
        from mteo_deploy import bisection, costs

        return [*bisection.lines(self.bisection), *costs.lines(self.costs)]

    def save(self, path: Path) -> None:
        """Write the report: JUnit XML for a path ending in ``.xml``, a page for ``.html``, else JSON."""
        if path.suffix == ".html":
            text = page(self)
        elif path.suffix == ".xml":
            text = junit(self)
        else:
            text = json.dumps(self.to_json(), indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def junit(*reports: Report) -> str:
    """JUnit XML as CI systems read it: a test suite per report, a test case per check, a failure where one did not pass."""
    root = ElementTree.Element("testsuites")
    for report in reports:
        _suite(root, report)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


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


def _checks(report: Report) -> str:
    rows = "".join(
        f'<tr><td>{escape(c.name)}</td><td class="{"ok" if c.passed else "failed"}">{"ok" if c.passed else "FAILED"}</td>'
        f"<td>{escape(c.detail)}</td></tr>"
        for c in report.checks
    )
    return f"<table><tr><th>check</th><th></th><th>found</th></tr>{rows}</table>"


def page(*reports: Report, picture: Path | None = None, caption: str = "") -> str:
    """One HTML page with a picture (PNG, embedded) and the checks and latency of each report."""
    parts = []
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<p><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></p><p>{escape(caption)}</p>')
    for report in reports:
        verdict = "verified" if report.passed else "NOT verified"
        where = f"{report.bundle} in {report.engine} on {report.device}, {report.precision}"
        parts.append(f"<h2>{escape(where)}: {verdict}</h2>")
        parts.append(_checks(report))
        parts += [f"<p>{escape(line)}</p>" for line in report.latency_lines() + report.further_lines()]
        rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in report.environment.items())
        parts.append(f"<table>{rows}</table>" if rows else "")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>mteo-deploy report</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>mteo-deploy report</h1>\n{body}\n</body></html>\n"
    )
