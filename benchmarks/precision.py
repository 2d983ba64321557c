"""Precision x engine x backbone: time of a whole sampling, error of the images, bytes of the bundle.

A bundle is exported for each precision and built in each engine, with both hints where the engine has them; all of them sample
the same images in interleaved rounds of one run. Ratios are to two of them: fp32 graphs in OpenVINO computed in fp32, and in
bf16 (ONNX Runtime's fp32 where OpenVINO is not installed). Errors are against the stored torch reference. What an engine or a
backbone has no layers for is left out, with its reason. Prints a table, then one JSON line.

    python benchmarks/precision.py --steps 4 --batch 1 8 --seconds 60 -o benchmarks/results/precision-mnist-4.json
    python benchmarks/precision.py --random-dit --steps 4 --batch 1 8 --seconds 120 -o benchmarks/results/precision-dit-4.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from random_dit import random_dit
from rich.console import Console
from rich.table import Table

from mteo_deploy import assets, export, latency
from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import installed
from mteo_deploy.engines.base import Backend
from mteo_deploy.errors import MteoError
from mteo_deploy.numerics import image_error
from mteo_deploy.precision import NAMES, label
from mteo_deploy.sampler import Sampler, noise_for

AGAINST = ("fp32", "bf16")


@dataclass(frozen=True)
class Way:
    """A bundle opened in an engine: the types of its graphs, what the engine may compute in, and both in one word."""

    engine: str
    graphs: str
    hint: str
    precision: str
    sampler: Sampler
    error: float
    bytes: int

    @property
    def name(self) -> str:
        return f"{self.engine} {self.graphs}" + (", computed in bf16" if self.hint == "bf16" else "")


def exported(
    model: Path, steps: int, work: Path, precisions: list[str], realisation: str
) -> tuple[list[Bundle], dict[str, str]]:
    """A bundle for each precision, and why there is none for the others."""
    found, left_out = [], {}
    for name in precisions:
        try:
            made = {"steps": steps, "plain": model != assets.MODEL, "realisations": [realisation], "quiet": True}
            found.append(export(work / name, model=None if model == assets.MODEL else model, precision=name, **made))
        except MteoError as error:
            left_out[name] = str(error)
    return found, left_out


def opened(bundle: Bundle, batch: int, realisation: str, left_out: dict[str, str]) -> Iterator[Way]:
    """The bundle in every engine that runs it on the CPU, with each hint that the machine computes in."""
    graphs, size = bundle.manifest["precision"], sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    for engine in installed():
        for hint in engine.precisions:
            name = f"{engine.name} {label(graphs, hint)}"
            if "cpu" not in engine.devices() or (hint == "bf16" and "BF16" not in engine.machine("cpu", {})):
                continue
            if graphs not in engine.runs("cpu"):
                left_out[name] = f"{engine.name} has not every layer in {graphs} on the CPU"
                continue
            try:
                sampler = Sampler(
                    bundle, partial(open_graph, engine, bundle, {"precision": hint, "batch": [batch]}), realisation
                )
                yield Way(engine.name, graphs, hint, label(graphs, hint), sampler, image_error(sampler), size)
            except MteoError as error:
                left_out[name] = str(error)


def open_graph(engine: Backend, bundle: Bundle, options: dict[str, Any], graph: str) -> Any:
    return engine.open(bundle, graph, "cpu", options)


def measured(ways: list[Way], batch: int, seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Rounds through all ways: medians, and ratios with their 95 % intervals; and why not to trust them."""
    bundle = ways[0].sampler.bundle
    noise, requests = noise_for(bundle.sample_shape, 0, range(batch)), bundle.reference_requests(batch)
    rounds = latency.interleave([partial(way.sampler.image, noise, requests) for way in ways], seconds=seconds, rounds=2000)
    rows = []
    for i, way in enumerate(ways):
        ratios = {}
        for name in AGAINST:
            other = [j for j, one in enumerate(ways) if one.precision == name]
            if other:
                best = min(other, key=lambda j: rounds.medians[j])
                found = latency.bootstrap_median(rounds.times[:, i] / rounds.times[:, best])
                ratios[name] = dict(zip(("ratio", "low", "high"), found, strict=True), way=ways[best].name)
        rows.append(
            {
                "way": way.name,
                "p50": rounds.medians[i],
                "against": ratios,
                "error": way.error,
                "bytes": way.bytes,
                "batch": batch,
            }
        )
    return rows, rounds.doubts


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("batch", "way", "p50 ms", "time / fp32", "95 %", "time / bf16", "95 %", "images differ by", "MB")
    for row in rows:
        cells = [str(row["batch"]), row["way"], f"{row['p50']:.2f}"]
        for name in AGAINST:
            found = row["against"].get(name)
            cells += [f"{found['ratio']:.3f}", f"[{found['low']:.3f}, {found['high']:.3f}]"] if found else ["", ""]
        table.add_row(*cells, f"{row['error']:.1e}", f"{row['bytes'] / 1e6:.2f}")
    Console(width=128).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=assets.MODEL)
    parser.add_argument("--random-dit", action="store_true", help="a DiT-S with random weights instead of --model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=60.0, help="per batch size")
    parser.add_argument("--precision", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--realisation", default="baked", choices=["baked", "fused"], help="every precision has these")
    parser.add_argument("--work", type=Path, help="directory to leave the bundles in")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    rows, doubts, left_out = [], {}, dict[str, str]()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        model = random_dit(work / "dit") if args.random_dit else args.model
        bundles, left_out = exported(model, args.steps, work, args.precision, args.realisation)
        for batch in args.batch:
            ways = [way for bundle in bundles for way in opened(bundle, batch, args.realisation, left_out)]
            found, doubts[batch] = measured(ways, batch, args.seconds)
            rows += found
        lowered = {bundle.manifest["precision"]: bundle.manifest["compiler"].get("precision", {}) for bundle in bundles}
    show(rows)
    for name, why in left_out.items():
        print(f"{name} left out: {why}")
    for batch, found in doubts.items():
        print(*(f"batch {batch}: {doubt}" for doubt in found), sep="\n", end="\n" if found else "")
    versions = {engine.name: engine.version() for engine in installed()} | {"numpy": np.__version__}
    errors = {name: {key: told[key] for key in ("errors", "pooled") if key in told} for name, told in lowered.items()}
    line: dict[str, Any] = {"backbone": bundles[0].manifest["backbone"]["family"], "steps": args.steps, "results": rows}
    line |= {"lowering": errors, "left_out": left_out, "doubts": doubts, "versions": versions, "cores": os.cpu_count()}
    line |= {"machine": installed()[-1].machine("cpu", {}), "python": platform.python_version()}
    print(json.dumps(line))
    if args.output:
        args.output.write_text(json.dumps(line) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
