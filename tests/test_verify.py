"""The gate: a good bundle passes, and every planted fault is caught by the check made for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import Array, Faulty, altered, failed

from mteo_deploy import latency, numerics
from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.base import Session
from mteo_deploy.engines.build import build
from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.gates import Budgets
from mteo_deploy.latency import OtherPrograms, bootstrap_median, compare, processor_seconds
from mteo_deploy.numerics import adapter_check, psnr, relative_error, worst_region
from mteo_deploy.page import page
from mteo_deploy.realisations import Baked
from mteo_deploy.report import Report
from mteo_deploy.sampler import Sampler
from mteo_deploy.verification import verify

CANARIES = {"finite", "not flat", "seed matters", "images differ", "repeatable", "batch size", "second session"}


def loop_of(sampler: Sampler) -> Baked:
    assert isinstance(sampler.loop, Baked)
    return sampler.loop


def planted(bundle: Path, fault: Callable[[Array, Mapping[str, Array]], Array], where: slice = slice(None)) -> Sampler:
    """A sampler whose sessions at ``where`` are faulty, in every sampler that it opens again too."""
    good = Sampler.load(bundle)
    faulty = [entry["graph"] for entry in good.bundle.manifest["realisations"]["baked"]][where]

    def open_graph(graph: str) -> Session:
        session = good.open_graph(graph)
        return Faulty(session, fault) if graph in faulty else session

    return Sampler(good.bundle, open_graph)


def with_fault(bundle: Path, fault: Callable[[Array, Mapping[str, Array]], Array], where: slice = slice(None)) -> set[str]:
    """Names of the checks that fail when the sessions at ``where`` are faulty."""
    return failed(verify(planted(bundle, fault, where), seconds=0, quiet=True))


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_history_bundle"])
def test_good_bundle_passes(name: str, request: pytest.FixtureRequest) -> None:
    report = verify(request.getfixturevalue(name), seconds=0, quiet=True)
    evaluations = {f"evaluation {i}" for i in range(3 if name == "tiny_bundle" else 4)}
    assert {check.name for check in report.checks} == {"noise", "adapter", "trajectory"} | evaluations | CANARIES
    assert report.passed, failed(report)
    assert report.latency == {} and report.latency_lines() == []


def test_what_export_found_of_the_adapter(tiny_bundle: Path) -> None:
    """The figure is the manifest's; a bundle of before that comparison passes and says so; no figure is no pass."""
    manifest = Bundle.open(tiny_bundle).manifest
    (check,) = [one for one in verify(tiny_bundle, seconds=0, quiet=True).checks if one.name == "adapter"]
    found = manifest["adapter"]
    assert 0 < found["error"] < 1e-5 and len(set(found["times"])) == 2 and found["tolerance"] == 1e-4
    assert check.passed and check.detail.startswith(f"equals the network's own forward: {found['error']:.0e} at 2 times")
    older = adapter_check({name: value for name, value in manifest.items() if name != "adapter"})
    assert older.passed and older.detail.startswith("not checked")
    for error in (1e-3, float("nan")):
        assert not adapter_check({"adapter": {**found, "error": error}}).passed
    for wrong in ([], {}, {**found, "error": "small"}, {**found, "times": 2}):
        with pytest.raises(BundleError, match="export again"):
            adapter_check({"adapter": wrong})


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_history_bundle"])
def test_swapped_steps(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The last two graphs in each other's place, every hash right, built again; refused where their outputs differ already."""
    last = 3 if name == "tiny_history_bundle" else 2

    def swap(manifest: dict[str, Any]) -> None:
        baked = manifest["realisations"]["baked"]
        baked[last - 1]["graph"], baked[last]["graph"] = baked[last]["graph"], baked[last - 1]["graph"]

    path = altered(request.getfixturevalue(name), tmp_path / "b", swap)
    if name == "tiny_history_bundle":  # the last evaluation keeps nothing for a next one
        with pytest.raises(BundleError, match="the inputs and outputs of the manifest"):
            Bundle.open(path)
        return
    build(path, engine="onnxruntime", realisation="baked", threads=1, quiet=True)
    found = failed(verify(path, seconds=0, quiet=True))
    assert found >= {f"evaluation {last - 1}", f"evaluation {last}", "trajectory"}
    assert not found & {"evaluation 0", "noise", "finite", "repeatable"}


def test_nan(tiny_bundle: Path) -> None:
    found = with_fault(tiny_bundle, lambda y, feeds: np.where(y > 0, np.nan, y))
    assert found >= {"evaluation 0", "evaluation 1", "evaluation 2", "trajectory", "finite"}


def test_one_nan_in_one_image(tiny_bundle: Path) -> None:
    def fault(y: Array, feeds: Mapping[str, Array]) -> Array:
        spoiled = y.copy()
        spoiled[-1, 0, 0, 0] = np.nan
        return spoiled

    found = with_fault(tiny_bundle, fault, slice(2, 3))
    assert found >= {"evaluation 2", "trajectory", "finite"}
    assert not found & {"evaluation 0", "evaluation 1"}


def test_constant_output(tiny_bundle: Path) -> None:
    found = with_fault(tiny_bundle, lambda y, feeds: np.full_like(y, 0.25))
    assert found >= {"evaluation 0", "evaluation 1", "evaluation 2", "trajectory", "not flat", "seed matters", "images differ"}
    assert not found & {"finite", "repeatable"}


def test_output_independent_of_input(tiny_bundle: Path) -> None:
    """Looks like an image, is the same for every seed."""
    fixed = np.random.default_rng(0).standard_normal((1, 8, 8))
    found = with_fault(tiny_bundle, lambda y, feeds: np.broadcast_to(fixed, y.shape))
    assert found >= {"evaluation 0", "trajectory", "seed matters", "images differ"}
    assert not found & {"finite", "not flat", "repeatable", "batch size"}


def test_every_image_the_first_of_its_batch(tiny_bundle: Path) -> None:
    found = with_fault(tiny_bundle, lambda y, feeds: np.repeat(y[:1], len(y), axis=0))
    assert found >= {"trajectory", "images differ", "batch size"}
    assert "seed matters" not in found


def test_history_of_calls(tiny_bundle: Path) -> None:
    """A drift of 1e-6 with every call: within all tolerances, and only the repeated run shows it."""
    calls = 0

    def drift(y: Array, feeds: Mapping[str, Array]) -> Array:
        nonlocal calls
        calls += 1
        return y + np.float32(1e-6 * calls)

    assert with_fault(tiny_bundle, drift, slice(2, 3)) == {"repeatable"}


@pytest.mark.parametrize(("spoiled", "check"), [("second", "second session"), ("first", "repeatable")])
def test_two_samplers_side_by_side(spoiled: str, check: str, tiny_bundle: Path) -> None:
    """One of them gives other images as soon as there are two."""
    good, opened = Sampler.load(tiny_bundle), 0

    def open_graph(graph: str) -> Session:
        nonlocal opened
        opened += 1
        mine = ("first" if opened <= 3 else "second") == spoiled
        return Faulty(good.open_graph(graph), lambda y, feeds: y * 1.01 if mine and opened > 3 else y)

    assert failed(verify(Sampler(good.bundle, open_graph), seconds=0, quiet=True)) == {check}


def test_dependence_on_batch_size(tiny_bundle: Path) -> None:
    """Right at the reference's batch of 4, wrong at batch 1."""
    assert with_fault(tiny_bundle, lambda y, feeds: y * (1.001 if len(y) == 1 else 1.0)) == {"batch size"}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_evaluation_slightly_off(index: int, tiny_bundle: Path) -> None:
    """One per cent, invisible in a picture: that evaluation is named, and the trajectory from there."""
    sampler = planted(tiny_bundle, lambda y, feeds: y * 1.01, slice(index, index + 1))
    report = verify(sampler, seconds=0, quiet=True)
    assert failed(report) == {f"evaluation {index}", "trajectory"}
    (trajectory,) = [check for check in report.checks if check.name == "trajectory"]
    assert f"first over it: evaluation {index}, image " in trajectory.detail


def test_fault_in_one_corner_is_located(tiny_bundle: Path) -> None:
    def fault(y: Array, feeds: Mapping[str, Array]) -> Array:
        spoiled = y.copy()
        spoiled[2:3, 0, 6:, :2] += 3.0
        return spoiled

    report = verify(planted(tiny_bundle, fault, slice(1, 2)), seconds=0, quiet=True)
    (check,) = [check for check in report.checks if check.name == "evaluation 1"]
    assert "most of it in next state, image 2, channel 0, rows 6-7, columns 0-1" in check.detail


def test_kept_quantity_off(tiny_history_bundle: Path) -> None:
    """The history output is checked too, not only the state."""
    sampler = Sampler.load(tiny_history_bundle)
    first = loop_of(sampler).sessions[0]

    class Kept:
        def run(self, feeds: Mapping[str, Array]) -> list[Array]:
            next_state, kept = first.run(feeds)
            return [next_state, kept * np.float32(1.01)]

    loop_of(sampler).sessions[0] = Kept()
    assert failed(verify(sampler, seconds=0, quiet=True)) >= {"evaluation 0", "trajectory"}


def test_other_noise(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b", lambda manifest: manifest["reference"].update(seed=1))
    build(path, engine="onnxruntime", realisation="baked", threads=1, quiet=True)
    assert failed(verify(path, seconds=0, quiet=True)) == {"noise"}


def test_infinite_output_is_a_failure_not_a_crash(tiny_bundle: Path) -> None:
    """In the last evaluation, so that no later one turns it into NaN; no warning on the way (warnings are errors here)."""
    found = with_fault(tiny_bundle, lambda y, feeds: np.where(y > 0, np.inf, y), slice(2, 3))
    assert found >= {"evaluation 2", "trajectory", "finite"}


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"seconds": -1.0}, {"seconds": 0.0, "budgets": Budgets(max_p50_ms=1.0)}])
def test_arguments_out_of_range(arguments: dict[str, Any], tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="found"):
        verify(tiny_bundle, quiet=True, **arguments)


def test_report_files(tiny_bundle: Path, tmp_path: Path) -> None:
    good = verify(tiny_bundle, seconds=0, quiet=True)
    bad = Report("<b>", "onnxruntime", "cpu", "fp32", [numerics.Check("a < b", False, "1 & 2")])
    for report, verdict in ((good, ": verified"), (bad, ": NOT verified")):
        assert report is bad or {"engine", "machine", "python", "options"} <= report.environment.keys()
        report.save(tmp_path / "r" / "report.html")
        assert verdict in (tmp_path / "r" / "report.html").read_text()
    assert good.environment["engine"] in page(good)
    assert "<b>" not in page(bad) and "a &lt; b" in page(bad)
    assert bad.to_json()["passed"] is False


def test_relative_error() -> None:
    one, two = np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32)
    assert relative_error(two, one) == pytest.approx(1.0, rel=1e-12)
    assert relative_error(one, two) == pytest.approx(0.5, rel=1e-12)
    assert relative_error(np.full((2, 3), np.nan, np.float32), one) == float("inf")


class Clock:
    """A clock that work moves and nothing else: what it measures does not depend on what else the machine does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        real = latency.time.get_clock_info
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: self.now, get_clock_info=real))

    def work(self, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds()

        return run


def test_latency_ratio_is_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A does three times the work of B, on a machine that becomes slower with every run; some of them are disturbed."""
    clock, generator, runs = Clock(monkeypatch), np.random.default_rng(0), 0

    def pace() -> float:
        nonlocal runs
        runs += 1
        return (1 + runs / 100) * (5 if generator.random() < 0.05 else 1)

    found = compare(clock.work(lambda: 0.03 * pace()), clock.work(lambda: 0.01 * pace()), seconds=100, pairs=60)
    assert found.ratio == pytest.approx(3.0, rel=0.05)
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert found.pairs == 60 and found.drift > 0.2


def test_latency_ends_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = compare(clock.work(lambda: 0.02), clock.work(lambda: 0.01), seconds=0.6, pairs=60)
    assert found.pairs == pytest.approx(20, abs=1)
    assert compare(clock.work(lambda: 2.0), clock.work(lambda: 1.0), seconds=0.6, pairs=60).pairs == 10


def test_latency_doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that becomes twice as slow half-way is told from a steady one."""
    clock, calls = Clock(monkeypatch), 0

    def seconds() -> float:
        nonlocal calls
        calls += 1
        return 0.001 if calls < 60 else 0.002

    slowing = clock.work(seconds)
    found = compare(slowing, slowing, seconds=10, pairs=60)
    assert found.drift > 0.2 and any("throttling" in doubt for doubt in found.doubts)
    steady = replace(found, drift=0.01, busy=0.02)
    assert steady.doubts == []
    assert replace(steady, busy=None).doubts == []
    assert "50% of the processors" in replace(steady, busy=0.5).doubts[0]
    assert "clock" in replace(steady, a_p50=1e-5).doubts[0]


def test_share_of_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two seconds, two processors worked three seconds, one of them for this process."""
    clock, read = Clock(monkeypatch), iter([(100.0, 10.0), (103.0, 11.0)])
    monkeypatch.setattr(latency, "processor_seconds", lambda: next(read))
    monkeypatch.setattr(latency.os, "cpu_count", lambda: 2)
    others = OtherPrograms()
    clock.now += 2.0
    assert others.share() == pytest.approx(0.5)


def test_other_programs_are_noticed() -> None:
    """A second process that computes all the time takes one processor's share."""
    if processor_seconds() is None:
        pytest.skip("no /proc/stat on this platform")
    others = OtherPrograms()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(1.0)
        share = others.share()
        other.kill()
    assert share is not None and share > 0.4 / (os.cpu_count() or 1)


def test_psnr_and_region() -> None:
    expected = np.linspace(-1, 1, 2 * 28 * 28, dtype=np.float32).reshape(2, 1, 28, 28)
    assert psnr(expected + np.float32(0.02), expected) == pytest.approx(40.0, abs=0.01)
    assert psnr(np.full_like(expected, np.nan), expected) == float("-inf")
    found = expected.copy()
    found[1, 0, 27, 8] = np.nan
    assert worst_region(found, expected) == "image 1, channel 0, rows 21-27, columns 7-13"
    assert worst_region(np.ones((1, 1, 2, 3), np.float32), np.zeros((1, 1, 2, 3), np.float32)).startswith("image 0, channel 0")


def test_bootstrap_covers_the_median() -> None:
    """A 95 % interval misses the true median in about 5 % of 200 samples: fewer than 24 (five standard deviations)."""
    generator, missed = np.random.default_rng(5), 0
    for _ in range(200):
        _, low, high = bootstrap_median(generator.standard_normal(50), resamples=300)
        missed += not low <= 0 <= high
    assert missed < 26
