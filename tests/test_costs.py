"""Costs: analytic where they can be, planted where not; no time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import Array, edit_json

from mteo_deploy import costs, latency
from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.cold_start import one
from mteo_deploy.engines.base import Session
from mteo_deploy.errors import EngineError, InputError
from mteo_deploy.machine import EnergyCounter, Reach, in_fresh_process, reach
from mteo_deploy.numerics import Check
from mteo_deploy.report import Report
from mteo_deploy.sampler import Sampler
from mteo_deploy.verification import verify


def test_line_through_planted_points() -> None:
    assert costs.line([1, 2, 3, 4], [5.0, 8.0, 11.0, 14.0]) == pytest.approx((2.0, 3.0, 0.0), abs=1e-9)
    assert costs.line([1, 2, 3], [0.0, 3.0, 0.0]) == pytest.approx((1.0, 0.0, 2**0.5), abs=1e-9)


def test_thread_counts() -> None:
    assert [costs.thread_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


class Counting:
    """A session that counts its runs by graph."""

    def __init__(self, session: Session, graph: str, runs: list[str]) -> None:
        self.session, self.graph, self.runs = session, graph, runs

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        self.runs.append(self.graph)
        return self.session.run(feeds)

    def save(self, directory: Path, graph: str) -> None:
        raise AssertionError


@pytest.fixture
def counted(tiny_bundle: Path) -> Callable[[str], tuple[Sampler, list[str]]]:
    def make(realisation: str) -> tuple[Sampler, list[str]]:
        good, runs = Sampler.load(tiny_bundle), []
        sampler = Sampler(
            good.bundle, lambda graph: Counting(good.open_graph(graph), graph, runs), realisation, built=good.built
        )
        return sampler, runs

    return make


def once(functions: list[Callable[[], object]], *, seconds: float, rounds: int = 1) -> latency.Rounds:
    """Instead of ``interleave``: run each once, and say that it took as many milliseconds as it has place in the list."""
    for function in functions:
        function()
    return latency.Rounds(np.tile(2.0 + 3.0 * np.arange(1, len(functions) + 1), (9, 1)), 0.0)


@pytest.mark.parametrize(("realisation", "of"), [("baked", "baked"), ("table", "table"), ("fused", "time-conditioned")])
def test_first_evaluations(
    realisation: str, of: str, counted: Callable[[str], tuple[Sampler, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, two and three engine calls."""
    monkeypatch.setattr(latency, "interleave", once)
    sampler, runs = counted(realisation)
    found = costs.evaluations(sampler, 2, 1.0)
    steps = [f"graphs/step_{i:02}.onnx" for i in range(3)]
    expected = {"baked": [*steps[:1], *steps[:2], *steps], "table": ["graphs/table.onnx"] * 6}
    assert runs == expected.get(realisation, ["graphs/conditioned.onnx"] * 6)
    assert (found["of"], found["fixed"], found["each"]) == (of, pytest.approx(2.0), pytest.approx(3.0))


def test_batches(counted: Callable[[str], tuple[Sampler, list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "interleave", once)
    rows = costs.batches(counted("fused")[0], [1, 4], 1.0)["rows"]
    assert rows == [
        {"batch": 1, "milliseconds": 5.0, "images_per_second": 200.0},
        {"batch": 4, "milliseconds": 8.0, "images_per_second": 500.0},
    ]


def test_threads_are_what_was_asked_for(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, asked = Sampler.load(tiny_bundle), []
    assert sampler.built is not None
    backend = sampler.built.backend

    class Recording:
        def open(self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], built: Path | None = None) -> Any:
            asked.append(options["threads"])
            return backend.open(bundle, graph, device, options, built)

    monkeypatch.setattr(costs, "processors", lambda: 3)
    sampler.built = replace(sampler.built, backend=Recording())  # type: ignore[arg-type]
    found = costs.threads(sampler, 1, 0.03)
    assert asked == [1] * 3 + [2] * 3 + [3] * 3
    assert [row["threads"] for row in found["rows"]] == [1, 2, 3] and all(row["speed"] > 0 for row in found["rows"])
    sampler.built.record["parts"]["device"] = "cuda"
    assert "cuda" in costs.threads(sampler, 1, 0.03)["missing"] and "cuda" in costs.limit(sampler, 1, 1.0)["missing"]


def zone(root: Path, name: str, energy: int, span: int = 1_000_000) -> Path:
    (root / name).mkdir(parents=True)
    (root / name / "energy_uj").write_text(f"{energy}\n")
    (root / name / "max_energy_range_uj").write_text(f"{span}\n")
    return root / name


def test_energy_of_a_fake_machine(tmp_path: Path) -> None:
    """Two packages, one of which starts again at zero meanwhile; a package's own part is not counted twice."""
    first, second = zone(tmp_path, "intel-rapl:0", 999_990), zone(tmp_path, "intel-rapl:1", 500)
    zone(tmp_path, "intel-rapl:0:0", 7)
    (tmp_path / "intel-rapl").mkdir()
    counter = EnergyCounter.find(tmp_path)
    assert counter is not None and counter.zones == (first, second)

    def run() -> None:
        (first / "energy_uj").write_text("29\n")  # 11 to the end of the range and into zero, then 29
        (second / "energy_uj").write_text("700\n")

    found = costs.energy(run, 4, 0.0, counter)
    assert found["joules_per_image"] == pytest.approx((11 + 29 + 200) / 1e6 / 4, rel=1e-9) and found["images"] == 4


def test_energy_that_is_not_told(tmp_path: Path) -> None:
    assert EnergyCounter.find(tmp_path) is None
    (zone(tmp_path, "intel-rapl:0", 1) / "energy_uj").unlink()
    assert EnergyCounter.find(tmp_path) is None
    assert EnergyCounter.find(tmp_path / "nowhere") is None


def test_memory_of_a_process() -> None:
    """64 MB that are written to and given back show in the peak, and no longer in what is private."""
    code = (
        "import json, numpy as np; from mteo_deploy.machine import peak_bytes as p, private_bytes as q\n"
        "a = p(), q(); x = np.ones(64 << 20, np.uint8); b = q(); del x; print(json.dumps({'v': [*a, p(), b, q()]}))"
    )
    peak, private, peak_after, private_with, private_after = in_fresh_process(code)["v"]
    assert peak_after - peak > 60e6
    if private is not None:
        assert private_with - private > 60e6 > private_after - private


def test_reach_of_this_machine() -> None:
    found = reach(1, seconds=0.0)
    assert found.threads == 1 and found.flops > 0 and found.bytes > 0


def test_a_process_that_fails(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match="found a bad thing"):
        in_fresh_process("raise SystemExit('found a bad thing')")
    with pytest.raises(EngineError, match=r"engine\.json cannot be read"):
        one(tiny_bundle, Path("onnxruntime-cpu-0"), "baked", 1)


def test_work_of_every_realisation(tiny_bundle: Path) -> None:
    """The same products, however the loop is written; weights are read once per evaluation."""
    bundle = Bundle.open(tiny_bundle)
    found = {name: costs.work(bundle, name, 1) for name in ("baked", "table", "fused")}
    baked, table, fused = found.values()
    assert isinstance(baked, dict) and isinstance(table, dict) and isinstance(fused, dict)
    assert baked["flops"] == table["flops"] == fused["flops"] > 1e6
    assert baked["bytes"] == fused["bytes"]
    twice = costs.work(bundle, "baked", 2)
    assert (
        isinstance(twice, dict)
        and twice["flops"] == 2 * baked["flops"]
        and baked["bytes"] < twice["bytes"] < 2 * baked["bytes"]
    )


def test_shares_of_the_limit(tiny_sampler: Sampler) -> None:
    done = costs.work(tiny_sampler.bundle, "baked", 1)
    assert isinstance(done, dict)
    found = costs.limit(tiny_sampler, 1, 0.5, Reach(3, 4 * done["flops"], done["bytes"]))
    assert (found["threads"], found["flops_share"], found["bytes_share"]) == (3, pytest.approx(0.5), pytest.approx(2.0))
    assert "50% of a matrix product's" in costs._limit(found) and "above 100 %" in costs._limit(found)


@pytest.mark.parametrize(("work", "said"), [(None, "export again"), ({"unknown": "what it is"}, "what it is")])
def test_bundles_without_the_count(work: dict[str, str] | None, said: str, bundle_copy: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for graph in manifest["compiler"]["graphs"]:
            graph.pop("work")
            graph.update({"work": work} if work else {})

    edit_json(bundle_copy / "manifest.json", change)
    found = costs.limit(Sampler.load(bundle_copy), 1, 0.5)
    assert said in found["missing"]


def test_everything_in_a_report(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "STARTS", 1)
    monkeypatch.setattr(costs, "reach", lambda threads: Reach(threads, 1e9, 1e9))
    done = CliRunner().invoke(
        main, ["verify", str(tiny_bundle), "--seconds", "0.03", "--costs", "-o", str(tmp_path / "r.json")]
    )
    assert done.exit_code == 0, done.output
    found = Report.read(tmp_path / "r.json")
    assert found.costs.keys() == {"batch", "realisation", *costs._WORDS}
    assert found.costs["limit"]["threads"] == 1  # as the engine was built
    assert all(found.costs["cold_start"][name] > 0 for name in ("import", "load", "first"))
    assert [row["batch"] for row in found.costs["batches"]["rows"]] == [1, 2, 4, 8]
    lines = found.further_lines()
    assert lines == costs.lines(json.loads(json.dumps(found.costs))) and all(line in done.stdout for line in lines)
    assert [line.split(":")[0] for line in lines[1:8]] == [name.replace("_", " ") for name in costs._WORDS]
    found.save(tmp_path / "r.html")
    assert "cold start: import" in (tmp_path / "r.html").read_text()


def test_older_reports_have_no_costs(tmp_path: Path) -> None:
    """A report of a version before costs and bisection is read, and compares as it did."""
    new = Report("b", "onnxruntime", "cpu", "fp32", [Check("finite", True, "")])
    data = new.to_json()
    del data["costs"], data["bisection"]
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert Report.read(tmp_path / "r.json") == new and new.further_lines() == []


def test_what_it_needs(tiny_bundle: Path) -> None:
    good = Sampler.load(tiny_bundle)
    with pytest.raises(InputError, match="built engine for --costs"):
        verify(Sampler(good.bundle, good.open_graph), seconds=0, costs=True, quiet=True)


def test_rounds_tell_a_drift() -> None:
    times = np.ones((30, 3))
    assert latency.Rounds(times, 0.0).doubts == []
    times[20:] = 2.0
    slowed = latency.Rounds(times, 0.5)
    assert slowed.drift == pytest.approx(1.0) and len(slowed.doubts) == 2
