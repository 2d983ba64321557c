"""Arrays in memory of an engine's own, which flow from session to session without a copy.

A session on the CPU takes and gives numpy arrays. A session with memory of its own (a GPU's) takes both kinds, and gives
its outputs where its inputs are: on the device as soon as one of them lies there, else as numpy arrays. So a loop over
sessions is the same code everywhere, and whoever puts its first state on the device keeps all of it there.

Buffers are made once. An array's buffer goes back to its pool with the last reference to the array, and the pool hands out the
first one that is free: no run overwrites what somebody still reads, and a loop that runs again meets the same addresses, which
is what a captured CUDA graph needs.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import EngineError

Buffer = TypeVar("Buffer")
Kind = TypeVar("Kind", bound=Hashable)


class Pool(Generic[Kind, Buffer]):
    """Buffers that are used again.

    Args:
        make: makes a buffer of a kind, where none is free.
    """

    def __init__(self, make: Callable[[Kind], Buffer]) -> None:
        self._make = make
        self._buffers: dict[Kind, list[Buffer]] = {}
        self._free: dict[Kind, list[int]] = {}
        self._returned: deque[tuple[Kind, int]] = deque()  # an array may go at any moment: nothing else is done then

    def take(self, kind: Kind) -> tuple[int, Buffer]:
        """The first free buffer of a kind and its place."""
        while self._returned:
            returned, place = self._returned.popleft()
            heapq.heappush(self._free[returned], place)
        buffers, free = self._buffers.setdefault(kind, []), self._free.setdefault(kind, [])
        if not free:
            buffers.append(self._make(kind))
            return len(buffers) - 1, buffers[-1]
        place = heapq.heappop(free)
        return place, buffers[place]

    def give_back(self, kind: Kind, place: int) -> None:
        self._returned.append((kind, place))

    @property
    def size(self) -> int:
        """How many buffers there are, free ones included."""
        return sum(len(buffers) for buffers in self._buffers.values())


class DeviceArray:
    """An array on a device. ``numpy.asarray`` copies it to the host.

    Args:
        pool, kind: where its buffer comes from and goes back to.
        fetch: copies the buffer to the host: ``(buffer, shape, dtype) -> array``.
    """

    def __init__(
        self,
        pool: Pool[Any, Any],
        kind: Hashable,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        fetch: Callable[[Any, tuple[int, ...], np.dtype[Any]], NDArray[Any]],
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._pool, self._kind, self._fetch = pool, kind, fetch
        self._place, self.buffer = pool.take(kind)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("an array on a device cannot be read without a copy")
        found = self._fetch(self.buffer, self.shape, self.dtype)
        return found if dtype is None else found.astype(dtype)

    def __del__(self) -> None:
        if hasattr(self, "_place"):
            self._pool.give_back(self._kind, self._place)


Value: TypeAlias = NDArray[Any] | DeviceArray
Values = Mapping[str, Value]
Function = Callable[[Values], list[Any]]
"""What a loop is: named arrays to arrays, wherever they lie."""


class Device(Protocol):
    """Where the arrays of a session lie: ``session.device``, of sessions that have such memory.

    Attributes:
        notes: what does not run as one would expect it to, and why, e.g. a loop that could not be captured.
    """

    notes: list[str]

    def put(self, array: NDArray[Any]) -> Value:
        """The array where the device's sessions read it without a copy."""

    def record(self, function: Function) -> Callable[[Mapping[str, NDArray[Any]]], list[NDArray[Any]]]:
        """A loop over sessions of this device, as a function from numpy to numpy that stays on the device in between.

        The engine may capture what it runs and play it again from then on, for inputs of the same shapes; so the function must
        do the same for the same shapes, and nothing but run sessions.
        """


class Host:
    """The device of sessions that have none: numpy arrays are all there is."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def record(self, function: Function) -> Function:
        return function


HOST = Host()


def device_of(session: object) -> Device:
    """Where a session's arrays lie."""
    found: Device = getattr(session, "device", HOST)
    return found


def closed() -> EngineError:
    return EngineError("expected an open session; found one that was closed; load the sampler again: Sampler.load(...)")
