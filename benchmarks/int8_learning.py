"""Does learning against the quantised backbone help? Fréchet distance and error in int8, before and after.

For each step count the packaged embedding set is exported in float32 and in int8, then learned for some more iterations twice
from there, from the teacher that it had: once against the int8 network (`distill --precision int8`) and once, with the same
budget and seed, against the float32 one. Both are exported in int8. The second tells what more training alone would have done.
All are sampled from the same noise in the same engine. A figure is a line of the OUTPUT file, so a stopped run loses at most
one; sets and bundles are kept under WORK.

    python benchmarks/int8_learning.py DATA --work runs/int8 -o int8.jsonl      # DATA/mnist_test.npz
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quality import load, mean_squared_error, measure, real_statistics
from results import CLASSIFIER
from rich.console import Console

from mteo_deploy import assets
from mteo_deploy.bundle import sha256_file
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.engines.build import build
from mteo_deploy.exporters.export import export
from mteo_deploy.numerics import relative_error
from mteo_deploy.sampler import Sampler, noise_for

Array = NDArray[np.float32]
VARIANTS = {
    "fp32": ("packaged", "fp32"),
    "int8": ("packaged", "int8"),
    "int8, learned on in float32": ("fp32", "int8"),
    "int8, learned on in int8": ("int8", "int8"),
}
"""What is measured -> which set, and the precision of the graphs; the others are compared with the first."""


def packaged_id(count: int) -> str:
    """Which set a figure is of: another one is another figure."""
    return sha256_file(assets.embeddings(count))[:12]


def embeddings(args: argparse.Namespace, count: int, which: str) -> Path:
    packaged = assets.embeddings(count)
    if which == "packaged":
        return packaged
    path: Path = args.work / "sets" / f"{which}-{count}-{packaged_id(count)}.safetensors"
    if not path.exists():
        found = EmbeddingSet.load(packaged)
        merged = found.training.get("merged")
        before = (merged[-1]["training"] if merged else found.training)["recipe"]
        recipe = Recipe(
            args.trajectories,
            args.iterations,
            args.batch,
            args.lr,
            teacher=before["teacher"],
            teacher_evaluations=before["teacher_evaluations"],
            loss=before["loss"],
            learn=tuple(before["learn"]),
            precision=which,
        )
        plan = {"steps": count, "solver": found.plan.solver, "schedule": found.plain_plan.schedule}
        distill(assets.MODEL, path, **plan, recipe=recipe, init=packaged, cache=args.cache)
    return path


def bundle(args: argparse.Namespace, count: int, which: str, precision: str) -> Path:
    path: Path = args.work / "bundles" / f"{which}-{precision}-{count}-{packaged_id(count)}"
    if not path.exists():
        made = {"precision": precision, "realisations": ("baked",), "quiet": True}
        export(path, embeddings=embeddings(args, count, which), **made)
        build(path, engine=args.engine, realisation="baked", quiet=True)
    return path


def draw(sampler: Sampler, args: argparse.Namespace, num: int, plan: Any = None) -> Array:
    """Images ``[num, 1, 28, 28]`` of the seed; by ordinary conditioning where a plan is given."""
    shape, parts = tuple(sampler.bundle.manifest["backbone"]["sample_shape"]), []
    for start in range(0, num, args.sample_batch):
        noise = noise_for(shape, args.seed, range(start, min(start + args.sample_batch, num)))
        parts.append(sampler.image(noise) if plan is None else sampler.conditioned_states(plan, noise)[-1])
    return np.concatenate(parts).clip(-1, 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--compared", type=int, default=200, help="images of the reference trajectory, which cost most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trajectories", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--sample-batch", type=int, default=50)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--cache", type=Path, help="directory that keeps reference trajectories, as of `distill --cache`")
    parser.add_argument("--work", type=Path, default=Path("runs/int8"))
    parser.add_argument("-o", "--output", type=Path, default=Path("int8.jsonl"))
    return parser.parse_args()


def main() -> None:
    args, console = parse(), Console()
    classifier = load(CLASSIFIER)
    real, _ = real_statistics(classifier, [args.data / "mnist_test.npz"], 0)
    budget = {name: getattr(args, name) for name in ("trajectories", "iterations", "batch", "lr")}
    versions = {name: metadata.version(name) for name in ("mteo-deploy", "torch", args.engine)}
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    for count in args.counts:
        reference: Array | None = None
        exact: Array | None = None
        for variant, (which, precision) in VARIANTS.items():
            key = {"evaluations": count, "variant": variant, "num": args.num, "seed": args.seed, "engine": args.engine}
            key["embeddings"] = packaged_id(count)
            known = any({**key, "budget": budget}.items() <= row.items() for row in done)
            if known and exact is not None:
                continue
            sampler = Sampler.load(bundle(args, count, which, precision))
            clock = time.monotonic()
            images = draw(sampler, args, args.num)
            seconds = time.monotonic() - clock
            if exact is None or reference is None:
                exact, reference = images, draw(sampler, args, args.compared, sampler.reference_plan)
            if known:
                continue
            training = EmbeddingSet.load(embeddings(args, count, which)).training
            row = {
                **key,
                **measure(classifier, images, real),
                "error_against_reference": mean_squared_error(images[: args.compared], reference),
                "error_against_fp32": relative_error(images, exact),
                "image_seconds": round(seconds, 1),
                "training_seconds": 0.0 if which == "packaged" else training["seconds"],
                "held_out_error": [training.get("error_before"), training.get("error_after")],
                "budget": budget,
                "processor": platform.machine(),
                "versions": versions,
            }
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            console.print(
                f"{count} evaluations, {variant}: Fréchet distance {row['frechet']:.3f}, squared error against the reference "
                f"{row['error_against_reference']:.5f}, images differ by {row['error_against_fp32']:.3f} from float32"
            )


if __name__ == "__main__":
    main()
