"""``build``: make a bundle's graphs ready in one engine, checked by running each once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy.bundle import Bundle, whole_directory
from mteo_deploy.engines import backend, cache
from mteo_deploy.errors import EngineError
from mteo_deploy.progress import reporter


def build(
    bundle: Bundle | Path | str,
    *,
    engine: str = "onnxruntime",
    device: str = "cpu",
    threads: int | None = None,
    quiet: bool = False,
) -> Path:
    """Build every graph of a bundle in an engine, run each once, and leave the built engine in the bundle.

    Args:
        threads: threads inside an operator; None for the engine's own choice.

    Returns:
        the directory of the built engine.

    Raises:
        BundleError: for a bundle that is not whole.
        MissingPackageError: when the engine's package is not installed.
        EngineError: when the engine refuses a graph or a graph's output is not finite.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    target = backend(engine)
    options: dict[str, Any] = {} if threads is None else {"threads": threads}
    parts = cache.key_parts(bundle, target, device, options)
    directory = cache.directory(bundle, parts)
    graphs = [*bundle.step_graphs, bundle.manifest["conditioned"]]
    opened = {}
    with reporter(quiet) as report:
        task = report.task(f"building {engine}", len(graphs))
        for entry in graphs:
            clock = time.monotonic()
            session = target.open(bundle, entry["graph"], device, options)
            feeds = {name: np.zeros(shape_of(name, bundle), np.float32) for name in entry["inputs"]}
            if not all(np.isfinite(output).all() for output in session.run(feeds)):
                raise EngineError(f"{entry['graph']} gives values that are not finite in {engine} for a zero input")
            opened[entry["graph"]] = round(time.monotonic() - clock, 4)
            report.advance(task, 1, entry["graph"])
    with whole_directory(directory, replace=cache.RECORD) as temporary:
        record = {"parts": parts, "key": cache.key(parts), "seconds_to_open": opened}
        (temporary / cache.RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return directory


def shape_of(name: str, bundle: Bundle) -> tuple[int, ...]:
    """Shape of a graph input at batch 1."""
    return (1,) if name == "timestep" else (1, *bundle.sample_shape)
