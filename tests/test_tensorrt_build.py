"""TensorRT's builder, refitter and profiler, on the stand-ins of ``test_tensorrt_bindings``: calls are held against the real
bindings, and what is done with their answers is tested. Whether TensorRT does what the options say takes a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import altered
from test_tensorrt_bindings import World, make_world

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import backend
from mteo_deploy.engines import tensorrt as ours
from mteo_deploy.engines.cache import key_parts
from mteo_deploy.engines.options import read
from mteo_deploy.errors import EngineError, InputError
from mteo_deploy.profiling import GROUPS

GRAPH = "graphs/step_00.onnx"


@pytest.fixture(name="world")
def _world(monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(monkeypatch)


class Bars:
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int]] = []
        self.done: list[int] = []
        self.notes: list[str] = []

    def task(self, description: str, total: int, done: int = 0) -> int:
        self.tasks.append((description, total))
        self.done.append(done)
        return len(self.tasks) - 1

    def advance(self, task: int, count: int = 1, note: str = "") -> None:
        self.done[task] += count
        self.notes.append(note)


def opened(bundle: Path, batch: list[int] | None = None, report: Any = None, **given: object) -> Any:
    options = {"engine_options": read([backend("tensorrt")], given)} | ({"batch": batch} if batch else {})
    return ours.TensorRtBackend().open(Bundle.open(bundle), GRAPH, "cuda", options, None, report)


def flags(world: World) -> set[str]:
    return {args[0].name for key, args in world.calls if key == "IBuilderConfig.set_flag"}


def test_defaults(world: World, tiny_bundle: Path) -> None:
    """Without options the builder is told TensorRT's own defaults, and no flag is set."""
    opened(tiny_bundle)
    real = world.real
    assert world.set["IBuilderConfig.builder_optimization_level"] == 3
    assert world.set["IBuilderConfig.tiling_optimization_level"] == real.TilingOptimizationLevel.NONE
    assert world.set["IBuilderConfig.hardware_compatibility_level"] == real.HardwareCompatibilityLevel.NONE
    assert flags(world) == set() and "IBuilderConfig.set_memory_pool_limit" not in dict(world.calls)
    assert "ICudaEngine.weight_streaming_budget_v2" not in world.set


def test_options_reach_the_builder(world: World, tiny_bundle: Path) -> None:
    opened(tiny_bundle, optimization_level="5", tiling_optimization_level="full", workspace=512, version_compatible=True)
    real = world.real
    assert world.set["IBuilderConfig.builder_optimization_level"] == 5
    assert world.set["IBuilderConfig.tiling_optimization_level"] == real.TilingOptimizationLevel.FULL
    assert dict(world.calls)["IBuilderConfig.set_memory_pool_limit"] == (real.MemoryPoolType.WORKSPACE, 512 << 20)
    assert flags(world) == {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}


def test_every_word_is_a_name_of_the_bindings(world: World) -> None:
    for name, enum in (
        ("tiling_optimization_level", "TilingOptimizationLevel"),
        ("hardware_compatibility", "HardwareCompatibilityLevel"),
    ):
        assert {word.upper() for word in ours.OPTIONS[name].values} == set(getattr(world.real, enum).__members__)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("batch", "counts"), [([1, 4, 16], (1, 1, 16)), ([4, 1, 16], (1, 4, 16)), ([8], (8, 8, 8)), (None, (1, 1, 16))]
)
def test_the_first_batch_size_is_built_for_above_all(
    batch: list[int] | None, counts: tuple[int, ...], world: World, tiny_bundle: Path
) -> None:
    opened(tiny_bundle, batch)
    name, *shapes = dict(world.calls)["IOptimizationProfile.set_shape"]
    assert name == "state" and [shape[0] for shape in shapes] == list(counts)


@pytest.mark.parametrize(
    ("level", "machine"),
    [
        ("none", "a GPU, compute capability 9.0"),
        ("same_compute_capability", "compute capability 9.0"),
        ("ampere_plus", "compute capability 8.0 or later"),
    ],
)
def test_hardware_compatibility_is_in_the_key(level: str, machine: str, world: World, tiny_bundle: Path) -> None:
    options = {"engine_options": {"hardware_compatibility": level}}
    assert ours.BACKEND.machine("cuda", options).split(", ", 1)[1] == machine
    opened(tiny_bundle, hardware_compatibility=level)
    assert world.set["IBuilderConfig.hardware_compatibility_level"].name == level.upper()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strip": "on", "version_compatible": "on"}, "version_compatible=on and --option strip=on; found both: what opens in"),
        ({"refit": "on", "version_compatible": "on"}, "version_compatible=on and --option refit=on"),
        ({"strip": "on", "weight_streaming": "on"}, "weight_streaming=on and --option strip=on"),
        ({"weight_streaming_budget": "1"}, "weight_streaming=on with --option weight_streaming_budget; found it off"),
        ({"weight_streaming_budget": "1", "weight_streaming": "off"}, "found it off"),
        ({"optimization_level": "6"}, "optimization_level=0 to 5 for tensorrt; found '6'"),
        ({"workspace": "0"}, "found '0'"),
        ({"sparsity": "on"}, "found 'sparsity'"),
    ],
)
def test_refused_options(given: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read([backend("tensorrt")], given)


def test_a_plan_without_weights_is_filled_from_its_own_graph(world: World, tiny_bundle: Path) -> None:
    opened(tiny_bundle, strip=True)
    assert flags(world) == {"STRIP_PLAN"}
    calls = [key for key, _ in world.calls]
    assert dict(world.calls)["OnnxParserRefitter.refit_from_file"] == (str(Bundle.open(tiny_bundle).file(GRAPH)),)
    assert calls.index("Refitter.refit_cuda_engine") < calls.index("ICudaEngine.create_execution_context")
    for refused, message in (
        ("engine", "did not take the weights"),
        ("weights", r"no weights for conv\.weight"),
        ("refit", "Swish node_7: no such operator"),
    ):
        world.refuse.add(refused)
        with pytest.raises(EngineError, match=f"{message}.*build with strip=off"):
            opened(tiny_bundle, strip=True)


def test_refit(world: World, tiny_bundle: Path) -> None:
    opened(tiny_bundle, refit=True)
    assert flags(world) == {"REFIT"} and "Refitter.__init__" not in dict(world.calls)
    opened(tiny_bundle, refit=True, strip=True)
    assert flags(world) == {"REFIT", "STRIP_PLAN"} and "Refitter.refit_cuda_engine" in dict(world.calls)


@pytest.mark.parametrize(("budget", "size"), [(None, 3 << 20), (0, 0), (2, 2 << 20), (64, 5 << 20)])
def test_weight_streaming(budget: int | None, size: int, world: World, tiny_bundle: Path) -> None:
    opened(tiny_bundle, weight_streaming="on", **({} if budget is None else {"weight_streaming_budget": budget}))
    assert flags(world) == {"WEIGHT_STREAMING"}
    assert world.set["ICudaEngine.weight_streaming_budget_v2"] == size


def test_a_budget_that_is_not_taken(world: World, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(dict[str, Any]):
        def __setitem__(self, name: str, value: Any) -> None:
            super().__setitem__(name, 1 if name == "weight_streaming_budget_v2" else value)

    answer = world.answers["Runtime.deserialize_cuda_engine"]

    def deaf(plan: bytes) -> Any:
        engine = answer(plan)
        engine.__dict__["given"] = Deaf()
        return engine

    world.answers["Runtime.deserialize_cuda_engine"] = deaf
    with pytest.raises(EngineError, match="did not take 0 of 5242880 bytes"):
        opened(tiny_bundle, weight_streaming="on", weight_streaming_budget=0)


def test_timing_cache(world: World, tiny_bundle: Path, tmp_path: Path) -> None:
    """Made where there is none, read where there is one, written back whole; not in the key."""
    file = tmp_path / "times" / "timing.cache"
    opened(tiny_bundle, timing_cache=file)
    assert file.read_bytes() == b"timing" and list(file.parent.iterdir()) == [file]
    file.write_bytes(b"earlier")
    world.calls.clear()
    opened(tiny_bundle, timing_cache=str(file))
    assert dict(world.calls)["IBuilderConfig.create_timing_cache"] == (b"earlier",)
    assert file.read_bytes() == b"timing"
    bundle, given = Bundle.open(tiny_bundle), {"threads": 1, "engine_options": {"strip": "on", "timing_cache": str(file)}}
    assert key_parts(bundle, ours.BACKEND, "cuda", given)["options"] == {"threads": 1, "engine_options": {"strip": "on"}}


@pytest.mark.parametrize("content", [b"damaged", b"foreign"])
def test_timing_cache_that_is_not_taken(content: bytes, world: World, tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "timing.cache"
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"timing cache .*timing\.cache was damaged, or made by another.*started anew"):
        opened(tiny_bundle, timing_cache=file)
    assert file.read_bytes() == b"timing"
    assert [args for key, args in world.calls if key == "IBuilderConfig.create_timing_cache"] == [(content,), (b"",)]


def test_progress(world: World, tiny_bundle: Path) -> None:
    """One bar for the outermost phase, full at its end; the phases within are written beside it."""
    bars = Bars()
    opened(tiny_bundle, report=bars)
    assert bars.tasks == [("step_00: Building", 2)] and bars.done == [2]
    assert "Timing" in bars.notes


INTERRUPTED = """
import os, signal, sys, time
import pytest
from test_tensorrt_bindings import make_world
from mteo_deploy import build

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have had it ignored
world, steps = make_world(pytest.MonkeyPatch()), []

def step(monitor, phase, index):
    if not steps:
        os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        steps.append(index)
        if not monitor.step_complete(phase, 0):
            return False
        time.sleep(0.01)
    return True

world.step = step
try:
    build(sys.argv[1], engine="tensorrt", realisation="baked", engine_options={"timing_cache": sys.argv[2]}, quiet=True)
except KeyboardInterrupt:
    print("interrupted after", len(steps))
"""


def test_interrupt_stops_the_builder(tiny_bundle: Path, tmp_path: Path) -> None:
    """Ctrl-C while TensorRT works in its thread: it is told to stop, and nothing is left behind."""
    path, file = altered(tiny_bundle, tmp_path / "bundle"), tmp_path / "timing.cache"
    command = [sys.executable, "-c", INTERRUPTED, str(path), str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    steps = re.fullmatch(r"interrupted after (\d+)\n", done.stdout)
    assert steps and 0 < int(steps[1]) < 1000, done.stdout + done.stderr
    assert not (path / "engines").exists() and not file.exists()


def test_profile(world: World, tiny_bundle: Path, tmp_path: Path) -> None:
    world.layers = [
        {"Name": "conv_in + swish", "LayerType": "CaskConvolution", "ms": 0.5},
        {"Name": "reformat", "LayerType": "Reformat", "ms": 0.25},
    ]
    bundle, engine = Bundle.open(tiny_bundle), ours.TensorRtBackend()
    engine.open(bundle, GRAPH, "cuda", {}).save(tmp_path, GRAPH)
    assert json.loads((tmp_path / "step_00.layers.json").read_text())["Layers"][1]["Name"] == "reformat"
    world.calls.clear()
    session = engine.profile(bundle, GRAPH, "cuda", {}, 1, tmp_path)
    assert "Builder.build_serialized_network" not in dict(world.calls)  # the layers of the plan that is used
    world.layers.append({"Name": "added by the runtime", "ms": 1.0})
    for _ in range(2):
        session.run({"state": np.zeros((1, 1, 8, 8), np.float32)})
    found = [(layer.name, layer.kind, layer.times) for layer in session.layers()]
    assert found == [
        ("conv_in + swish", "CaskConvolution", [0.5, 0.5]),
        ("reformat", "Reformat", [0.25, 0.25]),
        ("added by the runtime", "unknown", [1.0, 1.0]),
    ]
    assert "CaskConvolution" in GROUPS["convolution"].split() and "Reformat" in GROUPS["layout and shape"].split()
