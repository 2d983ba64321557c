"""Memory of the realisations in ONNX Runtime: what opening all evaluations costs against opening one.

Each case runs in a process of its own: it opens the graphs, runs every evaluation once at the given batch, and reports by
how much its private memory has grown since the engine was imported (Linux, `smaps_rollup`). Weights that are mapped from
the file and never copied are shared, not private. Cases repeat in turn; medians and the range are printed.

    python benchmarks/memory.py bundle --repeat 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mteo_deploy.machine import private_bytes

CASES = ("one evaluation", "baked", "table", "fused")
LEAN = {"prepacking": "off", "optimization": "extended"}
"""Also without the optimisations that bring weights into another layout, a copy of its own for every session."""
OPTIONS = {"default": {}, "arena of its own": {"arena": "own"}, "no prepacking": {"prepacking": "off"}, "lean": LEAN}


def measure(path: Path, case: str, config: dict[str, str], batch: int) -> int:
    """Open and run one case in this process; bytes grown."""
    import numpy as np

    from mteo_deploy.bundle import Bundle
    from mteo_deploy.engines import backend
    from mteo_deploy.sampler import Sampler

    bundle, engine = Bundle.open(path), backend("onnxruntime")
    engine.version()
    options = {"engine_options": config}
    state = np.zeros((batch, *bundle.sample_shape), np.float32)
    before = private_bytes()
    if before is None:
        raise SystemExit("expected Linux, which tells a process's private memory; found another platform")
    if case == "one evaluation":
        session = engine.open(bundle, bundle.step_graphs[0]["graph"], "cpu", options)
        session.run({"state": state})
    else:
        sampler = Sampler(bundle, lambda graph: engine.open(bundle, graph, "cpu", options), case)
        sampler.states(state, bundle.reference_requests(batch))
    return (private_bytes() or 0) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.case:
        case, option = args.case.split("/")
        print(measure(args.bundle, case, OPTIONS[option], args.batch))
        return
    found: dict[tuple[str, str], list[int]] = {(case, option): [] for option in OPTIONS for case in CASES}
    for _ in range(args.repeat):
        for (case, option), sizes in found.items():
            command = [sys.executable, __file__, str(args.bundle), "--batch", str(args.batch), "--case", f"{case}/{option}"]
            sizes.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    table = Table("options", "opened", "MB, median", "range", "against one evaluation")
    results = []
    for (case, option), sizes in found.items():
        median = statistics.median(sizes)
        ratio = median / statistics.median(found["one evaluation", option])
        span = f"{min(sizes) / 1e6:.1f} to {max(sizes) / 1e6:.1f}"
        table.add_row(option, case, f"{median / 1e6:.1f}", span, f"{ratio:.2f}")
        results.append({"options": option, "opened": case, "bytes": sizes, "median": median, "ratio": ratio})
    Console(width=120).print(table)
    line = json.dumps({"batch": args.batch, "results": results})
    print(line)
    if args.output:
        args.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
