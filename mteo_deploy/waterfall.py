"""One sampling on a time axis: the prelude, every engine call, and what the host does in between."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mteo_deploy.engines.base import Session
from mteo_deploy.engines.device import Values
from mteo_deploy.requests import Arrays
from mteo_deploy.sampler import Array, Sampler

Span = tuple[str, float, float]
"""A graph's name, and when its run began and ended."""


class Timed:
    """A session that notes when its runs begin and end."""

    def __init__(self, graph: str, session: Session, notes: list[Span]) -> None:
        self.graph, self.session, self.notes = graph, session, notes

    def run(self, feeds: Values) -> list[Any]:
        start = time.perf_counter()
        outputs = self.session.run(feeds)
        self.notes.append((self.graph, start, time.perf_counter()))
        return outputs

    def save(self, directory: Path, graph: str) -> None:
        self.session.save(directory, graph)

    def close(self) -> None:
        self.session.close()


def record(sampler: Sampler, noise: Array, requests: Arrays, *, seconds: float = 1.0, loops: int = 21) -> dict[str, Any]:
    """Draw the same images again and again, with sessions of its own, and keep the sampling of the median time.

    Args:
        seconds: after which no further loop starts; at least three run, after a warm-up of three.
        loops: how many at most.

    Returns:
        plain data: ``milliseconds`` of the whole sampling, ``loops`` it is the median of, and ``calls``: for each engine call
        ``name``, ``start`` (milliseconds after the sampling began) and ``milliseconds``. The rest is the host's.
    """
    notes: list[Span] = []
    found: list[tuple[float, float, list[Span]]] = []
    with sampler.reopen(lambda graph, session: Timed(graph, session, notes)) as timed:
        for _ in range(3):
            timed.states(noise, requests)
        end = time.perf_counter() + seconds
        while len(found) < 3 or (len(found) < loops and time.perf_counter() < end):
            notes.clear()
            start = time.perf_counter()
            timed.states(noise, requests)
            found.append((time.perf_counter() - start, start, list(notes)))
    took, start, spans = sorted(found, key=lambda one: one[0])[len(found) // 2]
    calls = [
        {"name": name, "start": round((begun - start) * 1e3, 4), "milliseconds": round((ended - begun) * 1e3, 4)}
        for name, (_, begun, ended) in zip(_names(sampler, spans), spans, strict=True)
    ]
    return {"milliseconds": round(took * 1e3, 4), "loops": len(found), "calls": calls}


def _names(sampler: Sampler, spans: list[Span]) -> list[str]:
    """``prelude``, ``evaluation 0``, ...; one call for all evaluations is the fused loop, any other number is counted."""
    prelude = (sampler.bundle.manifest.get("prelude") or {}).get("graph")
    evaluations, steps = len(sampler.plan.evaluations), sum(graph != prelude for graph, *_ in spans)
    word = "evaluation" if steps == evaluations else "engine call"
    numbers = iter(range(steps))
    fused = sampler.loop.name == "fused" and steps == 1
    return ["prelude" if g == prelude else "fused loop" if fused else f"{word} {next(numbers)}" for g, *_ in spans]


def host_milliseconds(waterfall: Mapping[str, Any]) -> float:
    """The part of a sampling outside its engine calls."""
    return float(waterfall["milliseconds"] - sum(call["milliseconds"] for call in waterfall["calls"]))
