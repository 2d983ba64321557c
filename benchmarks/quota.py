"""A process with fewer processors than the machine: an engine's own number of threads against as many as it may use.

Run it where there is such a limit: in a container (`docker run --cpus 2`) or a scope (`systemd-run --scope -p CPUQuota=200%`).
Both ways sample in turn, a block of samplings each, with a pause before each in which the quota fills again.

    python benchmarks/quota.py bundle --engine onnxruntime --batch 1 8
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import backend
from mteo_deploy.latency import bootstrap_median
from mteo_deploy.processors import fewer_processors, in_words
from mteo_deploy.sampler import Sampler, noise_for


def block(sampler: Sampler, noise: np.ndarray, seconds: float) -> np.ndarray:
    """Milliseconds of each sampling in one block."""
    time.sleep(0.3)  # longer than a period of the quota
    times, end = list[float](), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        sampler.states(noise)
        times.append(1e3 * (time.perf_counter() - start))
    return np.asarray(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--realisation", default="table")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--all", type=int, help="threads of the other way [default: the machine's processors]")
    parser.add_argument("--blocks", type=int, default=10, help="of each way")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    few, every = fewer_processors(), args.all or os.cpu_count() or 1
    if few is None:
        parser.error(f"expected fewer processors than the machine has, by affinity or quota; found all {every}")
    bundle, engine = Bundle.open(args.bundle), backend(args.engine)

    def opened(threads: int, batch: int) -> Sampler:
        options = {"precision": "fp32", "threads": threads, "batch": [batch]}
        return Sampler(bundle, lambda graph: engine.open(bundle, graph, "cpu", options), args.realisation)

    rows = []
    for batch in args.batch:
        noise, ways = noise_for(bundle.sample_shape, 0, range(batch)), [opened(few, batch), opened(every, batch)]
        for way in ways:
            block(way, noise, 1.0)
        blocks = [[block(way, noise, args.seconds) for way in ways] for _ in range(args.blocks)]
        ratio, low, high = bootstrap_median(np.array([ours.mean() / theirs.mean() for ours, theirs in blocks]))
        both = {}
        for count, times in zip((few, every), zip(*blocks, strict=True), strict=True):
            p50, p99 = np.percentile(np.concatenate(times), (50, 99)).round(2).tolist()
            both[f"{count} threads"] = {"p50": p50, "p99": p99}
        row = {"engine": args.engine, "may use": in_words(), "batch": batch, "ratio": [round(x, 3) for x in (ratio, low, high)]}
        rows.append(row | {"milliseconds": both})
        print(f"{args.engine}, {in_words()}, batch {batch}: mean time {ratio:.3f} [{low:.3f}, {high:.3f}]; {both}")
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
