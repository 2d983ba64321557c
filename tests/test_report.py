"""What a report holds as numbers, and the page and the picture drawn from it."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import Array
from PIL import Image

from mteo_deploy import pictures, plots, waterfall
from mteo_deploy.cli import main
from mteo_deploy.engines.base import Session
from mteo_deploy.errors import InputError, MissingPackageError
from mteo_deploy.numerics import Check
from mteo_deploy.page import page
from mteo_deploy.pictures import Pictures
from mteo_deploy.report import Report, check_outputs
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.verification import verify

GOES_OUT = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "background", "cite", "formaction"}
RUNS_OR_LOADS = {"script", "iframe", "object", "embed", "link", "base", "form", "video", "audio", "foreignobject"}


class Elements(HTMLParser):
    """Every element of a page, with its attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]

    def outward(self) -> list[str]:
        """Whatever a browser would fetch, run, or follow out of the page."""
        found = [tag for tag, _ in self.found if tag in RUNS_OR_LOADS]
        for tag, attributes in self.found:
            found += [f"{tag} {name}" for name in attributes if name.startswith("on")]
            values = [value for name, value in attributes.items() if name in GOES_OUT]
            values += re.findall(r"url\(\s*['\"]?([^)'\"]*)", attributes.get("style", ""))
            values += [value[4:-1] for value in attributes.values() if value.startswith("url(")]
            found += [f"{tag} {value[:40]}" for value in values if not value.startswith(("#", "data:image/png;base64,"))]
        styles = re.findall(r"<style>(.*?)</style>", self.rawdata, re.DOTALL)
        return found + [style for style in styles if "url(" in style or "@import" in style]


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path) -> Report:
    return verify(tiny_bundle, seconds=0.3, quiet=True)


def test_errors_are_numbers(measured: Report) -> None:
    for check in measured.checks:
        if check.name.startswith("evaluation "):
            (error,) = check.errors
            assert f"{error:.1e}" in check.detail and check.allowed == 1e-4
    (trajectory,) = [check for check in measured.checks if check.name == "trajectory"]
    assert len(trajectory.errors) == 3 and f"{max(map(float, trajectory.errors)):.1e}" in trajectory.detail  # type: ignore[arg-type]
    found = json.loads(json.dumps(measured.to_json()))
    assert "pictures" not in found and {"errors", "allowed"} <= found["checks"][1].keys()


def test_times_are_numbers(measured: Report) -> None:
    sample = measured.latency["sample"]
    assert len(sample["a_times"]) == len(sample["b_times"]) == sample["pairs"] <= 200
    assert float(np.median(sample["a_times"])) == pytest.approx(sample["a_p50"], abs=1e-5)
    assert sample["a_times"][0] / sample["b_times"][0] == pytest.approx(sample["ratios"][0], rel=1e-3)


def test_error_that_is_not_finite_is_none_and_drawn(tmp_path: Path) -> None:
    """JSON has no infinity, a logarithmic axis no zero; neither may warn."""
    checks = [Check("evaluation 0", True, "", [0.0], 1e-4), Check("evaluation 1", False, "", [None], 1e-4)]
    report = Report("b", "onnxruntime", "cpu", "fp32", [*checks, Check("trajectory", False, "", [1e-6, None], 1e-3)])
    report.save(tmp_path / "r.json")
    assert "Infinity" not in (tmp_path / "r.json").read_text() and Report.read(tmp_path / "r.json") == report
    report.save(tmp_path / "r.png")
    assert "not finite" in page(report)


def slow(sampler: Sampler, graph: str, seconds: float) -> Sampler:
    """The same sampler, one of whose graphs takes longer."""

    class Slow:
        def __init__(self, session: Session) -> None:
            self.session = session

        def run(self, feeds: Mapping[str, Array]) -> list[Array]:
            time.sleep(seconds)
            return self.session.run(feeds)

        def save(self, directory: Path, graph: str) -> None: ...

        def close(self) -> None: ...

    return sampler.reopen(lambda name, session: Slow(session) if name == graph else session)


def test_waterfall_shows_the_slow_call(tiny_sampler: Sampler) -> None:
    graph = tiny_sampler.bundle.step_graphs[1]["graph"]
    noise = noise_for(tiny_sampler.bundle.sample_shape, 0, range(1))
    found = waterfall.record(slow(tiny_sampler, graph, 0.2), noise, {}, loops=3)
    assert [call["name"] for call in found["calls"]] == ["evaluation 0", "evaluation 1", "evaluation 2"]
    took = [call["milliseconds"] for call in found["calls"]]
    assert took[1] == max(took) >= 200
    ends = [call["start"] + call["milliseconds"] for call in found["calls"]]
    assert found["calls"][0]["start"] >= 0 and ends[0] <= found["calls"][1]["start"] and ends[2] <= found["milliseconds"]


def test_waterfall_gives_the_host_its_part(tiny_sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty milliseconds before every call, outside the engine."""
    step = type(tiny_sampler.loop).step  # type: ignore[attr-defined]
    monkeypatch.setattr(type(tiny_sampler.loop), "step", lambda *given: (time.sleep(0.02), step(*given))[1])
    noise = noise_for(tiny_sampler.bundle.sample_shape, 0, range(1))
    assert waterfall.host_milliseconds(waterfall.record(tiny_sampler, noise, {}, loops=3)) > 60


def test_waterfall_of_prelude_and_fused_loop(tiny_bundle: Path) -> None:
    good = Sampler.load(tiny_bundle)

    class Nothing:
        def run(self, feeds: Mapping[str, Array]) -> list[Array]:
            return []

        def save(self, directory: Path, graph: str) -> None: ...

        def close(self) -> None: ...

    entry = {"graph": "graphs/prelude.onnx", "inputs": [], "outputs": []}
    bundle = replace(good.bundle, manifest={**good.bundle.manifest, "prelude": entry})
    sampler = Sampler(bundle, lambda graph: Nothing() if graph == entry["graph"] else good.open_graph(graph), "fused")
    found = waterfall.record(sampler, noise_for(bundle.sample_shape, 0, range(1)), {}, loops=3)
    assert [call["name"] for call in found["calls"]] == ["prelude", "fused loop"]


def test_pictures_are_the_states(tiny_sampler: Sampler) -> None:
    found, reference = pictures.collect(tiny_sampler), tiny_sampler.bundle.reference()
    evaluations = len(tiny_sampler.reference_plan.evaluations)
    assert found.columns == ["noise", "evaluation 0", "evaluation 1", "evaluation 2", f"reference, {evaluations} evaluations"]
    assert found.pixels.shape == (len(found.rows), 5, 8, 8, 1) and found.pixels.dtype == np.uint8
    torch_image = np.clip(reference["states"][-1][1, 0] * 127.5 + 127.5, 0, 255)
    assert np.abs(found.pixels[1, 3, ..., 0] - torch_image).max() <= 1
    drawn = tiny_sampler.conditioned_states(tiny_sampler.reference_plan, reference["noise"][:4])[-1]
    assert np.abs(found.pixels[1, 4, ..., 0] - np.clip(drawn[1, 0] * 127.5 + 127.5, 0, 255)).max() <= 1


def test_a_dear_reference_trajectory_is_left_out(tiny_sampler: Sampler) -> None:
    found, expected = pictures.collect(tiny_sampler, seconds=0), tiny_sampler.bundle.reference()["states"][-1]
    assert found.columns[-1] == "torch"
    assert np.abs(found.pixels[0, -1, ..., 0] - np.clip(expected[0, 0] * 127.5 + 127.5, 0, 255)).max() <= 1


def test_pixels_of_large_images_latents_and_what_is_not_finite() -> None:
    large = np.zeros((2, 4, 300, 200), np.float32)
    large[0, 0], large[1, 1] = np.inf, np.nan
    large[:, 3] = 1.0
    found = pictures._pixels(large)
    assert found.shape == (2, 100, 66, 3) and np.unique(found).tolist() == [128]
    assert pictures._pixels(np.ones((1, 2, 5, 5), np.float32)).shape == (1, 5, 5, 1)


def test_page_asks_for_nothing(measured: Report) -> None:
    found = Elements(page(measured, replace(measured, bundle="other")))
    assert found.outward() == []
    assert "default-src 'none'" in found.named("meta")[1]["content"]
    planted = (
        '<img src="https://example.invalid/x.png"><a href="page.html"></a><script></script><g fill="url(http://x)" onclick="">'
    )
    assert len(Elements(planted).outward()) == 5


def test_page_is_whole(measured: Report) -> None:
    """Every image and drawing says what it shows; ids are there once, and what refers to one finds it."""
    found = Elements(page(measured, replace(measured, bundle="other")))
    assert measured.pictures is not None
    rows, columns = measured.pictures.pixels.shape[:2]
    assert len(found.named("img")) == 2 * rows * columns and all(one["alt"] for one in found.named("img"))
    assert "image 1, evaluation 2" in {one["alt"] for one in found.named("img")}
    assert len(found.named("svg")) == 2 * 3 and all(len(one["aria-label"]) > 40 for one in found.named("svg"))
    ids = [attributes["id"] for _, attributes in found.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, attributes in found.found for name, value in attributes.items() if "href" in name}
    assert used and used <= set(ids)
    for check in measured.checks:
        assert check.detail in found.text
    for line in measured.latency_lines():
        assert line in found.text


def test_page_holds_the_compiler_table(measured: Report, tiny_bundle: Path) -> None:
    text = re.sub(r"<[^>]+>", "|", page(measured))
    compiler = json.loads((tiny_bundle / "manifest.json").read_text())["compiler"]
    for graph in compiler["graphs"]:
        for one in graph["passes"]:
            size = r"\|+".join(re.escape(f"{one['after'][what]:,}") for what in ("nodes", "parameters", "bytes"))
            assert re.search(rf"{one['name']}[^|]*\|+{size}\|", text), (graph["graph"], one["name"])
    assert "step_00.onnx to step_02.onnx (3 graphs, each)" in text
    for site in compiler["sites"]:
        assert f"|{site['site']}|" in text


def test_verdict_is_a_word(measured: Report) -> None:
    bad = replace(measured, checks=[*measured.checks, Check("a < b", False, "1 & 2")])
    found = Elements(page(bad))
    assert "✗ NOT verified" in found.text and "1 of 14 checks failed" in found.text and "FAILED" in found.text
    assert "✓ verified" in Elements(page(measured)).text


def test_older_report_is_still_drawn(measured: Report, tmp_path: Path) -> None:
    """As versions before the page wrote it: no errors, times, compiler or images."""
    measured.save(tmp_path / "old.json")
    data = json.loads((tmp_path / "old.json").read_text())
    del data["compiler"], data["latency"]["waterfall"]
    for one in (data["latency"][name] for name in ("step", "sample", "loop")):
        del one["a_times"], one["b_times"]
    for check in data["checks"]:
        del check["errors"], check["allowed"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    old = Report.read(tmp_path / "old.json")
    found = Elements(page(old))
    assert not found.named("svg") and not found.named("img") and old.checks[0].detail in found.text
    old.save(tmp_path / "old.png")
    assert old.latency_lines() == measured.latency_lines()


def test_without_matplotlib(measured: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = Elements(page(measured))
    assert not found.named("svg") and found.named("img") and "pip install 'mteo-deploy[report]'" in found.text
    with pytest.raises(MissingPackageError, match=r"mteo-deploy\[report\]"):
        measured.save(tmp_path / "report.png")
    with pytest.raises(MissingPackageError, match=r"mteo-deploy\[report\]"):
        check_outputs([tmp_path / "report.json", tmp_path / "report.png"])
    assert not list(tmp_path.iterdir())


def settings() -> dict[str, Any]:
    """matplotlib's, but for the backend: to look that up is to choose one."""
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


def test_drawing_leaves_settings_alone(measured: Report, tmp_path: Path) -> None:
    """Neither settings nor backend of the calling program, nor pyplot's."""
    sys.modules.pop("matplotlib.pyplot", None)
    matplotlib.rcParams["lines.linewidth"] = 7.5  # another program's choice
    try:
        before, backend = settings(), matplotlib.get_backend(auto_select=False)
        text = page(measured)
        measured.save(tmp_path / "r.png")
        assert "matplotlib.pyplot" not in sys.modules
        assert settings() == before and matplotlib.get_backend(auto_select=False) == backend
    finally:
        matplotlib.rcParams["lines.linewidth"] = matplotlib.rcParamsDefault["lines.linewidth"]
    assert "stroke-width: 7.5" not in text


def test_picture_of_the_panels(measured: Report, tmp_path: Path) -> None:
    measured.save(tmp_path / "deep" / "report.png")
    with Image.open(tmp_path / "deep" / "report.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.size == (1650, 1260)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (255, 255, 255)):
        assert (pixels == colour).all(axis=1).sum() > 500
    replace(measured, pictures=None, latency={}, checks=[]).save(tmp_path / "nothing.png")


def test_long_tail_is_cut_and_said() -> None:
    steady = {"a_times": [10.0 + 0.01 * i for i in range(100)], "b_times": [10.0] * 100}
    assert plots.limits(steady) == (10.0, pytest.approx(10.99), False)
    low, high, cut = plots.limits({**steady, "b_times": [10.0] * 99 + [500.0]})
    assert cut and low == 10.0 and high < 11.0


def test_several_outputs_of_one_run(tiny_bundle: Path, tmp_path: Path) -> None:
    names = [tmp_path / f"report.{ending}" for ending in ("html", "json", "xml", "png")]
    outputs = [text for name in names for text in ("-o", str(name))]
    result = CliRunner().invoke(main, ["verify", str(tiny_bundle), "--seconds", "0", *outputs])
    assert result.exit_code == 0, result.output
    assert Report.read(names[1]).passed and "data:image/png" in names[0].read_text() and names[3].stat().st_size > 10_000
    assert names[2].read_text().count("<testcase") == len(Report.read(names[1]).checks)


@pytest.mark.parametrize(("outputs", "match"), [(["a.json", "a.json"], "once"), (["."], "folder")])
def test_outputs_that_cannot_be(outputs: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        check_outputs([Path(one) for one in outputs])


def test_images_only_where_they_are_shown(tiny_bundle: Path) -> None:
    assert verify(tiny_bundle, seconds=0, draw=False, quiet=True).pictures is None
    assert verify(tiny_bundle, seconds=0, quiet=True).pictures is not None


def magenta(report: Report) -> Report:
    """A report whose images are of a colour that nothing else on the page has."""
    pixels: Any = np.broadcast_to(np.array([255, 0, 255], np.uint8), (3, 2, 8, 8, 3))
    return replace(report, pictures=Pictures(["image 0", "image 1", "image 2"], ["noise", "torch"], 0, pixels))
