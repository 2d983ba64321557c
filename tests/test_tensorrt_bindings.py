"""The TensorRT backend against the real bindings of TensorRT 11, without its libraries and without a GPU.

The bindings are one extension module that takes nine C symbols from TensorRT's libraries. Linked against stubs it imports
anywhere, and brings the real classes, enums and signatures. The backend runs here on stand-ins that let a call through
only if the real class has that name and one of its signatures takes those arguments; memory is the host's. So a name
or argument that TensorRT 11 does not have fails. What TensorRT computes is not tested: that takes a GPU.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import cuda
from mteo_deploy.engines import tensorrt as ours
from mteo_deploy.engines.batches import BatchSizes
from mteo_deploy.errors import EngineError, MissingPackageError
from mteo_deploy.sampler import Sampler, noise_for

SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")

found = importlib.util.find_spec("tensorrt_bindings")
if found is None or not found.submodule_search_locations:
    pytest.skip("tensorrt-cu13-bindings is not installed", allow_module_level=True)
if shutil.which("gcc") is None:
    pytest.skip("no gcc to make the stubs with", allow_module_level=True)
pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
PACKAGE = Path(next(iter(found.submodule_search_locations)))


@functools.cache
def bindings() -> Any:
    """The extension module of the bindings, over stubs; a process can load it once."""
    directory = Path(tempfile.mkdtemp(prefix="stubs-"))
    source = directory / "stub.c"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in SYMBOLS))
    for library in LIBRARIES:
        command = ["gcc", "-shared", "-fPIC", str(source), f"-Wl,-soname,{library}", "-o", str(directory / library)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(directory / library), mode=ctypes.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location("tensorrt", PACKAGE / "tensorrt.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.rmtree(directory)
    return module


def overloads(documentation: str) -> list[tuple[list[tuple[str, bool]], str]]:
    """Signatures in a pybind11 docstring: per overload the arguments' ``(type, required)`` after self, and the result."""
    signatures = []
    for text, result in re.findall(r"\w+\(self: [\w.]+(.*?)\) -> ([\w.:\[\]]+)", documentation):
        arguments = [part for part in re.split(r", (?=\w+: )", text) if part]
        kinds = [(part.split(": ", 1)[1].split(" = ")[0], " = " not in part) for part in arguments]
        signatures.append((kinds, result))
    return signatures


def fits(real: Any, value: Any, kind: str) -> bool:
    """Whether an argument is of the type that a pybind11 signature names."""
    if kind == "tensorrt.Dims":
        return isinstance(value, tuple | list) and all(isinstance(size, int) for size in value)
    if kind.startswith("tensorrt."):
        wanted = functools.reduce(getattr, kind.split(".")[1:], real)
        return isinstance(value, wanted) or (isinstance(value, StandIn) and issubclass(value.cls, wanted))
    checks: dict[str, Callable[[Any], bool]] = {
        "str": lambda v: isinstance(v, str),
        "bool": lambda v: isinstance(v, bool),
        "tuple": lambda v: isinstance(v, tuple),
        "list": lambda v: isinstance(v, list),
        "typing.SupportsInt": lambda v: isinstance(v, int) and not isinstance(v, bool),
        "typing_extensions.Buffer": lambda v: isinstance(v, bytes | bytearray | memoryview),
    }
    return checks[kind](value)


class StandIn:
    """An object of a real class that answers from ``world`` and takes only what the real class takes."""

    def __init__(self, world: World, cls: type) -> None:
        self.__dict__.update(world=world, cls=cls, given={})

    def __getattr__(self, name: str) -> Any:
        attribute = inspect.getattr_static(self.cls, name)  # AttributeError: the real class has no such name
        key = f"{self.cls.__name__}.{name}"
        if isinstance(attribute, property):
            return self.given[name] if name in self.given else self.world.answers[key]
        return lambda *args: self.world.call(key, getattr(self.cls, name).__doc__, self, args)

    def __setattr__(self, name: str, value: Any) -> None:
        attribute = inspect.getattr_static(self.cls, name)
        assert isinstance(attribute, property) and attribute.fset is not None, f"{self.cls.__name__}.{name} cannot be set"
        (arguments, _), *_ = overloads(attribute.fset.__doc__.replace("arg0", "self").replace("(self", "f(self", 1))
        assert fits(self.world.real, value, arguments[0][0]), f"{self.cls.__name__}.{name} = {value!r}"
        self.given[name] = value
        self.world.set[f"{self.cls.__name__}.{name}"] = value


class World:
    """The stand-ins' module ``tensorrt``, and what its objects answer: a graph ``state [-1, 1, 8, 8] -> 2 * state``."""

    def __init__(self, real: Any) -> None:
        self.real, self.calls = real, []  # type: ignore[var-annotated]
        self.memory = HostMemory()
        self.set: dict[str, Any] = {}
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.refuse: set[str] = set()
        self.layers: list[dict[str, Any]] = []
        tensors = [("state", real.TensorIOMode.INPUT), ("next_state", real.TensorIOMode.OUTPUT)]
        state = StandIn(self, real.ITensor)
        self.answers: dict[str, Any] = {
            "INetworkDefinition.num_inputs": 1,
            "INetworkDefinition.get_input": lambda i: state,
            "ITensor.name": "state",
            "ITensor.shape": (-1, 1, 8, 8),
            "OnnxParser.num_errors": 1,
            "OnnxParser.parse_from_file": lambda path: "OnnxParser.parse_from_file" not in self.refuse,
            "OnnxParser.get_error": lambda i: StandIn(self, real.ParserError),
            "ParserError.node_operator": lambda: "Swish",
            "ParserError.node_name": lambda: "node_7",
            "ParserError.desc": lambda: "no such operator",
            "ICudaEngine.num_io_tensors": 2,
            "ICudaEngine.device_memory_size_v2": 1024,
            "ICudaEngine.get_tensor_name": lambda i: tensors[i][0],
            "ICudaEngine.get_tensor_mode": lambda name: dict(tensors)[name],
            "ICudaEngine.get_tensor_dtype": lambda name: real.DataType.FLOAT,
            "EngineInspector.get_engine_information": lambda format: json.dumps({"Layers": self.layers, "I/O Tensors": []}),
            "Builder.build_serialized_network": lambda n, c: None if "build" in self.refuse or not self.phases() else b"plan",
            "IBuilderConfig.create_timing_cache": self._timing_cache,
            "IBuilderConfig.set_timing_cache": lambda cache, mismatch: mismatch or "foreign" not in cache.given,
            "ICudaEngine.streamable_weights_size": 5 << 20,
            "ICudaEngine.get_weight_streaming_automatic_budget": lambda: 3 << 20,
            "OnnxParserRefitter.num_errors": 1,
            "OnnxParserRefitter.get_error": lambda i: StandIn(self, real.ParserError),
            "OnnxParserRefitter.refit_from_file": lambda path: "refit" not in self.refuse,
            "Refitter.get_missing_weights": lambda: ["conv.weight"] if "weights" in self.refuse else [],
            "Refitter.refit_cuda_engine": lambda: "engine" not in self.refuse,
            "Runtime.deserialize_cuda_engine": lambda p: StandIn(self, real.ICudaEngine) if p == b"plan" else None,
            "ITimingCache.serialize": lambda: b"timing",
            "IExecutionContext.set_input_shape": self._set_shape,
            "IExecutionContext.set_tensor_address": lambda name, address: self.addresses.update({name: address}) or True,
            "IExecutionContext.get_tensor_shape": lambda name: self.shapes["state"],
            "IExecutionContext.infer_shapes": list,
            "IExecutionContext.execute_async_v3": self._execute,
        }

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= 16

    def _timing_cache(self, stored: bytes) -> StandIn | None:
        cache = StandIn(self, self.real.ITimingCache)
        cache.given.update({"foreign": True} if stored == b"foreign" else {})
        return None if stored == b"damaged" else cache

    def phases(self) -> bool:
        """What a builder tells the monitor, in a thread of its own; whether it went through."""
        monitor = self.set["IBuilderConfig.progress_monitor"]
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Timing", "Building", 3)
        going = all(self.step(monitor, "Timing", i) for i in range(3))
        monitor.phase_finish("Timing")
        going = going and self.step(monitor, "Building", 0)
        monitor.phase_finish("Building")  # before the last step, as TensorRT may
        return going

    def step(self, monitor: Any, phase: str, index: int) -> bool:
        return bool(monitor.step_complete(phase, index))

    def _execute(self, stream: int) -> bool:
        for layer in self.layers if "IExecutionContext.profiler" in self.set else []:
            self.set["IExecutionContext.profiler"].report_layer_time(layer["Name"], layer["ms"])
        count = int(np.prod(self.shapes["state"]))
        source, target = (
            np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[name]))
            for name in ("state", "next_state")
        )
        self.memory.do(lambda: target.__setitem__(slice(None), 2 * source))
        return True

    def _takes(self, kinds: list[tuple[str, bool]], args: tuple[Any, ...]) -> bool:
        required = sum(needed for _, needed in kinds)
        pairs = zip(args, kinds, strict=False)
        return required <= len(args) <= len(kinds) and all(fits(self.real, value, kind) for value, (kind, _) in pairs)

    def call(self, key: str, documentation: str, instance: StandIn | None, args: tuple[Any, ...]) -> Any:
        self.calls.append((key, args))
        result = next((result for kinds, result in overloads(documentation) if self._takes(kinds, args)), None)
        if result is None:
            raise TypeError(f"{key} takes {overloads(documentation)}; found {args}")
        if key in self.answers:
            return self.answers[key](*args)
        name = result.split(".")[-1].split(":")[-1]
        if result == "None":
            return None
        return StandIn(self, getattr(self.real, name)) if hasattr(self.real, name) else {"bool": True, "int": 0}[result]

    def __getattr__(self, name: str) -> Any:
        if name == "nptype":
            return self.nptype
        if name == "__version__":
            return metadata.version("tensorrt-cu13-bindings")
        attribute = getattr(self.real, name)
        if name not in ("Logger", "Builder", "OnnxParser", "Runtime", "Refitter", "OnnxParserRefitter"):
            return attribute

        def make(*args: Any) -> StandIn:
            self.call(f"{name}.__init__", attribute.__init__.__doc__, None, args)
            return StandIn(self, attribute)

        if name == "Logger":
            make.ERROR = attribute.ERROR  # type: ignore[attr-defined]
        return make

    def nptype(self, kind: Any) -> Any:
        """The bindings' own function, which stands in their ``__init__.py``."""
        tree = ast.parse((PACKAGE / "__init__.py").read_text())
        (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "nptype")
        names = {member: value for member, value in vars(self.real.DataType).items() if member.isupper()}
        scope: dict[str, Any] = {**vars(self.real), **names}
        exec(compile(ast.Module([function], []), "nptype", "exec"), scope)
        return scope["nptype"](kind)


class HostMemory:
    """``cuda.bindings.runtime`` over host memory; a call must have the real function's number of arguments."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self.real, self.blocks = runtime, {}  # type: ignore[var-annotated]
        self.cudaError_t, self.cudaMemcpyKind = runtime.cudaError_t, runtime.cudaMemcpyKind
        self.cudaStreamCaptureMode = runtime.cudaStreamCaptureMode
        self.capture: list[Callable[[], object]] | None = None
        self.graphs: set[int] = set()

    def do(self, work: Callable[[], object]) -> None:
        """What is put on the stream: done at once, or captured with the addresses it has now."""
        work() if self.capture is None else self.capture.append(work)

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(self.real, name))

        def call(*args: Any) -> Any:
            signature.bind(*args)
            return getattr(self, re.sub("(?=[A-Z])", "_", name).lower())(*args)

        return call

    def cuda_get_device_count(self) -> Any:
        return self.cudaError_t.cudaSuccess, 1

    def cuda_get_device_properties(self, device: int) -> Any:
        assert hasattr(self.real.cudaDeviceProp, "name") and hasattr(self.real.cudaDeviceProp, "major")
        return self.cudaError_t.cudaSuccess, SimpleNamespace(name=b"a GPU", major=9, minor=0)

    def cuda_stream_create(self) -> Any:
        return self.cudaError_t.cudaSuccess, 7

    def cuda_malloc(self, size: int) -> Any:
        if self.capture is not None:
            return self.cudaError_t.cudaErrorStreamCaptureUnsupported, None
        block = (ctypes.c_char * (size + 256))(*b"\xff" * (size + 256))  # floats that are not numbers
        address = -(-ctypes.addressof(block) // 256) * 256
        self.blocks[address] = block
        return self.cudaError_t.cudaSuccess, address

    def cuda_free(self, address: int) -> Any:
        del self.blocks[address]
        return (self.cudaError_t.cudaSuccess,)

    def cuda_memcpy_async(self, target: int, source: int, size: int, kind: Any, stream: Any) -> Any:
        to_device = kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert (target in self.blocks, source in self.blocks, stream) == (to_device, not to_device, 7)
        assert self.capture is None  # memory of the host may be gone when a graph is launched
        ctypes.memmove(target, source, size)
        return (self.cudaError_t.cudaSuccess,)

    def cuda_stream_synchronize(self, stream: Any) -> Any:
        assert self.capture is None
        return (self.cudaError_t.cudaSuccess,)

    def cuda_stream_destroy(self, stream: Any) -> Any:
        return (self.cudaError_t.cudaSuccess,)

    def cuda_stream_begin_capture(self, stream: Any, mode: Any) -> Any:
        assert (stream, self.capture) == (7, None) and mode == self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.capture = []
        return (self.cudaError_t.cudaSuccess,)

    def cuda_stream_end_capture(self, stream: Any) -> Any:
        graph, self.capture = self.capture, None
        return self.cudaError_t.cudaSuccess, graph

    def cuda_graph_destroy(self, graph: Any) -> Any:
        return (self.cudaError_t.cudaSuccess,)

    def cuda_graph_instantiate(self, graph: Any, flags: int) -> Any:
        executable = list(graph)
        self.graphs.add(id(executable))
        return self.cudaError_t.cudaSuccess, executable

    def cuda_graph_launch(self, executable: Any, stream: Any) -> Any:
        assert stream == 7 and id(executable) in self.graphs
        for work in executable:
            work()
        return (self.cudaError_t.cudaSuccess,)

    def cuda_graph_exec_destroy(self, executable: Any) -> Any:
        self.graphs.remove(id(executable))
        return (self.cudaError_t.cudaSuccess,)

    def cuda_get_last_error(self) -> Any:
        return (self.cudaError_t.cudaSuccess,)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(monkeypatch)


def make_world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Put the stand-ins in the place of the packages."""
    world = World(bindings())
    monkeypatch.setitem(sys.modules, "tensorrt", world)
    monkeypatch.setattr(cuda, "cudart", lambda: world.memory)
    return world


def test_build_run_save_and_open_again(world: World, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, backend = Bundle.open(tiny_bundle), ours.TensorRtBackend()
    assert backend.devices() == ["cuda"] and backend.machine("cuda", {}).endswith("a GPU, compute capability 9.0")
    session = backend.open(bundle, "graphs/step_00.onnx", "cuda", {"batch": [2, 4]})
    state = np.random.default_rng(0).standard_normal((3, 1, 8, 8), np.float32)
    for batch in (3, 1, 2):
        (output,) = session.run({"state": state[:batch]})
        np.testing.assert_array_equal(output, 2 * state[:batch])
    calls = dict(world.calls)
    assert calls["IOptimizationProfile.set_shape"] == ("state", (2, 1, 8, 8), (2, 1, 8, 8), (4, 1, 8, 8))
    assert calls["IBuilderConfig.clear_flag"] == (world.real.BuilderFlag.TF32,)
    session.save(tmp_path, "graphs/step_00.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"step_00.plan", "step_00.layers.json"}
    world.calls.clear()
    again = backend.open(bundle, "graphs/step_00.onnx", "cuda", {}, tmp_path)
    assert not [key for key, _ in world.calls if key.startswith("Builder")]
    np.testing.assert_array_equal(again.run({"state": state})[0], 2 * state)


def test_refusals(world: World, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, backend, graph = Bundle.open(tiny_bundle), ours.TensorRtBackend(), "graphs/step_00.onnx"
    with pytest.raises(EngineError, match="device out of cuda for tensorrt; found 'cpu'"):
        backend.open(bundle, graph, "cpu", {})
    session = backend.open(bundle, graph, "cuda", {})
    with pytest.raises(EngineError, match=r"expected the inputs \['state'\]; found \[\]"):
        session.run({})
    with pytest.raises(EngineError, match="state is outside what it was built for; build again with --batch"):
        session.run({"state": np.zeros((17, 1, 8, 8), np.float32)})
    (tmp_path / "step_00.plan").write_bytes(b"another version's")
    with pytest.raises(EngineError, match=r"could not read the plan of graphs/step_00\.onnx; build again"):
        backend.open(bundle, graph, "cuda", {}, tmp_path)
    world.refuse.add("build")
    with pytest.raises(EngineError, match="no implementation was found"):
        backend.open(bundle, graph, "cuda", {})
    world.refuse.add("OnnxParser.parse_from_file")
    with pytest.raises(EngineError, match="Swish node_7: no such operator"):
        backend.open(bundle, graph, "cuda", {})


def images(world: World, sampler: Sampler, count: int, seed: int) -> int:
    """Check a sampling: every evaluation doubles the state. Returns how many plans were run for it."""
    world.calls.clear()
    noise = noise_for((1, 8, 8), seed, range(count))
    first = noise * np.float32(sampler.plan.initial_scale)
    states = sampler.states(noise)
    for i, state in enumerate(states):
        np.testing.assert_array_equal(state, first * np.float32(2 ** (i + 1)))
    return sum(key == "IExecutionContext.execute_async_v3" for key, _ in world.calls)


def loop_of(path: Path) -> tuple[Bundle, Sampler]:
    bundle, backend = Bundle.open(path), ours.TensorRtBackend()
    return bundle, Sampler(bundle, lambda graph: backend.open(bundle, graph, "cuda", {}))


def test_a_whole_loop_becomes_one_graph(world: World, tiny_bundle: Path) -> None:
    """As it is, again and captured, then launched alone; each batch size by itself, in any order."""
    _, sampler = loop_of(tiny_bundle)
    assert [images(world, sampler, 2, seed) for seed in range(4)] == [3, 6, 0, 0]
    assert [images(world, sampler, 4, seed) for seed in range(4)] == [3, 6, 0, 0]
    blocks = len(world.memory.blocks)
    assert [images(world, sampler, count, 9) for count in (2, 4, 2)] == [0, 0, 0]
    sampler.conditioned_session.run({"state": np.zeros((2, 1, 8, 8), np.float32)})  # between two launches
    assert images(world, sampler, 2, 5) == 0
    assert sampler.device.notes == [] and len(world.memory.graphs) == 2
    assert len(world.memory.blocks) <= blocks + 2


def test_a_frozen_address_must_stay(world: World, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with the scratch memory and the buffers of a graph given away, its images are wrong."""
    _, sampler = loop_of(tiny_bundle)
    for seed in range(3):
        images(world, sampler, 2, seed)
    for block in world.memory.blocks.values():
        ctypes.memset(block, 255, len(block))
    assert images(world, sampler, 2, 3) == 0  # contents do not matter between two samplings, addresses do
    (take,) = sampler._now.states.takes.values()  # type: ignore[attr-defined]
    take._inputs["state"] = sampler.device.put(np.zeros((2, 1, 8, 8), np.float32))
    with pytest.raises(AssertionError):
        images(world, sampler, 2, 4)


def test_only_the_last_shapes_are_kept(world: World, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "TAKES", 2)
    _, sampler = loop_of(tiny_bundle)
    for _ in range(2):
        for count in (1, 2, 3, 4):
            images(world, sampler, count, 0)
    assert len(sampler._now.states.takes) == 2  # type: ignore[attr-defined]
    blocks = len(world.memory.blocks)
    for count in (1, 2, 3, 4):
        images(world, sampler, count, 0)
    assert len(world.memory.blocks) == blocks


def test_what_cannot_be_captured_runs_as_it_is_and_says_why(world: World, tiny_bundle: Path) -> None:
    """Images that go in parts leave the device in the middle of the loop."""
    bundle, backend = Bundle.open(tiny_bundle), ours.TensorRtBackend()
    sampler = Sampler(bundle, lambda graph: BatchSizes({2: backend.open(bundle, graph, "cuda", {})}))
    assert [images(world, sampler, 3, seed) for seed in range(3)] == [6, 6, 6]
    (note,) = sampler.device.notes
    assert note.startswith("loop not captured in a CUDA graph for state [3, 1, 8, 8]: ") and "images go in parts" in note
    assert [images(world, sampler, 2, seed) for seed in range(3)] == [3, 6, 0]


def test_streamed_weights_are_not_captured(world: World, tiny_bundle: Path) -> None:
    bundle, backend = Bundle.open(tiny_bundle), ours.TensorRtBackend()
    for budget, runs in ((0, [3, 3, 3]), (9, [3, 6, 0])):
        own = {"weight_streaming": "on", "weight_streaming_budget": budget}
        options = {"engine_options": own}
        sampler = Sampler(bundle, lambda graph, options=options: backend.open(bundle, graph, "cuda", options))  # type: ignore[misc]
        assert [images(world, sampler, 2, seed) for seed in range(3)] == runs
        assert ["weights of graphs/step_00.onnx are streamed" in note for note in sampler.device.notes] == [True] * (
            budget == 0
        )
        del sampler


def test_layers_are_not_timed_in_a_captured_graph(world: World, tiny_bundle: Path) -> None:
    bundle, backend = Bundle.open(tiny_bundle), ours.TensorRtBackend()
    sampler = Sampler(bundle, lambda graph: backend.profile(bundle, graph, "cuda", {}, 1))
    assert [images(world, sampler, 2, seed) for seed in range(3)] == [3, 3, 3]
    assert "are timed one by one" in sampler.device.notes[0]


def test_memory_that_a_capture_would_need_is_refused(world: World, tiny_bundle: Path) -> None:
    _, sampler = loop_of(tiny_bundle)
    images(world, sampler, 2, 0)
    execute = world.answers["IExecutionContext.execute_async_v3"]
    sizes = iter([4096, 4096, 4096] + [1 << 20] * 9)

    def grows(stream: int) -> bool:
        sampler.device.scratch_of(next(sizes))  # type: ignore[attr-defined]
        return bool(execute(stream))

    world.answers["IExecutionContext.execute_async_v3"] = grows
    images(world, sampler, 2, 1)
    assert "cudaMalloc failed with cudaErrorStreamCaptureUnsupported" in sampler.device.notes[0]
    assert images(world, sampler, 2, 2) == 3


def test_closing_frees_all(world: World, tiny_bundle: Path) -> None:
    with loop_of(tiny_bundle)[1] as sampler:
        for seed in range(3):
            images(world, sampler, 2, seed)
        assert world.memory.blocks and world.memory.graphs
    assert not world.memory.blocks and not world.memory.graphs
    with pytest.raises(EngineError, match="expected an open sampler"):
        sampler(num=1)


def test_the_stand_ins_refuse(world: World) -> None:
    """The control: names and arguments that TensorRT 11 does not have."""
    builder = world.Builder(world.Logger(world.Logger.ERROR))
    with pytest.raises(AttributeError):
        builder.max_batch_size  # noqa: B018
    with pytest.raises(AttributeError):
        world.BuilderFlag.FP16  # noqa: B018
    with pytest.raises(TypeError, match=r"Builder\.create_network takes"):
        builder.create_network("explicit batch")
    with pytest.raises(TypeError, match=r"Builder\.build_serialized_network takes"):
        builder.build_serialized_network(builder.create_network(0))
    with pytest.raises(AssertionError, match=r"IBuilderConfig\.profiling_verbosity = 2"):
        builder.create_builder_config().profiling_verbosity = 2
    with pytest.raises(TypeError):
        cuda.cudart().cudaMalloc(1, 2)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'mteo-deploy\[tensorrt\]'"):
        ours.BACKEND.version()


def test_cuda_errors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import runtime

    fake = SimpleNamespace(
        cudaError_t=runtime.cudaError_t, cudaMalloc=lambda size: (runtime.cudaError_t.cudaErrorMemoryAllocation, None)
    )
    monkeypatch.setattr(cuda, "cudart", lambda: fake)
    with pytest.raises(EngineError, match="cudaMalloc failed with cudaErrorMemoryAllocation"):
        cuda.cuda("cudaMalloc", 1 << 60)
