"""TensorRT 11 on an NVIDIA GPU.

Networks are strongly typed: a graph's own types are what is computed in, and TF32 is switched off. Each graph becomes one
plan (:mod:`~.tensorrt_build`), with one optimisation profile over the batch; plans and the inspector's view of their layers
are the built engine's files. Execution contexts never run at the same time here, so all of them share one block of scratch
memory, and one stream.

Not run on a GPU yet: the tests hold every call against the real bindings of TensorRT 11.4, which import without a GPU.
"""

from __future__ import annotations

import json
import platform
import threading
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.base import Layer, ProfiledSession, Session
from mteo_deploy.engines.options import of
from mteo_deploy.engines.tensorrt_build import MIB, OPTIONS, build_plan, errors_of, package
from mteo_deploy.errors import EngineError, MissingPackageError
from mteo_deploy.progress import Reporter

if TYPE_CHECKING:
    import tensorrt

AMPERE = 8
"""Major compute capability from which ``hardware_compatibility=ampere_plus`` holds."""


def _cudart() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingPackageError(
            f"the engine tensorrt needs cuda-bindings ({error}); run: pip install 'mteo-deploy[tensorrt]'"
        ) from None
    return runtime


def _cuda(function: str, *args: Any) -> Any:
    """Call a function of the CUDA runtime; its result, if it has one.

    Raises:
        EngineError: when the call fails.
    """
    cudart = _cudart()
    code, *result = getattr(cudart, function)(*args)
    if code != cudart.cudaError_t.cudaSuccess:
        raise EngineError(f"CUDA: {function} failed with {getattr(code, 'name', code)}")
    return result[0] if result else None


class _Memory:
    """A block of device memory that grows when more is asked for. Addresses are 256-byte aligned, as cudaMalloc's are."""

    def __init__(self) -> None:
        self.address, self.size = 0, 0

    def reserve(self, size: int) -> int:
        if size > self.size:
            self.free()
            self.address, self.size = int(_cuda("cudaMalloc", size)), size
        return self.address

    def free(self) -> None:
        if self.address:
            _cuda("cudaFree", self.address)
        self.address, self.size = 0, 0


class _Device:
    """What all sessions share: the stream, the scratch memory, the runtime, and a lock over them."""

    def __init__(self) -> None:
        import tensorrt as trt

        self.lock = threading.Lock()
        self.scratch = _Memory()
        self.stream = _cuda("cudaStreamCreate")
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.runtime = trt.Runtime(self.logger)
        self.timing = b""


class TensorRtSession:
    """One plan with its execution context and its buffers."""

    def __init__(self, device: _Device, plan: bytes, graph: str, prepare: Callable[[Any], None]) -> None:
        import tensorrt as trt

        self._device, self._plan, self._graph = device, plan, graph
        engine = device.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"tensorrt could not read the plan of {graph}; build again")
        prepare(engine)
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
        self._buffers = {name: _Memory() for name in [*self._inputs, *self._outputs]}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        if feeds.keys() != self._inputs.keys():  # a missing one would keep what the last run was given
            raise EngineError(f"expected the inputs {sorted(self._inputs)}; found {sorted(feeds)}")
        with self._device.lock:
            return self._run(feeds)

    def _run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        context, stream, kinds = self._context, self._device.stream, _cudart().cudaMemcpyKind
        held = {name: np.ascontiguousarray(feeds[name], dtype=kind) for name, kind in self._inputs.items()}
        for name, array in held.items():
            if not context.set_input_shape(name, tuple(array.shape)):
                shapes = {name: value.shape for name, value in feeds.items()}
                raise EngineError(
                    f"tensorrt could not run inputs {shapes} on {self._graph}: {name} is outside what it was built for; build "
                    "again with --batch"
                )
            address = self._buffers[name].reserve(max(array.nbytes, 1))
            self._bind(name, address)
            _cuda("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kinds.cudaMemcpyHostToDevice, stream)
        if missing := context.infer_shapes():
            raise EngineError(f"tensorrt does not know the shapes of {', '.join(missing)} of {self._graph}")
        found = {name: np.empty(tuple(context.get_tensor_shape(name)), kind) for name, kind in self._outputs.items()}
        for name, array in found.items():
            self._bind(name, self._buffers[name].reserve(max(array.nbytes, 1)))
        size = int(self._engine.device_memory_size_v2)
        if size:
            context.set_device_memory(self._device.scratch.reserve(size), size)
        if not context.execute_async_v3(int(stream)):
            raise EngineError(f"tensorrt could not run {self._graph}")
        for name, array in found.items():
            source = self._buffers[name].address
            _cuda("cudaMemcpyAsync", array.ctypes.data, source, array.nbytes, kinds.cudaMemcpyDeviceToHost, stream)
        _cuda("cudaStreamSynchronize", stream)
        return list(found.values())

    def _bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"tensorrt did not take the memory for {name} of {self._graph}")

    def save(self, directory: Path, graph: str) -> None:
        stem = PurePosixPath(graph).stem
        (directory / f"{stem}.plan").write_bytes(self._plan)
        (directory / f"{stem}.layers.json").write_text(self._inspect(), encoding="utf-8")

    def _inspect(self) -> str:
        """The layers of the plan, in JSON."""
        import tensorrt as trt

        found: str = self._engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        return found


class TensorRtProfiledSession(TensorRtSession):
    """A session whose context tells the times of its layers after every run."""

    def __init__(self, device: _Device, plan: bytes, graph: str, prepare: Callable[[Any], None]) -> None:
        super().__init__(device, plan, graph, prepare)
        kinds = _kinds(self._inspect())
        self._profiler = _profiler(kinds)
        self._context.profiler = self._profiler

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
        self._shared: _Device | None = None

    def version(self) -> str:
        return str(getattr(package(), "__version__", None) or metadata.version("tensorrt-cu13"))

    def devices(self) -> list[str]:
        try:
            return ["cuda"] if _cuda("cudaGetDeviceCount") else []
        except EngineError:  # no driver, no device
            return []

    def machine(self, device: str, options: Mapping[str, Any]) -> str:
        level = of(OPTIONS, options)["hardware_compatibility"]
        properties = _cuda("cudaGetDeviceProperties", 0)
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
    ) -> tuple[_Device, bytes, str, Callable[[Any], None]]:
        """What makes a session: the stored plan or a new one, and what its engine wants before its first context."""
        package()
        if device not in self.devices():
            raise EngineError(f"expected a device out of {', '.join(self.devices()) or 'none'} for tensorrt; found {device!r}")
        if self._shared is None:
            self._shared = _Device()
        shared, source, own = self._shared, bundle.file(graph), of(OPTIONS, options)
        path = None if built is None else built / f"{PurePosixPath(graph).stem}.plan"
        stored = path is not None and path.is_file()
        plan = path.read_bytes() if path and stored else build_plan(shared, source, graph, options, report)

        def prepare(engine: tensorrt.ICudaEngine) -> None:
            if own["strip"] == "on":
                _fill(engine, shared.logger, source, graph)
            if own["weight_streaming"] == "on":
                _stream(engine, own["weight_streaming_budget"], graph)

        return shared, plan, graph, prepare


BACKEND = TensorRtBackend()
