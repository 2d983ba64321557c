"""Who uses what a session holds: so many threads at once, nobody after it was closed, no process but the one that opened it.

Engines differ in what threads may share (docs/engines.md has the table), and agree in two things. What is freed while a native
call reads it ends the process, so closing waits. And threads do not come along into a forked child: a call there would wait for
worker threads that are not there, and so may freeing.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Generic, TypeVar

from mteo_deploy.engines.device import closed
from mteo_deploy.errors import EngineError

T = TypeVar("T")
R = TypeVar("R")
LOOK = 0.5
"""Seconds after which one that waits looks whether those it waits for are still there."""
_ALIVE: weakref.WeakSet[Turns[Any]] = weakref.WeakSet()


class Turns(Generic[T]):
    """Things of a session that a thread has for itself while it uses one. One is made at once.

    Args:
        make: makes one more, where all are in use.
        most: how many there may be; the next thread waits then. None for any number.
        refuse: the error for who comes after :meth:`close`.
    """

    def __init__(self, make: Callable[[], T], most: int | None = None, refuse: Callable[[], EngineError] = closed) -> None:
        self._make, self._most, self._refuse = make, most, refuse
        self._changed = threading.Condition()
        self._free: list[T] = [make()]
        self._used: dict[int, tuple[T, int]] = {}  # by thread: what it uses, and how many calls deep
        self._closed = False
        self._process = os.getpid()
        _ALIVE.add(self)

    def run(self, function: Callable[[T], R]) -> R:
        """Call ``function`` with a thing that no other thread has meanwhile.

        Raises:
            EngineError: after :meth:`close`, and in a process that was forked from the one that opened it.
        """
        thing = self._enter()
        try:
            return function(thing)
        finally:
            self._leave()

    def close(self) -> bool:
        """Let nobody in any more, and wait until everybody is out; False where nothing may be freed, as in a forked child.

        Raises:
            EngineError: when the calling thread itself is inside, as the handler of a signal may be.
        """
        if os.getpid() != self._process:
            return False
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._count():
                if threading.get_ident() in self._used:
                    raise EngineError("expected close() outside of a call; found it inside of one; call it when that returned")
                self._changed.wait(LOOK)
            self._free.clear()
            self._make = _nothing  # it may refer to what is to be freed now
        return True

    def _enter(self) -> T:
        if os.getpid() != self._process:
            raise EngineError(
                f"expected a session of this process; found one that process {self._process} opened before it forked; load the "
                "sampler in the child: Sampler.load(...)"
            )
        thread = threading.get_ident()
        with self._changed:
            while not self._closed:
                if (
                    thread in self._used
                ):  # a signal's handler calls in the middle of a call; or Ctrl-C came before the end of one
                    thing, depth = self._used[thread]
                    self._used[thread] = thing, depth + 1 if self._is_in(sys._getframe(2)) else 1
                    return thing
                if not self._free and (self._most is None or len(self._used) < self._most):
                    self._free.append(self._make())
                if self._free:
                    self._used[thread] = self._free.pop(), 1
                elif self._count() == self._most:
                    self._changed.wait(LOOK)
                if thread in self._used:
                    return self._used[thread][0]
            raise self._refuse()

    def _leave(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            thing, depth = self._used[thread]
            if depth > 1:
                self._used[thread] = thing, depth - 1
                return
            self._free.append(thing)
            del self._used[thread]
            self._changed.notify_all()

    def _count(self) -> int:
        """How many threads are inside. Ctrl-C at the edge of a call leaves one that is not: it is put out here."""
        if self._used:
            frames = sys._current_frames()
            for thread in [thread for thread in self._used if not self._is_in(frames.get(thread))]:
                self._free.append(self._used.pop(thread)[0])
            frames.clear()  # this frame is one of them, and would hold all that its callers hold
        return len(self._used)

    def _is_in(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code is Turns.run.__code__ and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False

    def _leak(self) -> None:
        """In a forked child: keep what the engine made to the very end, for freeing it may wait for threads for ever."""
        for thing in (*self._free, *(thing for thing, _ in self._used.values())):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _nothing() -> Any:
    raise closed()


def _forked() -> None:
    for turns in list(_ALIVE):
        turns._leak()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
