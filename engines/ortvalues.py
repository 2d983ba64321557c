"""ONNX Runtime over memory of a device: OrtValues bound to sessions, CUDA graphs.

Every run binds the addresses of its inputs and outputs. Those addresses come from a pool, so a loop that runs again meets the
bindings of the last time. With CUDA graphs on, each binding is captured under an id of its own (``gpu_graph_id``) by ONNX
Runtime, which takes the first runs for its allocations; whatever does not fit under the limit runs without capture.

Sessions have a CUDA stream each, and a run ends with a synchronisation of its stream, ONNX Runtime's default: that is what
lets the next session read this one's outputs. The tests run all of this on OrtValues of the CPU.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.engines.device import DeviceArray, Function, Pool, Value, Values
from mteo_deploy.engines.live import stored
from mteo_deploy.engines.turns import Turns
from mteo_deploy.errors import EngineError
from mteo_deploy.files import Scratch
from mteo_deploy.text import one_line

BINDINGS = 64
"""Bindings a session keeps: evaluations of a table times shapes it is run at. What comes on top is bound for one run."""

TYPES = {
    "float": np.float32,
    "float16": np.float16,
    "double": np.float64,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}
"""ONNX Runtime's names of element types."""

Kind = tuple[tuple[int, ...], str]


class OrtDevice:
    """Memory of a device that ONNX Runtime knows.

    Args:
        name: ``cuda`` or ``cpu``.
    """

    def __init__(self, onnxruntime: Any, name: str) -> None:
        self.onnxruntime, self.name = onnxruntime, name
        self.lock = threading.RLock()  # neither a pool nor a captured graph may be used by two threads at once
        self.pool: Pool[Kind, Any] = Pool(self._make)
        self.notes: list[str] = []

    def _make(self, kind: Kind) -> Any:
        shape, dtype = kind
        return self.onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self.name, 0)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        return DeviceArray(self.pool, (shape, dtype.name), shape, dtype, self._fetch)

    def put(self, array: NDArray[Any]) -> DeviceArray:
        with self.lock:
            found = self.empty(array.shape, array.dtype)
            found.buffer.update_inplace(np.ascontiguousarray(array).reshape(array.shape))
        return found

    def _fetch(self, buffer: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        with self.lock:
            return np.array(buffer.numpy())

    def record(self, function: Function) -> Callable[[Mapping[str, NDArray[Any]]], list[NDArray[Any]]]:
        """The loop with its arrays on the device; its sessions capture themselves."""

        def run(feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
            with self.lock:
                return [np.asarray(value) for value in function({name: self.put(array) for name, array in feeds.items()})]

        return run


class EngineFiles:
    """A directory for the files that a provider leaves of one graph, whose names begin with the graph's.

    Args:
        built: directory of a built engine, whose files of this graph are copied into it: a provider may alter them.
    """

    def __init__(self, stem: str, built: Path | None = None) -> None:
        self._stem, self._scratch = stem, Scratch("mteo-deploy-engine-")
        self.directory, self.close = self._scratch.path, self._scratch.close
        if built is not None:
            self._copy(built, self.directory)

    def save(self, directory: Path) -> None:
        self._copy(self.directory, directory)

    def _copy(self, source: Path, target: Path) -> None:
        for path in source.glob(f"{self._stem}_*"):
            if found := stored(source, path.name):
                shutil.copyfile(found, target / path.name)


class BoundSession:
    """One graph in an ``onnxruntime.InferenceSession`` whose inputs and outputs lie on a device.

    Args:
        graphs: whether ONNX Runtime captures CUDA graphs in this session.
        files: what the provider leaves for the next time.
    """

    def __init__(self, session: Any, device: OrtDevice, graphs: bool, files: EngineFiles | None = None) -> None:
        self._session, self.device, self._graphs, self._files = session, device, graphs, files
        self._turns: Turns[Any] = Turns(lambda: session)
        self._inputs = [value.name for value in session.get_inputs()]
        self._outputs = [(value.name, _dtype(value.type)) for value in session.get_outputs()]
        self._shapes: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        self._bindings: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def run(self, feeds: Values) -> list[Any]:
        return self._turns.run(lambda _: self._run_in_turn(feeds))

    def _run_in_turn(self, feeds: Values) -> list[Any]:
        if feeds.keys() != set(self._inputs):
            raise EngineError(f"expected the inputs {sorted(self._inputs)}; found {sorted(feeds)}")
        with self.device.lock:
            try:
                outputs = self._run([self._held(feeds[name]) for name in self._inputs])
            except Exception as error:  # onnxruntime's exceptions share no base of their own
                shapes = {name: value.shape for name, value in feeds.items()}
                raise EngineError(f"onnxruntime could not run inputs {shapes}: {one_line(error)}") from None
            stay = any(isinstance(value, DeviceArray) for value in feeds.values())
            return outputs if stay else [np.asarray(value) for value in outputs]

    def _held(self, value: Value) -> DeviceArray:
        return value if isinstance(value, DeviceArray) else self.device.put(value)

    def _run(self, inputs: list[DeviceArray]) -> list[DeviceArray]:
        key = tuple((value.shape, value.dtype.name) for value in inputs)
        if key not in self._shapes:
            self._shapes[key] = self._shapes_for(inputs)
        pairs = zip(self._shapes[key], self._outputs, strict=True)
        outputs = [self.device.empty(shape, dtype) for shape, (_, dtype) in pairs]
        self._session.run_with_iobinding(*self._binding(inputs, outputs))
        return outputs

    def _shapes_for(self, inputs: list[DeviceArray]) -> list[tuple[int, ...]]:
        """Shapes of the outputs, from a run that is not captured and whose outputs ONNX Runtime allocates."""
        binding = self._bound(inputs)
        for name, _ in self._outputs:
            binding.bind_output(name, self.device.name, 0)
        self._session.run_with_iobinding(binding, self._options(-1))
        return [tuple(value.shape()) for value in binding.get_outputs()]

    def _binding(self, inputs: list[DeviceArray], outputs: list[DeviceArray]) -> tuple[Any, Any]:
        key = tuple(value.buffer.data_ptr() for value in (*inputs, *outputs))
        if key in self._bindings:
            return self._bindings[key]
        binding, kept = self._bound(inputs), len(self._bindings) < BINDINGS
        for value, (name, _) in zip(outputs, self._outputs, strict=True):
            binding.bind_ortvalue_output(name, value.buffer)
        found = binding, self._options(len(self._bindings) + 1 if kept else -1)
        if kept:
            self._bindings[key] = found
        return found

    def _bound(self, inputs: list[DeviceArray]) -> Any:
        binding = self._session.io_binding()
        for name, value in zip(self._inputs, inputs, strict=True):
            binding.bind_ortvalue_input(name, value.buffer)
        return binding

    def _options(self, graph: int) -> Any:
        """Run options: which CUDA graph a run is (-1 for none)."""
        if not self._graphs:
            return None
        options = self.device.onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def save(self, directory: Path, graph: str) -> None:
        if self._files is not None:
            self._files.save(directory)

    def close(self) -> None:
        if not self._turns.close():
            return
        self._bindings.clear()
        self._session = None
        if self._files is not None:
            self._files.close()


def _dtype(name: str) -> np.dtype[Any]:
    """``tensor(float)`` -> float32."""
    kind = name.removeprefix("tensor(").removesuffix(")")
    if kind not in TYPES:
        raise EngineError(f"expected element types out of {', '.join(TYPES)}; found {name}; export again or report the graph")
    return np.dtype(TYPES[kind])
