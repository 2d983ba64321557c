"""Memory of a GPU, one stream, and whole loops captured in CUDA graphs, through ``cuda.bindings``.

A captured graph freezes what it was captured with: shapes, addresses and the kernels' arguments. So each set of shapes has a
take of its own, with buffers that nothing else uses. A loop runs as it is twice. Then every context is ready for these shapes
and every buffer is there, and it is captured; from then on a sampling is a copy to the device, one launch, and a copy back.
What cannot be captured goes on running as it is, and the device's notes say why.

Capturing: CUDA C++ Programming Guide, "CUDA Graphs", and TensorRT's guide to performance, "CUDA Graphs".
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.engines.device import DeviceArray, Function, Pool
from mteo_deploy.errors import EngineError, MissingPackageError

TAKES = 8
"""Sets of shapes for which a loop is kept, the last ones that were new."""


def cudart() -> Any:
    """Import the CUDA runtime's bindings, or say which extra to install."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingPackageError(
            f"the engine tensorrt needs cuda-bindings ({error}); run: pip install 'mteo-deploy[tensorrt]'"
        ) from None
    return runtime


def cuda(function: str, *args: Any) -> Any:
    """Call a function of the CUDA runtime; its result, if it has one.

    Raises:
        EngineError: when the call fails.
    """
    runtime = cudart()
    code, *result = getattr(runtime, function)(*args)
    if code != runtime.cudaError_t.cudaSuccess:
        raise EngineError(f"CUDA: {function} failed with {getattr(code, 'name', code)}")
    return result[0] if result else None


class NotCapturedError(EngineError):
    """Something that a CUDA graph cannot hold; the message says what."""


class Block:
    """Device memory, freed with its last reference. Addresses are 256-byte aligned, as cudaMalloc's are."""

    def __init__(self, size: int) -> None:
        self.size, self.address = size, int(cuda("cudaMalloc", size))
        self._free = cuda  # a module may be gone before its objects are

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of a process there may be no driver any more
            self._free("cudaFree", self.address)


class Graph:
    """A captured graph, ready to be launched."""

    def __init__(self, graph: Any) -> None:
        self._executable = cuda("cudaGraphInstantiate", graph, 0)
        self._call = cuda

    def launch(self, stream: Any) -> None:
        cuda("cudaGraphLaunch", self._executable, stream)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._call("cudaGraphExecDestroy", self._executable)


class CudaDevice:
    """What all sessions share: a stream, memory, and a lock over them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held by a loop while its sessions take it again
        self.stream = cuda("cudaStreamCreate")
        self.scratch: Block | None = None
        self.capturing = False
        self.notes: list[str] = []
        self._pool: Pool[int, Block] = Pool(Block)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """An array whose buffer is of its own; what is in it is undefined."""
        size = max(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, 1)
        return DeviceArray(self._pool, size, shape, dtype, self._fetch)

    def put(self, array: NDArray[Any]) -> DeviceArray:
        with self.lock:
            found = self.empty(array.shape, array.dtype)
            self.copy_in(found, array)
        return found

    def copy_in(self, target: DeviceArray, array: NDArray[Any]) -> None:
        """Copy an array of the host into one of the device; it may be changed as soon as this returns."""
        if self.capturing:
            raise NotCapturedError("an array of the host is read within the loop")
        held, kind = np.ascontiguousarray(array), cudart().cudaMemcpyKind.cudaMemcpyHostToDevice
        cuda("cudaMemcpyAsync", target.buffer.address, held.ctypes.data, held.nbytes, kind, self.stream)

    def fetch(self, arrays: list[Any]) -> list[NDArray[Any]]:
        """Arrays as numpy arrays: all copies, then one synchronisation."""
        with self.lock:
            found = [self._copy_out(one) if isinstance(one, DeviceArray) else np.asarray(one) for one in arrays]
            cuda("cudaStreamSynchronize", self.stream)
        return found

    def _copy_out(self, array: DeviceArray) -> NDArray[Any]:
        return self._out(array.buffer, array.shape, array.dtype)

    def _fetch(self, buffer: Block, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        with self.lock:
            found = self._out(buffer, shape, dtype)
            cuda("cudaStreamSynchronize", self.stream)
        return found

    def _out(self, buffer: Block, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        if self.capturing:
            raise NotCapturedError("an array of the device is read by the host within the loop: images go in parts")
        found, kind = np.empty(shape, dtype), cudart().cudaMemcpyKind.cudaMemcpyDeviceToHost
        cuda("cudaMemcpyAsync", found.ctypes.data, buffer.address, found.nbytes, kind, self.stream)
        return found

    def scratch_of(self, size: int) -> int:
        """Address of at least so much memory, for whatever runs now. A larger block takes the place of a smaller one, which
        stays as long as a captured graph refers to it."""
        if self.scratch is None or self.scratch.size < size:
            self.scratch = Block(size)
        return self.scratch.address

    @contextlib.contextmanager
    def using(self, pool: Pool[int, Block]) -> Iterator[None]:
        """Arrays that are made inside come from another pool."""
        with self.lock:
            before, self._pool = self._pool, pool
            try:
                yield
            finally:
                self._pool = before

    def capture(self, function: Callable[[], list[Any]]) -> tuple[Graph, list[Any]]:
        """What ``function`` puts on the stream, as a graph, and what it returned. Nothing of it has run.

        Raises:
            EngineError: when it does what cannot be captured.
        """
        mode = cudart().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads' calls do no harm
        cuda("cudaStreamBeginCapture", self.stream, mode)
        self.capturing = True
        try:
            outputs = function()
        except BaseException:
            self.capturing = False
            with contextlib.suppress(EngineError):
                cuda("cudaGraphDestroy", cuda("cudaStreamEndCapture", self.stream))
            cudart().cudaGetLastError()  # or the next call would report what failed in here
            raise
        self.capturing = False
        graph = cuda("cudaStreamEndCapture", self.stream)
        try:
            return Graph(graph), outputs
        finally:
            cuda("cudaGraphDestroy", graph)

    def record(self, function: Function) -> Recorded:
        return Recorded(self, function)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            cuda("cudaStreamDestroy", self.stream)


class Recorded:
    """A loop, as a function from numpy to numpy, with one take for each set of shapes."""

    def __init__(self, device: CudaDevice, function: Function) -> None:
        self._device, self._function = device, function
        self.takes: dict[tuple[Any, ...], Take] = {}

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        key = tuple((name, array.shape, array.dtype.str) for name, array in feeds.items())
        with self._device.lock:
            if key not in self.takes:
                while len(self.takes) >= TAKES:
                    del self.takes[next(iter(self.takes))]
                self.takes[key] = Take(self._device, self._function)
            return self.takes[key](feeds)


class Take:
    """A loop at one set of shapes: run, captured when it comes again, launched from then on."""

    def __init__(self, device: CudaDevice, function: Function) -> None:
        self._device, self._function = device, function
        self._pool: Pool[int, Block] = Pool(Block)
        self._inputs: dict[str, DeviceArray] = {}
        self._graph: Graph | None = None
        self._frozen: tuple[list[Any], Block | None] = [], None
        self._refused = False

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        device, again = self._device, bool(self._inputs)
        with device.using(self._pool):
            if not again:
                self._inputs = {name: device.put(array) for name, array in feeds.items()}
            for name, array in feeds.items() if again else ():
                device.copy_in(self._inputs[name], array)
            if self._graph is not None:
                self._graph.launch(device.stream)
                return device.fetch(self._frozen[0])
            found = device.fetch(self._function(self._inputs))
            if again and not self._refused:
                self._capture()
            return found

    def _capture(self) -> None:
        device = self._device
        try:
            self._graph, outputs = device.capture(lambda: self._function(self._inputs))
        except EngineError as error:
            self._refused = True
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in self._inputs.items())
            device.notes.append(f"loop not captured in a CUDA graph for {shapes}: {error}")
            return
        self._frozen = outputs, device.scratch
