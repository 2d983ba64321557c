"""``bench``: the front on planted points, slower and worse candidates, the plain solver, and what is refused."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import Array, altered
from PIL import Image
from test_report import Elements

from mteo_deploy import benchmarking
from mteo_deploy.benchmarking import Candidate, against_fastest, bench
from mteo_deploy.cli import main
from mteo_deploy.engines.base import Session
from mteo_deploy.engines.build import build
from mteo_deploy.errors import BundleError, InputError, MissingPackageError
from mteo_deploy.exporters.export import export
from mteo_deploy.latency import Rounds
from mteo_deploy.numerics import relative_error
from mteo_deploy.sampler import Sampler
from mteo_deploy.tradeoff import ENDINGS, Point, Tradeoff, pareto_front

QUICK: dict[str, Any] = {"seconds": 0.1, "num": 8, "quiet": True}
POINT = Point("b", 4, "euler", False, "onnxruntime", "cpu", "fp32", "baked", 1, 0.1, 2.0, 1.0, 1.0, 1.0)
REFERENCE = {"evaluations": 36, "bundle": "b", "engine": "onnxruntime", "precision": "fp32"}


@pytest.fixture(scope="module")
def plain_two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same backbone with two evaluations, nothing learned."""
    path = tmp_path_factory.mktemp("bench") / "euler-2"
    build(
        export(path, model=tiny_model, steps=2, plain=True, realisations=["baked"], quiet=True),
        engine="onnxruntime",
        threads=1,
        quiet=True,
    )
    return path


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1.0, 1.0)], [True]),
        ([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], [True, True, True]),
        ([(1.0, 3.0), (2.0, 2.0), (2.5, 2.5)], [True, True, False]),
        ([(1.0, 1.0), (1.0, 1.0)], [True, True]),
        ([(1.0, 1.0), (1.0, 2.0), (2.0, 1.0)], [True, False, False]),
        ([(2.0, 1.0), (1.0, 1.0)], [False, True]),
        ([(1.0, 1.0), (0.995, 2.0), (0.985, 3.0), (0.984, 4.0)], [True, False, True, False]),
        ([(0.0, 1.0), (0.0, 2.0), (0.0, 1.0)], [True, False, True]),
        ([(None, 1.0), (0.5, 2.0), (None, 3.0)], [False, True, False]),
        ([(float("nan"), 2.0), (0.5, 1.0)], [False, True]),
        ([], []),
    ],
)
def test_front(points: list[tuple[float | None, float]], front: list[bool]) -> None:
    assert pareto_front(points) == front


def test_front_is_of_one_batch_size() -> None:
    """At batch 8 everything takes longer, and that does not count against it."""
    points = [replace(POINT, p50=2.0), replace(POINT, batch=8, p50=9.0), replace(POINT, batch=8, p50=12.0)]
    found = Tradeoff.of(points, reference=REFERENCE, images=4, seed=0, rounds={1: 10, 8: 10})
    assert [(p.batch, p.p50, p.front) for p in found.points] == [(1, 2.0, True), (8, 9.0, True), (8, 12.0, False)]


def test_ratios_are_of_rounds_and_to_the_fastest() -> None:
    """A drift that all share leaves the ratios alone."""
    drift = np.linspace(1, 3, 30)[:, None]
    found = against_fastest(Rounds(drift * [[4.0, 2.0, 6.0]], None))
    assert [one[1:] for one in found] == [(2.0, 2.0, 2.0), (1.0, 1.0, 1.0), (3.0, 3.0, 3.0)]
    assert found[1][0] == pytest.approx(4.0)


def test_bundles_and_the_plain_solver(tiny_bundle: Path, plain_two: Path) -> None:
    found = bench([tiny_bundle, plain_two], plain=True, batch=[1, 2], **QUICK)
    assert len(found.points) == 2 * 4 and found.batches == [1, 2] and found.rounds.keys() == {1, 2}
    points = {(p.evaluations, p.plain): p for p in found.at(1)}
    errors = {where: p.error or 0.0 for where, p in points.items()}
    assert errors[3, False] < errors[3, True] < errors[2, True]
    assert errors[2, False] == pytest.approx(errors[2, True], rel=1e-3), "nothing was learned there"
    assert points[3, True].realisation == "time-conditioned" and points[3, False].realisation == "baked"
    fastest = found.at(1)[0]
    assert fastest.p50 == min(p.p50 for p in found.at(1)) and (fastest.ratio, fastest.ratio_low, fastest.ratio_high) == (
        1,
        1,
        1,
    )
    assert all(p.ratio_low <= p.ratio <= p.ratio_high for p in found.points)
    assert not points[3, True].front or points[3, True].p50 < points[3, False].p50
    sampler = Sampler.load(tiny_bundle)
    assert found.reference["evaluations"] == len(Sampler.load(plain_two).reference_plan.evaluations)
    expected = sampler.conditioned(Sampler.load(plain_two).reference_plan, num=8)
    assert errors[3, False] == pytest.approx(relative_error(sampler(num=8), expected), rel=1e-6)
    assert {"python", "engine", "options"} <= found.environment.keys()


class Altered:
    """A session that takes longer, or whose next state is off."""

    def __init__(self, session: Session, seconds: float, factor: float) -> None:
        self.session, self.seconds, self.factor = session, seconds, factor

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        time.sleep(self.seconds)
        first, *others = self.session.run(feeds)
        return [first * np.float32(self.factor), *others]

    def save(self, directory: Path, graph: str) -> None: ...


@pytest.mark.parametrize(("seconds", "factor"), [(0.05, 1.0), (0.05, 1.5), (0.05, float("nan"))])
def test_a_slower_or_worse_candidate_is_not_on_the_front(
    seconds: float, factor: float, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = altered(tiny_bundle, tmp_path / "planted")
    build(other, engine="onnxruntime", realisation="baked", threads=1, quiet=True)

    def opened(candidate: Candidate) -> Sampler:
        sampler = Sampler.of(candidate.bundle, candidate.built)
        graphs = {entry["graph"] for entry in sampler.bundle.step_graphs}
        if candidate.name != "planted":
            return sampler
        return sampler.reopen(lambda name, session: Altered(session, seconds, factor) if name in graphs else session)

    monkeypatch.setattr(Candidate, "open", opened)
    found = {point.bundle: point for point in bench([tiny_bundle, other], **QUICK).points}
    assert found["euler-3"].front and not found["planted"].front
    assert found["planted"].p50 > 150 and found["planted"].ratio_low > 1
    if factor == 1.0:
        assert found["planted"].error == found["euler-3"].error
    elif np.isnan(factor):
        assert found["planted"].error is None
    else:
        assert (found["planted"].error or 0.0) > 2 * (found["euler-3"].error or 1.0)


def test_only_one_is_open_while_errors_are_measured(
    tiny_bundle: Path, plain_two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = 0

    def counted(candidate: Candidate) -> Sampler:
        nonlocal opened
        opened += 1
        return Sampler.of(candidate.bundle, candidate.built)

    monkeypatch.setattr(Candidate, "open", counted)
    bench([tiny_bundle, plain_two], plain=True, **QUICK)
    assert opened == 1 + 4 + 2, "reference, errors, and one sampler per built engine for the times"


def test_other_backbone_and_noise_range(tiny_bundle: Path, tmp_path: Path) -> None:
    other = altered(tiny_bundle, tmp_path / "other", lambda manifest: manifest["backbone"].update(fingerprint="0" * 64))
    with pytest.raises(InputError, match="one backbone, because the error is against one reference trajectory"):
        bench([tiny_bundle, other], **QUICK)
    last = altered(tiny_bundle, tmp_path / "last", lambda manifest: manifest["plan"]["sigmas"].__setitem__(0, (9.0).hex()))
    with pytest.raises(InputError, match="one noise range"):
        bench([tiny_bundle, last], **QUICK)


def test_bad_inputs(tiny_bundle: Path, tmp_path: Path) -> None:
    for wrong in ({"num": 0}, {"seconds": 0.0}, {"batch": [0]}, {"batch": []}, {"precision": "fp8"}):
        with pytest.raises(InputError, match="found"):
            bench([tiny_bundle], **{**QUICK, **wrong})
    with pytest.raises(InputError, match="every bundle once"):
        bench([tiny_bundle, tiny_bundle / ".." / tiny_bundle.name], **QUICK)
    with pytest.raises(InputError, match="--precision bf16"):
        bench([tiny_bundle], precision="bf16", **QUICK)
    with pytest.raises((BundleError, MissingPackageError), match="openvino"):
        bench([tiny_bundle], engine="openvino", **QUICK)
    with pytest.raises(BundleError, match="mteo-deploy build"):
        bench([altered(tiny_bundle, tmp_path / "unbuilt")], **QUICK)
    with pytest.raises(InputError, match="found 0 bundles"):
        bench([], **QUICK)


def test_files(tmp_path: Path) -> None:
    points = [replace(POINT, bundle="<b>"), replace(POINT, plain=True, error=0.4, p50=2.5), replace(POINT, error=None, p50=1.0)]
    points += [replace(POINT, batch=8, error=0.0, precision="bf16", engine="openvino")]
    found = Tradeoff.of(points, reference=REFERENCE, images=4, seed=0, rounds={1: 10, 8: 12}, doubts=["batch 1: busy"])
    for ending in ENDINGS:
        found.save(tmp_path / "deep" / f"bench{ending}")
    page = Elements((tmp_path / "deep" / "bench.html").read_text())
    assert page.outward() == [] and len(page.named("svg")) == 2 and "<b>, 4 evaluations" in page.text
    assert not any("rounding" in line for line in found.lines())
    rounded = replace(found, reference={**REFERENCE, "precision": "int8"})
    assert "the reference is in int8 too: add a bundle in fp32" in rounded.lines()[1]
    assert "not finite" in page.text and "unreliable: batch 1: busy" in page.text
    rows = list(csv.DictReader((tmp_path / "deep" / "bench.csv").read_text().splitlines()))
    assert [row["front"] for row in rows] == ["False", "True", "False", "True"] and rows[0]["error"] == ""
    assert json.loads((tmp_path / "deep" / "bench.json").read_text())["points"][1]["bundle"] == "<b>"
    with Image.open(tmp_path / "deep" / "bench.png") as image:
        assert image.size == (1950, 750)
    with pytest.raises(InputError, match=r"\.csv"):
        found.save(tmp_path / "bench.xml")


def test_command(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ["bench", str(tiny_bundle), "--plain", "--seconds", "0.1", "--num", "4", "--batch", "1,2"]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "b.csv"), "-o", str(tmp_path / "b.json")])
    assert result.exit_code == 0, result.output
    assert "batch 2" in result.stdout and "plain euler, 3 evaluations" in result.stdout and "front" in result.stdout
    assert len((tmp_path / "b.csv").read_text().splitlines()) == 1 + 4 and (tmp_path / "b.json").is_file()
    assert len(json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)["points"]) == 4
    refused = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "b.gif")])
    assert refused.exit_code == 2 and ".html, .json, .csv, .png" in refused.stderr
    assert benchmarking.ALL == "all"
