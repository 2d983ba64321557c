"""Graphs made for certain batch sizes, run at any."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy.engines.base import Session
from mteo_deploy.engines.device import Values, closed, device_of

SHARED = ("timestep", "evaluation", "table")
"""Inputs that are the same for all images of a batch."""
MOST = 4
"""Sizes that a graph is made for without being told any."""


class BatchSizes:
    """Sessions for one batch size each, as a session for any: images go through in parts, the last one filled up.

    Args:
        sessions: batch size -> session.
    """

    def __init__(self, sessions: Mapping[int, Session]) -> None:
        self.sessions = dict(sorted(sessions.items()))
        self.device = device_of(next(iter(self.sessions.values())))

    def run(self, feeds: Values) -> list[Any]:
        """Run at any batch size; arrays on a device pass through, unless the images have to go in parts."""
        count = next(values.shape[0] for name, values in feeds.items() if name not in SHARED)
        if count in self.sessions:
            return self.sessions[count].run(feeds)
        split = {name: np.asarray(values) for name, values in feeds.items() if name not in SHARED}
        same = {name: np.asarray(values) for name, values in feeds.items() if name in SHARED}
        parts, start, largest = [], 0, max(self.sessions)
        while start < count:
            size = min((size for size in self.sessions if size >= count - start), default=largest)
            part = {name: values[start : start + size] for name, values in split.items()}
            missing = size - min(size, count - start)
            if missing:
                part = {name: np.concatenate([v, np.repeat(v[-1:], missing, axis=0)]) for name, v in part.items()}
            parts.append(self.sessions[size].run({**part, **same}))
            start += size
        return [np.concatenate(outputs)[:count] for outputs in zip(*parts, strict=True)]

    def save(self, directory: Path, graph: str) -> None:
        for session in self.sessions.values():
            session.save(directory, graph)

    def close(self) -> None:
        for session in self.sessions.values():
            session.close()


def at_any_size(session: Session, batch: int | str) -> Session:
    """A session of a graph that was exported for a batch size, or ``dynamic``, run at any."""
    return session if isinstance(batch, str) else BatchSizes({batch: session})


class SizesAsTheyCome:
    """A graph made for each number of images when it first comes, and for any number once there are :data:`MOST` of them.

    Each holds the weights; a graph for one image is made at once.

    Args:
        open_for: makes the graph for a number of images; None: for any.
    """

    def __init__(self, open_for: Callable[[int | None], Session]) -> None:
        self._open_for, self._lock, self._closed = open_for, threading.Lock(), False
        self._sessions: dict[int | None, Session] = {1: open_for(1)}

    def run(self, feeds: Values) -> list[Any]:
        count = next((values.shape[0] for name, values in feeds.items() if name not in SHARED), 1)
        return self._session(count).run(feeds)

    def _session(self, count: int) -> Session:
        known = self._sessions.get(count)
        if known is not None:  # which says itself when it was closed; another thread may be making one meanwhile
            return known
        with self._lock:
            if self._closed:
                raise closed()
            size = count if count in self._sessions or len(self._sessions) < MOST else None
            if size not in self._sessions:
                self._sessions[size] = self._open_for(size)
            return self._sessions[size]

    def save(self, directory: Path, graph: str) -> None:
        """Those that were made; others are made again where they are wanted."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.save(directory, graph)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for session in self._sessions.values():
                session.close()
