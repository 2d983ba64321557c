"""TensorRT 11 on an NVIDIA GPU.

Networks are strongly typed: a graph's own types are what is computed in, and TF32 is switched off. Each graph becomes one
plan, with one optimisation profile over the batch; plans and the inspector's view of their layers are the built engine's
files. Execution contexts never run at the same time here, so all of them share one block of scratch memory, and one stream;
arrays stay on the device from one to the next, and a whole sampling is captured in one CUDA graph (:mod:`~.cuda`).

Not run on a GPU yet: the tests hold every call against the real bindings of TensorRT 11.4, which import without a GPU.
"""

from __future__ import annotations

import platform
import weakref
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.base import Option, ProfiledSession, Session
from mteo_deploy.engines.cuda import CudaDevice, cuda
from mteo_deploy.engines.device import DeviceArray, Value, Values, closed
from mteo_deploy.errors import EngineError, MissingPackageError
from mteo_deploy.progress import Reporter

DEFAULT_BATCH = (1, 16)
OPTIONS: dict[str, Option] = {}
ROWS = (1, 4, 64)
"""Least, usual and greatest number of evaluations of a table."""


def _trt() -> Any:
    """Import tensorrt, or say which extra to install."""
    try:
        import tensorrt
    except ImportError as error:  # not ModuleNotFoundError: the package may be there without its libraries
        raise MissingPackageError(
            f"the engine tensorrt is not installed ({error}); run: pip install 'mteo-deploy[tensorrt]'"
        ) from None
    return tensorrt


class _Device(CudaDevice):
    """What all sessions share beside memory and stream: the runtime, and the times of layers built so far."""

    def __init__(self) -> None:
        super().__init__()
        trt = _trt()
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.runtime = trt.Runtime(self.logger)
        self.timing = b""


class TensorRtSession:
    """One plan with its execution context and its buffers."""

    def __init__(self, device: _Device, plan: bytes, graph: str) -> None:
        trt = _trt()
        self.device, self._plan, self._graph = device, plan, graph
        engine = device.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"tensorrt could not read the plan of {graph}; build again")
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

    def run(self, feeds: Values) -> list[Any]:
        if self._context is None:
            raise closed()
        if feeds.keys() != self._inputs.keys():  # a missing one would keep what the last run was given
            raise EngineError(f"expected the inputs {sorted(self._inputs)}; found {sorted(feeds)}")
        with self.device.lock:
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
        inspector = self._engine.create_engine_inspector()
        layers = inspector.get_engine_information(_trt().LayerInformationFormat.JSON)
        (directory / f"{stem}.layers.json").write_text(layers, encoding="utf-8")

    def close(self) -> None:
        self._context = self._engine = None


class TensorRtBackend:
    name = "tensorrt"
    extra = "tensorrt"
    precisions = ("fp32",)
    engine_options = OPTIONS

    def __init__(self) -> None:
        self._shared: Callable[[], _Device | None] = lambda: None

    def version(self) -> str:
        trt = _trt()
        return str(getattr(trt, "__version__", None) or metadata.version("tensorrt-cu13"))

    def devices(self) -> list[str]:
        try:
            return ["cuda"] if cuda("cudaGetDeviceCount") else []
        except EngineError:  # no driver, no device
            return []

    def machine(self, device: str, options: Mapping[str, Any]) -> str:
        properties = cuda("cudaGetDeviceProperties", 0)
        name = properties.name.decode() if isinstance(properties.name, bytes) else properties.name
        return f"{platform.machine()}, {name}, compute capability {properties.major}.{properties.minor}"

    def open(
        self,
        bundle: Bundle,
        graph: str,
        device: str,
        options: Mapping[str, Any],
        built: Path | None = None,
        report: Reporter | None = None,
    ) -> Session:
        _trt()
        if device not in self.devices():
            raise EngineError(f"expected a device out of {', '.join(self.devices()) or 'none'} for tensorrt; found {device!r}")
        shared = self._device()
        path = None if built is None else built / f"{PurePosixPath(graph).stem}.plan"
        if path is not None and path.is_file():
            return TensorRtSession(shared, path.read_bytes(), graph)
        return TensorRtSession(shared, self._build(shared, bundle, graph, options), graph)

    def _device(self) -> _Device:
        """The device that all open sessions share; it goes with the last of them."""
        device = self._shared()
        if device is None:
            device = _Device()
            self._shared = weakref.ref(device)
        return device

    def profile(self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], batch: int) -> ProfiledSession:
        raise EngineError(
            "tensorrt does not tell the times of its layers here yet; use trtexec --dumpProfile on the built plan"
        )

    @staticmethod
    def _build(device: _Device, bundle: Bundle, graph: str, options: Mapping[str, Any]) -> bytes:
        """Parse one graph and build its plan."""
        trt = _trt()
        builder = trt.Builder(device.logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, device.logger)
        if not parser.parse_from_file(str(bundle.file(graph))):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            found = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)
            raise EngineError(f"tensorrt could not parse {graph}: {found}; export again or report it")
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        timing = config.create_timing_cache(device.timing)  # the step graphs of a plan are the same layers
        if not config.set_timing_cache(timing, False):
            raise EngineError(f"tensorrt did not take its own timing cache for {graph}")
        profile = builder.create_optimization_profile()
        sizes = options.get("batch") or DEFAULT_BATCH
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            shape = tuple(tensor.shape)
            if -1 in shape:
                least, usual, most = ROWS if tensor.name == "table" else (min(sizes), max(sizes), max(sizes))
                fill = [tuple(count if size == -1 else size for size in shape) for count in (least, usual, most)]
                profile.set_shape(tensor.name, fill[0], fill[1], fill[2])
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(f"tensorrt could not build {graph}: no implementation was found, or the memory was not enough")
        device.timing = bytes(config.get_timing_cache().serialize())
        return bytes(plan)


BACKEND = TensorRtBackend()
