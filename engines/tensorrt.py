"""TensorRT 11 on an NVIDIA GPU.

Networks are strongly typed: a graph's own types are what is computed in, and TF32 is switched off. Each graph becomes one
plan (:mod:`~.tensorrt_build`), with one optimisation profile over the batch; plans and the inspector's view of their layers
are the built engine's files. Execution contexts never run at the same time here (a lock sees to it), so all of
them share one block of scratch memory, and one stream; arrays stay on the device from one to the next, and a whole sampling is
captured in one CUDA graph (:mod:`~.cuda`).

Not run on a GPU yet: the tests hold every call against the real bindings of TensorRT 11.4, which import without a GPU.
"""

from __future__ import annotations

import json
import platform
import weakref
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.base import Layer, ProfiledSession, Session
from mteo_deploy.engines.cuda import CudaDevice, NotCapturedError, cuda
from mteo_deploy.engines.device import DeviceArray, Value, Values
from mteo_deploy.engines.live import stored
from mteo_deploy.engines.options import of
from mteo_deploy.engines.tensorrt_build import MIB, OPTIONS, build_plan, errors_of, package
from mteo_deploy.engines.turns import Turns
from mteo_deploy.errors import EngineError
from mteo_deploy.precision import NAMES
from mteo_deploy.progress import Reporter

if TYPE_CHECKING:
    import tensorrt

AMPERE = 8
"""Major compute capability from which ``hardware_compatibility=ampere_plus`` holds."""


class _Device(CudaDevice):
    """What all sessions share beside memory and stream: the runtime, and the times of layers built so far."""

    def __init__(self) -> None:
        import tensorrt as trt

        super().__init__()
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.runtime = trt.Runtime(self.logger)
        self.timing = b""


class TensorRtSession:
    """One plan with its execution context and its buffers."""

    def __init__(self, device: _Device, plan: bytes, graph: str, prepare: Callable[[Any], bool]) -> None:
        import tensorrt as trt

        self.device, self._plan, self._graph = device, plan, graph
        engine = device.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"tensorrt could not read the plan of {graph}; build again")
        self._streamed = prepare(engine)
        self._engine = engine
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise EngineError(f"tensorrt could not make a context for {graph}: is the device's memory full?")
        self._inputs: dict[str, np.dtype[Any]] = {}
        self._outputs: dict[str, np.dtype[Any]] = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            kind = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
            (self._inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else self._outputs)[name] = kind
        opened = engine, self._context
        self._turns = Turns(lambda: opened)

    def run(self, feeds: Values) -> list[Any]:
        return self._turns.run(lambda _: self._run_in_turn(feeds))

    def _run_in_turn(self, feeds: Values) -> list[Any]:
        if feeds.keys() != self._inputs.keys():  # a missing one would keep what the last run was given
            raise EngineError(f"expected the inputs {sorted(self._inputs)}; found {sorted(feeds)}")
        with self.device.lock:  # one context, one stream: one thread at a time
            outputs = self._run({name: self._held(feeds[name], kind) for name, kind in self._inputs.items()})
            stay = any(isinstance(value, DeviceArray) for value in feeds.values())
            return outputs if stay else list(self.device.fetch(outputs))

    def _held(self, value: Value, kind: np.dtype[Any]) -> DeviceArray:
        if not isinstance(value, DeviceArray):
            return self.device.put(np.asarray(value, dtype=kind))
        if value.dtype != kind:
            raise EngineError(f"expected {kind} for an input of {self._graph}; found {value.dtype} on the device")
        return value

    def _run(self, inputs: dict[str, DeviceArray]) -> list[DeviceArray]:
        """Put one run on the stream. Nothing here waits for the device, and a run like the last one allocates nothing."""
        context, device = self._context, self.device
        if device.capturing and self._streamed:
            raise NotCapturedError(f"weights of {self._graph} are streamed to the device")
        for name, value in inputs.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                shapes = {name: value.shape for name, value in inputs.items()}
                raise EngineError(
                    f"tensorrt could not run inputs {shapes} on {self._graph}: {name} is outside what it was built for; build "
                    "again with --batch"
                )
            self._bind(name, value.buffer.address)
        if missing := context.infer_shapes():
            raise EngineError(f"tensorrt does not know the shapes of {', '.join(missing)} of {self._graph}")
        found = {name: device.empty(tuple(context.get_tensor_shape(name)), kind) for name, kind in self._outputs.items()}
        for name, array in found.items():
            self._bind(name, array.buffer.address)
        size = int(self._engine.device_memory_size_v2)
        if size:
            context.set_device_memory(device.scratch_of(size), size)
        if not context.execute_async_v3(int(device.stream)):
            raise EngineError(f"tensorrt could not run {self._graph}")
        return list(found.values())

    def _bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"tensorrt did not take the memory for {name} of {self._graph}")

    def save(self, directory: Path, graph: str) -> None:
        stem = PurePosixPath(graph).stem
        (directory / f"{stem}.plan").write_bytes(self._plan)
        (directory / f"{stem}.layers.json").write_text(self._inspect(), encoding="utf-8")

    def close(self) -> None:
        if self._turns.close() and hasattr(self, "_context"):
            del self._context  # before the engine that it belongs to
            del self._engine

    def _inspect(self) -> str:
        """The layers of the plan, in JSON."""
        import tensorrt as trt

        found: str = self._engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        return found


class TensorRtProfiledSession(TensorRtSession):
    """A session whose context tells the times of its layers after every run."""

    def __init__(self, device: _Device, plan: bytes, graph: str, prepare: Callable[[Any], bool]) -> None:
        super().__init__(device, plan, graph, prepare)
        kinds = _kinds(self._inspect())
        self._profiler = _profiler(kinds)
        self._context.profiler = self._profiler

    def _run(self, inputs: dict[str, DeviceArray]) -> list[DeviceArray]:
        if self.device.capturing:  # a captured graph is launched as a whole
            raise NotCapturedError(f"the layers of {self._graph} are timed one by one")
        return super()._run(inputs)

    def layers(self) -> list[Layer]:
        return list(self._profiler.found.values())


def _kinds(inspected: str) -> dict[str, str]:
    """Layer -> kind, as the inspector of a plan built with detailed verbosity tells."""
    layers = [layer for layer in json.loads(inspected)["Layers"] if isinstance(layer, dict)]
    return {layer["Name"]: layer.get("LayerType", "unknown") for layer in layers}


def _profiler(kinds: Mapping[str, str]) -> Any:
    import tensorrt as trt

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.found: dict[str, Layer] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.found.setdefault(layer_name, Layer(layer_name, kinds.get(layer_name, "unknown"))).times.append(ms)

    return Profiler()


def _fill(engine: tensorrt.ICudaEngine, logger: tensorrt.Logger, source: Path, graph: str) -> None:
    """Put the weights of the graph that a plan was built from into the plan. Others would be undefined; the key sees to it."""
    import tensorrt as trt

    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(source)):
        raise EngineError(f"tensorrt could not put the weights into {graph}: {errors_of(parser)}; build with strip=off")
    if missing := refitter.get_missing_weights():
        raise EngineError(f"tensorrt found no weights for {', '.join(missing)} in {graph}; build with strip=off")
    if not refitter.refit_cuda_engine():
        raise EngineError(f"tensorrt did not take the weights of {graph}; build with strip=off")


def _stream(engine: tensorrt.ICudaEngine, budget: int | None, graph: str) -> None:
    """Set how many bytes of weights stay on the device: all that fit by TensorRT's own reckoning, or a budget in MiB."""
    most = engine.streamable_weights_size
    size = engine.get_weight_streaming_automatic_budget() if budget is None else min(budget * MIB, most)
    engine.weight_streaming_budget_v2 = size
    if engine.weight_streaming_budget_v2 != size:
        raise EngineError(f"tensorrt did not take {size} of {most} bytes as the budget of the weights of {graph}")


class TensorRtBackend:
    name = "tensorrt"
    extra = "tensorrt"
    precisions = ("fp32",)
    engine_options = OPTIONS

    def __init__(self) -> None:
        self._shared: Callable[[], _Device | None] = lambda: None

    def version(self) -> str:
        return str(getattr(package(), "__version__", None) or metadata.version("tensorrt-cu13"))

    def devices(self) -> list[str]:
        try:
            return ["cuda"] if cuda("cudaGetDeviceCount") else []
        except EngineError:  # no driver, no device
            return []

    def runs(self, device: str) -> tuple[str, ...]:
        return NAMES

    def machine(self, device: str, options: Mapping[str, Any]) -> str:
        level = of(OPTIONS, options)["hardware_compatibility"]
        properties = cuda("cudaGetDeviceProperties", 0)
        name = properties.name.decode() if isinstance(properties.name, bytes) else properties.name
        capability = f"compute capability {properties.major}.{properties.minor}"
        if level == "ampere_plus" and properties.major >= AMPERE:
            return f"{platform.machine()}, compute capability {AMPERE}.0 or later"
        return f"{platform.machine()}, {capability}" if level != "none" else f"{platform.machine()}, {name}, {capability}"

    def open(
        self,
        bundle: Bundle,
        graph: str,
        device: str,
        options: Mapping[str, Any],
        built: Path | None = None,
        report: Reporter | None = None,
    ) -> Session:
        return TensorRtSession(*self._plan(bundle, graph, device, options, built, report))

    def profile(
        self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], batch: int, built: Path | None = None
    ) -> ProfiledSession:
        return TensorRtProfiledSession(*self._plan(bundle, graph, device, options, built, None))

    def _plan(
        self,
        bundle: Bundle,
        graph: str,
        device: str,
        options: Mapping[str, Any],
        built: Path | None,
        report: Reporter | None,
    ) -> tuple[_Device, bytes, str, Callable[[Any], bool]]:
        """What makes a session: the stored plan or a new one, and what its engine wants before its first context.

        That tells whether weights are streamed to the device.
        """
        package()
        if device not in self.devices():
            raise EngineError(f"expected a device out of {', '.join(self.devices()) or 'none'} for tensorrt; found {device!r}")
        shared, own = self._device(), of(OPTIONS, options)
        path = stored(built, f"{PurePosixPath(graph).stem}.plan")
        if path:
            plan = path.read_bytes()
        else:
            with bundle.opened(graph) as source:
                plan = build_plan(shared, source, graph, options, report)

        def prepare(engine: tensorrt.ICudaEngine) -> bool:
            if own["strip"] == "on":
                with bundle.opened(graph) as source:
                    _fill(engine, shared.logger, source, graph)
            if own["weight_streaming"] == "on":
                _stream(engine, own["weight_streaming_budget"], graph)
            return bool(own["weight_streaming"] == "on" and engine.weight_streaming_budget_v2 < engine.streamable_weights_size)

        return shared, plan, graph, prepare

    def _device(self) -> _Device:
        """The device that all open sessions share; it goes with the last of them."""
        device = self._shared()
        if device is None:
            device = _Device()
            self._shared = weakref.ref(device)
        return device


BACKEND = TensorRtBackend()
