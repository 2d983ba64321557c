"""A cold start: one process that imports, opens a built engine and draws one batch, timed in a process of its own.

The operating system's file cache is warm, since the bundle has just been read; everything else is cold.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mteo_deploy.machine import in_fresh_process, peak_bytes, private_bytes

CODE = """
import time; start = time.perf_counter()
import sys
from mteo_deploy.cold_start import print_one
print_one(start, *sys.argv[1:])
"""


def one(bundle: Path, built: Path, realisation: str, batch: int) -> dict[str, Any]:
    """Start a process that samples once.

    Args:
        built: directory of the built engine.

    Returns:
        seconds ``process`` (from its start to its end), ``import``, ``load`` (check the bundle and open the engine) and
        ``first`` (draw the first batch), and ``peak_bytes`` and ``private_bytes`` after it, with those that importing took
        as ``peak_import`` and ``private_import``; None where the platform does not tell.
    """
    clock = time.perf_counter()
    found = in_fresh_process(CODE, bundle, built.name, realisation, batch)
    return {"process": time.perf_counter() - clock, **found}


def print_one(start: float, bundle: str, built: str, realisation: str, batch: str) -> None:
    """In that process: one line of JSON."""
    from mteo_deploy.bundle import Bundle
    from mteo_deploy.engines import backend, cache
    from mteo_deploy.sampler import Sampler

    backend(built.split("-", maxsplit=1)[0]).version()  # imports the engine's package
    imported, memory = time.perf_counter(), (peak_bytes(), private_bytes())
    opened = Bundle.open(bundle)
    sampler = Sampler.of(opened, cache.check(opened, opened.path / "engines" / built / cache.RECORD), realisation)
    loaded = time.perf_counter()
    sampler(num=int(batch), batch=int(batch), requests=opened.reference_requests(int(batch)))
    drawn = time.perf_counter()
    found: dict[str, float | None] = {"import": imported - start, "load": loaded - imported, "first": drawn - loaded}
    found |= {"peak_bytes": peak_bytes(), "private_bytes": private_bytes()}
    print(json.dumps({**found, "peak_import": memory[0], "private_import": memory[1]}))
