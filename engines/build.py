"""``build``: make a bundle's graphs ready in one engine, checked by running each once, and pick a realisation by measuring."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy import latency
from mteo_deploy.bundle import Bundle, whole_directory
from mteo_deploy.engines import backend, cache
from mteo_deploy.engines.base import Session
from mteo_deploy.errors import EngineError, InputError
from mteo_deploy.progress import reporter
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import Sampler, noise_for

AUTO = "auto"


def build(
    bundle: Bundle | Path | str,
    *,
    engine: str = "onnxruntime",
    device: str = "cpu",
    realisation: str = AUTO,
    batch: int = 1,
    seconds: float = 2.0,
    threads: int | None = None,
    quiet: bool = False,
) -> Path:
    """Build a bundle in an engine, run each graph once, and leave the built engine in the bundle.

    Args:
        realisation: ``baked``, ``table``, ``fused``, or ``auto``: time those the bundle has and take the fastest.
        batch: images per engine call in that measurement.
        seconds: how long to measure.
        threads: threads inside an operator; None for the engine's own choice.

    Returns:
        the directory of the built engine.

    Raises:
        BundleError: for a bundle that is not whole.
        MissingPackageError: when the engine's package is not installed.
        EngineError: when the engine refuses a graph, a graph's output is not finite, or the bundle lacks the realisation.
        InputError: for a realisation, batch or time that does not exist.
    """
    if realisation not in (*NAMES, AUTO):
        raise InputError(f"expected --realisation out of {', '.join(NAMES)}, {AUTO}; found {realisation!r}")
    if batch < 1 or seconds <= 0:
        raise InputError(f"expected --batch of 1 or more and --seconds above 0; found {batch} and {seconds}")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    target = backend(engine)
    options: dict[str, Any] = {} if threads is None else {"threads": threads}
    parts = cache.key_parts(bundle, target, device, options)
    directory = cache.directory(bundle, parts)
    names = list(bundle.realisations) if realisation == AUTO else [realisation]
    opened: dict[str, float] = {}

    def open_graph(graph: str) -> Session:
        clock = time.monotonic()
        session = target.open(bundle, graph, device, options)
        opened[graph] = round(time.monotonic() - clock, 4)
        return session

    with reporter(quiet) as report:
        task = report.task(f"building {engine}", len(names) + 2)
        samplers = {}
        for name in names:
            samplers[name] = Sampler(bundle, open_graph, name)
            _check_loop(bundle, samplers[name])
            report.advance(task, 1, name)
        _check_conditioned(bundle, samplers[names[0]])
        report.advance(task, 1, "conditioned")
        chosen, measured = _choose(bundle, samplers, batch, seconds)
        report.advance(task, 1, "measuring")
    with whole_directory(directory, replace=cache.RECORD) as temporary:
        record = {
            "parts": parts,
            "key": cache.key(parts),
            "realisation": chosen,
            "measured": measured,
            "seconds_to_open": opened,
        }
        (temporary / cache.RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return directory


def _check_conditioned(bundle: Bundle, sampler: Sampler) -> None:
    """The baseline of every comparison opens and gives finite values."""
    entry = bundle.manifest["conditioned"]
    feeds = {"state": np.zeros((1, *bundle.sample_shape), np.float32), "timestep": np.zeros(1, np.float32)}
    outputs = sampler.conditioned_session.run({**feeds, **bundle.reference_requests(1)})
    if not all(np.isfinite(output).all() for output in outputs):
        raise EngineError(f"{entry['graph']} gives values that are not finite for a zero input; export again")


def _check_loop(bundle: Bundle, sampler: Sampler) -> None:
    """Every evaluation gives finite values for a zero state."""
    states = sampler.states(np.zeros((1, *bundle.sample_shape), np.float32), bundle.reference_requests(1))
    for i, state in enumerate(states):
        if not np.isfinite(state).all():
            raise EngineError(
                f"{sampler.loop.name}: evaluation {i} gives values that are not finite for a zero state; export again"
            )


def _choose(bundle: Bundle, samplers: dict[str, Sampler], batch: int, seconds: float) -> tuple[str, dict[str, Any]]:
    """The fastest realisation and what was measured: whole loops, each interleaved with the first one's."""
    first, *others = samplers
    if not others:
        return first, {}
    noise, requests = noise_for(bundle.sample_shape, 0, range(batch)), bundle.reference_requests(batch)

    def loop(name: str) -> Callable[[], object]:
        return lambda: samplers[name].states(noise, requests)

    ratios = {name: latency.compare(loop(name), loop(first), seconds=seconds / len(others)).to_json() for name in others}
    chosen = min(samplers, key=lambda name: ratios[name]["ratio"] if name in ratios else 1.0)
    return chosen, {"batch": batch, "against": first, "loops": ratios}
