"""Each realisation against ordinary time conditioning, interleaved, by batch size: medians, ratios, 95 % intervals.

Prints a table, then one JSON line. Sessions are opened as ``build`` and ``sample`` open them, with worker threads that stop
spinning when a run ends; else they would take the cores from the other side of an interleaved comparison.

    python benchmarks/latency.py bundle --batch 1 8 --seconds 30
    python benchmarks/latency.py bundle --engine openvino --precision bf16
    python benchmarks/latency.py bundle --lean           # ONNX Runtime with weights kept once against as build opens it
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
from memory import LEAN
from rich.console import Console
from rich.table import Table

from mteo_deploy import latency
from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import backend
from mteo_deploy.engines.base import Backend, Session
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.verification import measure


def open_graph(engine: Backend, bundle: Bundle, options: dict[str, Any], graph: str) -> Session:
    return engine.open(bundle, graph, engine.devices()[0], options)


def lean(engine: Backend, bundle: Bundle, options: dict[str, Any], name: str, batch: int, seconds: float) -> dict[str, Any]:
    """Whole loops of a realisation: with every weight once in memory, against as `build` opens it."""
    noise, requests = noise_for(bundle.sample_shape, 0, range(batch)), bundle.reference_requests(batch)
    a, b = (
        Sampler(bundle, functools.partial(open_graph, engine, bundle, every), name)
        for every in ({**options, "engine_options": LEAN}, options)
    )
    found = latency.compare(lambda: a.states(noise, requests), lambda: b.states(noise, requests), seconds=seconds)
    return {"batch": batch, "realisation": name, "lean": found.to_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=30.0, help="per batch size and realisation")
    parser.add_argument("--realisation", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, help="threads inside an operator")
    parser.add_argument("--lean", action="store_true", help="onnxruntime: each weight once in memory, against the default")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    bundle, engine, results = Bundle.open(args.bundle), backend(args.engine), []
    for batch in args.batch:
        options = {"precision": args.precision, "batch": [batch]} | ({"threads": args.threads} if args.threads else {})
        for name in args.realisation:
            if args.lean:
                results.append(lean(engine, bundle, options, name, batch, args.seconds))
                continue
            sampler = Sampler(bundle, functools.partial(open_graph, engine, bundle, options), name)
            results.append(measure(sampler, batch, args.seconds))
    table = Table("batch", "realisation", "compared", "A p50 ms", "B p50 ms", "A/B", "95 % interval", "pairs")
    names = {
        "step": "engine calls / conditioned",
        "sample": "sampling / conditioned",
        "loop": "loop / its engine calls",
        "lean": "lean / default",
    }
    for result in results:
        for key, name in names.items():
            if key not in result:
                continue
            c = result[key]
            interval = f"[{c['ratio_low']:.3f}, {c['ratio_high']:.3f}]"
            row = (name, f"{c['a_p50']:.2f}", f"{c['b_p50']:.2f}", f"{c['ratio']:.3f}", interval, str(c["pairs"]))
            table.add_row(str(result["batch"]), result["realisation"], *row)
    Console(width=120).print(table)
    versions = {"python": platform.python_version(), "numpy": np.__version__, args.engine: engine.version()}
    line = json.dumps(
        {
            "precision": args.precision,
            "results": results,
            "versions": versions,
            "cores": os.cpu_count(),
            "machine": platform.machine(),
        }
    )
    print(line)
    if args.output:
        args.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
