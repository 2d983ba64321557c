"""The scheme's cost: time to export N evaluations against one, and peak memory against the bytes of the weights.

Times alternate between the step counts, each export in a process of its own (model loading and tracing included). With
``--random PARAMETERS`` a UNet of about that size with random weights is made first and exported once, and the peak of the
process's resident memory is set against its weights in float32.

    python benchmarks/export_cost.py --steps 1 8 --repeat 5
    python benchmarks/export_cost.py --random 1e9 --steps 4 --repeat 1
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def make_random(path: Path, parameters: float) -> None:
    """A diffusers pipeline directory with a UNet2DModel of about ``parameters`` random numbers, in half precision."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    width = max(32, round((parameters / 113.7e6) ** 0.5 * 128 / 32) * 32)  # 113.7 M at 128: the size of published LSUN UNets
    with torch.device("meta"):
        network = UNet2DModel(
            sample_size=32,
            block_out_channels=(width, width, 2 * width, 2 * width, 4 * width, 4 * width),
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        )
    network = network.half().to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for value in network.parameters():
            value.normal_(std=0.02)
    DDPMPipeline(unet=network, scheduler=DDPMScheduler()).save_pretrained(path)


def export_once(steps: int, model: Path | None, output: Path) -> dict[str, float]:
    """Export in this process: seconds, and the peak of resident memory in bytes."""
    from mteo_deploy import export

    clock = time.monotonic()
    bundle = export(output, model=model, steps=steps, plain=True, quiet=True)
    seconds = time.monotonic() - clock
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak": peak, "parameters": bundle.manifest["backbone"]["parameters"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--random", type=float, help="parameters of a random UNet to export instead of the packaged backbone")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.case:
            print(json.dumps(export_once(args.case, args.model, Path(scratch) / "bundle")))
            return
        model = Path(scratch) / "model" if args.random else None
        if model:
            make_random(model, args.random)
        found: dict[int, list[dict[str, float]]] = {steps: [] for steps in args.steps}
        for _ in range(args.repeat):
            for steps, results in found.items():
                command = [sys.executable, __file__, "--case", str(steps), *(["--model", str(model)] if model else [])]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
    first = statistics.median(r["seconds"] for r in found[args.steps[0]])
    table = Table("steps", "seconds, median", "range", f"against {args.steps[0]}", "peak MB", "peak / weights")
    for steps, results in found.items():
        seconds, peak = [r["seconds"] for r in results], max(r["peak"] for r in results)
        median, weights = statistics.median(seconds), 4 * results[0]["parameters"]
        span = f"{min(seconds):.1f} to {max(seconds):.1f}"
        table.add_row(str(steps), f"{median:.1f}", span, f"{median / first:.2f}", f"{peak / 1e6:.0f}", f"{peak / weights:.2f}")
    Console(width=120).print(table)
    line = json.dumps({"results": found})
    print(line)
    if args.output:
        args.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
