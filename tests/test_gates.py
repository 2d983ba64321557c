"""Budgets, the older report, and the files a report becomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import failed

from mteo_deploy.errors import InputError
from mteo_deploy.gates import Budgets, against
from mteo_deploy.numerics import Check
from mteo_deploy.report import Report
from mteo_deploy.verification import verify


def report(ratio: float = 1.0, *, seed: int = 0, spread: float = 0.05, **changed: Any) -> Report:
    """A report whose pairs have ratios of this median."""
    ratios = (ratio * (1 + spread * np.random.default_rng(seed).standard_normal(60))).tolist()
    latency = {"batch": 1, "evaluations": 3, "step": {"ratios": ratios}, "sample": {"ratios": ratios}}
    return replace(Report("b", "onnxruntime", "cpu", "fp32", [Check("finite", True, "")], latency), **changed)


def test_budgets_of_latency(tiny_bundle: Path) -> None:
    tight = Budgets(max_p50_ms=0.0001, max_p99_ms=0.0001, max_overhead=-0.99)
    found = verify(tiny_bundle, seconds=0.1, budgets=tight, quiet=True)
    assert failed(found) == {"budget p50", "budget p99", "budget overhead"} and not found.passed
    loose = Budgets(max_p50_ms=1e6, max_p99_ms=1e6, max_overhead=1e6, max_error=1e-3)
    found = verify(tiny_bundle, seconds=0.1, budgets=loose, quiet=True)
    assert found.passed, failed(found)
    assert len(found.latency_lines()) == 3 + bool(found.latency["doubts"])
    loop = found.latency["loop"]
    assert loop["pairs"] >= 10 and loop["a_cv"] > 0 and len(loop["ratios"]) == loop["pairs"]
    assert 0 < loop["a_p50"] <= loop["a_p90"] <= loop["a_p95"] <= loop["a_p99"]


def test_budget_of_error_needs_no_latency(tiny_bundle: Path) -> None:
    found = verify(tiny_bundle, seconds=0, budgets=Budgets(max_error=0.0), quiet=True)
    assert failed(found) == {"budget error"}


def test_budget_says_that_the_times_are_unreliable() -> None:
    latency = {"loop": {"a_p50": 2.0}, "doubts": ["step: other programs used 50% of the processors"]}
    (check,) = Budgets(max_p50_ms=1.0).checks(0.0, latency)
    assert not check.passed and "unreliable" in check.detail and "50%" in check.detail


def test_budget_file(tmp_path: Path) -> None:
    path = tmp_path / "budgets.toml"
    path.write_text("max_p50_ms = 25\nmax_overhead = 0.02\n")
    found = Budgets.read(path)
    assert found == Budgets(max_p50_ms=25, max_overhead=0.02)
    assert found.override(max_p50_ms=3.0, max_error=None) == Budgets(max_p50_ms=3.0, max_overhead=0.02)


@pytest.mark.parametrize(
    ("text", "match"),
    [("max_p50 = 3", "max_p50_ms, .*found 'max_p50'"), ("max_p50_ms = '3'", "number; found '3'"), ("= 3", "TOML")],
)
def test_bad_budget_file(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "budgets.toml").write_text(text)
    with pytest.raises(InputError, match=match):
        Budgets.read(tmp_path / "budgets.toml")
    with pytest.raises(InputError, match="No such file"):
        Budgets.read(tmp_path / "other.toml")


def test_slower_than_the_older_report() -> None:
    found = {check.name: check for check in against(report(1.0), report(1.2, seed=1))}
    assert not found["no slower: step"].passed and not found["no slower: sample"].passed
    assert 15 < float(found["no slower: step"].detail.split("%")[0]) < 25


@pytest.mark.parametrize("ratio", [0.8, 1.0])
def test_no_slower_than_the_older_report(ratio: float) -> None:
    assert all(check.passed for check in against(report(1.0), report(ratio, seed=1)))


def test_noise_is_no_regression() -> None:
    """Two runs of the same thing: at a level of 99 %, one in two hundred is called slower; 200 runs, fewer than 8."""
    slower = sum(not against(report(seed=i), report(seed=1000 + i))[0].passed for i in range(200))
    assert slower < 8


@pytest.mark.parametrize(("changed", "match"), [({"engine": "openvino"}, "engine"), ({"precision": "bf16"}, "precision")])
def test_report_of_something_else(changed: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        against(report(**changed), report())


def test_report_of_another_batch() -> None:
    with pytest.raises(InputError, match="batch 1; found 4"):
        against(report(latency={**report().latency, "batch": 4}), report())


def test_report_is_read_back_and_compared(tiny_bundle: Path, tmp_path: Path) -> None:
    first = verify(tiny_bundle, seconds=0.1, quiet=True)
    first.save(tmp_path / "report.json")
    old = Report.read(tmp_path / "report.json")
    assert old == first
    again = verify(tiny_bundle, seconds=0.1, older=old, quiet=True)
    compared = [check for check in again.checks if check.name.startswith("no slower")]
    assert [check.name for check in compared] == ["no slower: step", "no slower: sample"]
    with pytest.raises(InputError, match="without; use --seconds"):
        verify(tiny_bundle, seconds=0, older=old, quiet=True)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"passed": true, "checks": [{"a": 1}]}'])
def test_no_report(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match=r"report\.json that verify wrote"):
        Report.read(tmp_path / "report.json")


def test_report_without_the_ratios(tmp_path: Path) -> None:
    """As versions before the comparison wrote it."""
    report(latency={"batch": 1, "evaluations": 3, "step": {"ratio": 1.0}, "sample": {}}).save(tmp_path / "report.json")
    with pytest.raises(InputError, match="older version"):
        Report.read(tmp_path / "report.json")


def test_junit(tmp_path: Path) -> None:
    bad = Report("<b>", "onnxruntime", "cpu", "fp32", [Check("a < b", False, "1 & 2"), Check("c", True, "fine")])
    bad.save(tmp_path / "junit.xml")
    (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("verify <b>", "2", "1")
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert cases["a < b"].find("failure").get("message") == "1 & 2"  # type: ignore[union-attr]
    assert cases["c"].find("failure") is None and cases["c"].get("classname") == "onnxruntime.cpu.fp32"
