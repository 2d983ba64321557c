"""Bisection: a fault planted in the engine under test alone is found at its node, in both engines."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import weakref
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers import Faulty, altered
from onnx import numpy_helper

from mteo_deploy.bisection import Bisection, _search, _without_a_node, bisect, lines, to_json
from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.engines.base import Backend, Session
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError, MissingPackageError
from mteo_deploy.numerics import worst_place
from mteo_deploy.report import Report
from mteo_deploy.sampler import Sampler
from mteo_deploy.verification import verify


class Altered:
    """A backend that adds something to an element of a constant of every graph it opens.

    Args:
        more: what it adds.
        hide: the constant is left alone where the graph has one of these outputs, as a fusion stopped there would do.
    """

    def __init__(self, backend: Backend, constant: str, hide: Collection[str] = (), more: float = 1.0) -> None:
        self.backend, self.constant, self.hide, self.more = backend, constant, set(hide), more

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def open(self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], built: Path | None = None) -> Session:
        model = onnx.load(bundle.file(graph))
        if not self.hide & {value.name for value in model.graph.output}:
            for tensor in model.graph.initializer:
                if tensor.name == self.constant:
                    values = numpy_helper.to_array(tensor).copy()
                    values.flat[0] += self.more
                    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        directory = Path(tempfile.mkdtemp())  # as long as the backend: sessions read their graph again
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        file = directory / graph
        file.parent.mkdir()
        onnx.save(model, file)
        return self.backend.open(Bundle(directory, bundle.manifest), graph, device, options)


def planted(path: Path, constant: str, hide: Collection[str] = (), more: float = 1.0, **arguments: Any) -> Sampler:
    good = Sampler.load(path, **arguments)
    assert good.built is not None
    backend = Altered(good.built.backend, constant, hide, more)
    built = replace(good.built, backend=backend)

    def open_graph(graph: str) -> Session:
        return backend.open(good.bundle, graph, built.device, built.options)

    return Sampler(good.bundle, open_graph, good.loop.name, built=built)


def user(bundle: Bundle, graph: str, constant: str) -> onnx.NodeProto:
    """The node that takes a constant."""
    model = onnx.load(bundle.file(graph), load_external_data=False)
    (node,) = [node for node in model.graph.node if constant in node.input]
    return node


def nothing_left(path: Path) -> bool:
    return not list(path.rglob("*.tmp"))


@pytest.mark.parametrize("constant", ["conv_in.weight", "mid_block.resnets.0.conv2.bias", "up_blocks.0.attentions.1.to_q.bias"])
def test_the_node_is_named(constant: str, tiny_history_bundle: Path) -> None:
    sampler = planted(tiny_history_bundle, constant)
    found = bisect(sampler)
    assert (found.verdict, found.evaluation) == ("node", 1) and found.departure is not None
    node = user(sampler.bundle, found.graph, constant)
    departure = found.departure
    assert (departure.node, departure.operator, departure.tensor) == (node.name, node.op_type, node.output[0])
    assert departure.module == constant.rpartition(".")[0]
    assert departure.inputs <= 1e-5 and departure.error > 1e-2
    assert departure.alone == pytest.approx(departure.error, rel=1e-3)
    assert 0 < found.probes < 25 and found.graph_error < 1e-5 < found.engine_error
    assert nothing_left(tiny_history_bundle)


@pytest.mark.parametrize("batch", [None, [2]])
def test_openvino(batch: list[int] | None, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    path = altered(tiny_bundle, tmp_path / "b")
    build(path, engine="openvino", realisation="baked", threads=1, batch=batch or (), quiet=True)
    sampler = planted(path, "down_blocks.1.resnets.0.conv1.weight")
    found = bisect(sampler)
    assert found.verdict == "node" and found.departure is not None
    assert found.departure.node == user(sampler.bundle, found.graph, "down_blocks.1.resnets.0.conv1.weight").name
    assert found.departure.module == "down_blocks.1.resnets.0.conv1"


@pytest.mark.parametrize("realisation", ["table", "fused"])
def test_other_realisations(realisation: str, tiny_bundle: Path) -> None:
    """In the fused graph the first of the evaluations' nodes is named."""
    constant = "mid_block.resnets.0.conv2.weight"
    good = Sampler.load(tiny_bundle, realisation=realisation)
    model = onnx.load(good.bundle.file(good.bundle.realisations[realisation]["graph"]), load_external_data=False)
    (name,) = {n for node in model.graph.node for n in node.input if n.endswith(constant)}
    found = bisect(planted(tiny_bundle, name, realisation=realisation))
    assert (found.verdict, found.evaluation is None) == ("node", realisation == "fused") and found.departure is not None
    assert found.departure.node == next(node.name for node in model.graph.node if name in node.input)


def test_a_fault_that_hides_from_the_search(tiny_bundle: Path) -> None:
    """It goes away where the graph has an output inside of what is fused: the range is named, and not one node too many."""
    constant = "mid_block.resnets.0.conv2.bias"
    bundle = Bundle.open(tiny_bundle)
    model = onnx.load(bundle.file(bundle.step_graphs[0]["graph"]), load_external_data=False)
    nodes = list(model.graph.node)
    (start,) = [k for k, node in enumerate(nodes) if constant in node.input]
    hidden = [name for node in nodes[start : start + 3] for name in node.output]
    found = bisect(planted(tiny_bundle, constant, hidden))
    assert found.verdict == "fusion" and found.between is not None
    names = [node.name for node in nodes]
    first, last = (names.index(name) for name in found.between)
    assert first <= start <= last and last - first <= 4
    assert "may not fuse" in lines(to_json(found))[1]


def test_not_a_number(tiny_bundle: Path, tmp_path: Path) -> None:
    """Its error is infinite; the report is JSON all the same."""
    report = verify(planted(tiny_bundle, "mid_block.resnets.0.conv2.bias", more=np.nan), seconds=0, bisect=True, quiet=True)
    assert report.bisection["departure"]["module"] == "mid_block.resnets.0.conv2" and "by infinity" in report.further_lines()[2]
    report.save(tmp_path / "r.json")
    json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)


def test_nothing_departs(tiny_bundle: Path) -> None:
    found = bisect(Sampler.load(tiny_bundle))
    assert (found.verdict, found.probes) == ("nothing", 0) and "nothing departs" in lines(to_json(found))[-1]


def test_the_graph_itself_departs(tiny_bundle: Path, tmp_path: Path) -> None:
    """Two graphs in each other's place: the engine does what it is given."""

    def swap(manifest: dict[str, Any]) -> None:
        baked = manifest["realisations"]["baked"]
        baked[1]["graph"], baked[2]["graph"] = baked[2]["graph"], baked[1]["graph"]

    path = altered(tiny_bundle, tmp_path / "b", swap)
    build(path, engine="onnxruntime", realisation="baked", threads=1, quiet=True)
    found = bisect(Sampler.load(path))
    assert found.verdict == "graph" and found.evaluation in (1, 2)
    assert found.graph_error > found.tolerance > found.engine_error
    assert "not in the engine" in lines(to_json(found))[-1]


def test_what_the_built_engine_stored_departs(tiny_bundle: Path) -> None:
    """The sessions are off, the engine opened afresh is not."""
    good = Sampler.load(tiny_bundle)
    sampler = Sampler(good.bundle, lambda g: Faulty(good.open_graph(g), lambda y, feeds: y * 1.01), built=good.built)
    found = bisect(sampler)
    assert found.verdict == "built engine" and "mteo-deploy build" in lines(to_json(found))[-1]


@pytest.mark.parametrize(
    ("error", "graph", "engine", "verdict"),
    [
        (0.5, 0.5, 1e-6, "graph"),
        (0.15, 0.08, 0.09, "sum"),
        (0.5, 1e-6, 1e-6, "built engine"),
        (np.inf, 1e-6, 1e-6, "built engine"),
    ],
)
def test_verdicts_without_a_node(error: float, graph: float, engine: float, verdict: str) -> None:
    found = Bisection("nothing", "g", 0, 0.1, error, graph, engine)
    assert _without_a_node(found) == verdict
    assert len(lines(to_json(replace(found, verdict=verdict)))) == 2


def test_search_ends_between_a_cut_that_agrees_and_one_that_departs() -> None:
    """Whatever lies between: errors that come and go, and cuts that do not tell."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        count = int(generator.integers(1, 40))
        answers = [False, *generator.choice(np.array([True, False, None]), size=count - 1), True]

        nodes = [onnx.helper.make_node("Relu", ["x"], ["y"], name=str(k)) for k in range(count)]
        probes = SimpleNamespace(nodes=nodes, opened=0, departure=lambda node: node)
        probes.departs = lambda cut, tolerance, answers=answers: answers[cut + 1]
        found = _search(Bisection("nothing", "g", 0, 0.1, 1.0), probes)  # type: ignore[arg-type]
        if found.verdict == "node":
            first = last = found.departure
        else:
            assert found.between is not None
            first, last = map(int, found.between)
        assert answers[first] is False and answers[last + 1] is True  # type: ignore[operator, index]
        assert all(answer is None for answer in answers[first + 1 : last + 1])  # type: ignore[operator, misc]


def test_in_the_report(tiny_bundle: Path, tmp_path: Path) -> None:
    constant = "mid_block.resnets.1.conv1.bias"
    report = verify(planted(tiny_bundle, constant), seconds=0, bisect=True, quiet=True)
    assert not report.passed
    (where,) = [line for line in report.further_lines() if line.startswith("first at Conv ")]
    assert "mid_block.resnets.1.conv1" in where
    report.save(tmp_path / "r.json")
    assert Report.read(tmp_path / "r.json").further_lines() == report.further_lines()
    report.save(tmp_path / "r.html")
    assert where in (tmp_path / "r.html").read_text()


def test_command(tiny_bundle: Path) -> None:
    done = CliRunner().invoke(main, ["verify", str(tiny_bundle), "--seconds", "0", "--bisect"])
    assert done.exit_code == 0 and "bisect: nothing departs" in done.stdout


def test_what_it_needs(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Sampler.load(tiny_bundle)
    with pytest.raises(InputError, match="--bisect"):
        verify(Sampler(good.bundle, good.open_graph), seconds=0, bisect=True, quiet=True)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'mteo-deploy\[train\]'"):
        verify(tiny_bundle, seconds=0, bisect=True, quiet=True)


def test_killed_runs_are_cleaned(bundle_copy: Path) -> None:
    from mteo_deploy.engines import cache

    left = bundle_copy / "engines" / ".bisect.abcd0123.tmp"
    shutil.copytree(bundle_copy / "graphs", left / "graphs")
    (left / ".lock").touch()  # which nobody holds any more
    assert [entry["name"] for entry in cache.clean(Bundle.open(bundle_copy))] == [left.name]
    assert nothing_left(bundle_copy)


def test_worst_place() -> None:
    expected = np.zeros((2, 3, 4), np.float32)
    found = expected.copy()
    found[1, 2, 0] = np.nan
    assert worst_place(found, expected) == "element [1, 2, 0] of [2, 3, 4]"
    assert worst_place(np.ones((1, 1, 2, 2), np.float32), np.zeros((1, 1, 2, 2), np.float32)).startswith("image 0")
