"""Image quality of bundles: Fréchet distance, recognisable share and error against the reference trajectory.

Three samplers run from the same noise in the same engine: MTEO (the bundle), plain (its plan, as it was before any of its
numbers was learned, on the backbone with ordinary time conditioning) and the reference trajectory. So what differs between
plain and MTEO is what was learned, and how far the reference is from the data is the backbone's own share of the distance.

Images are clipped to [-1, 1] before anything is measured: that is the image a user saves. The Fréchet distance is biased
upwards by finite samples, more so for fewer; compare figures of one ``--num`` and one classifier file only. The share
above 0.9 is the weaker figure: a classifier that only ever saw digits is sure of much that is none (it named every image of
a hardly trained backbone), so read it beside the distance, never alone. Results go to the JSON file after every bundle,
and a run with the same arguments goes on where the last one stopped.

    python benchmarks/quality.py --classifier classifier.safetensors --data mnist_test.npz --num 10000 -o result.json BUNDLE
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from train_backbone import load_images
from train_classifier import SIZE, Classifier, load, to_float

from mteo_deploy.bundle import MANIFEST, Bundle, sha256_file
from mteo_deploy.errors import MteoError
from mteo_deploy.progress import Reporter, reporter
from mteo_deploy.quality import Statistics, frechet_distance, gap_closed
from mteo_deploy.sampler import Sampler

Array = NDArray[np.float32]
SURE = 0.9


@torch.inference_mode()
def classify(classifier: Classifier, images: torch.Tensor, batch: int = 1000) -> tuple[Array, Array]:
    """Features ``[n, 128]`` and highest probability ``[n]`` of images ``[n, 1, 28, 28]``, uint8 or float in [-1, 1]."""
    features, confidence = [], []
    for chunk in images.split(batch):
        found = classifier.features(to_float(chunk) if chunk.dtype == torch.uint8 else chunk)
        features.append(found.numpy())
        confidence.append(classifier.head(found).softmax(1).amax(1).numpy())
    return np.concatenate(features), np.concatenate(confidence)


def measure(classifier: Classifier, images: Array, real: Statistics) -> dict[str, float]:
    """Fréchet distance to the real images and the share named with a probability above 0.9, of ``[n, 1, 28, 28]``."""
    features, confidence = classify(classifier, torch.from_numpy(images))
    return {"frechet": frechet_distance(Statistics.of(features), real), "sure": float((confidence > SURE).mean())}


def mean_squared_error(a: Array, b: Array) -> float:
    """Over all pixels of two equal shapes, on the scale of [-1, 1]."""
    return float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))


def digest(data: Any) -> str:
    """A short name for JSON data: equal data, equal name."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let ``save`` write a temporary sibling and rename it: a stopped run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    save(temporary)
    os.replace(temporary, path)


class Results:
    """The JSON file: the arguments it holds for, the figures of the real images, and one entry per finished bundle.

    Raises:
        SystemExit: when the file holds results of other arguments; they are not overwritten.
    """

    def __init__(self, path: Path, arguments: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"arguments": arguments, "real": {}, "bundles": []}
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                before, _ = found["arguments"], found["bundles"]
            except (ValueError, KeyError, TypeError):
                raise SystemExit(f"{path}: expected results of benchmarks/quality.py; found none; pass another -o") from None
            other = [k for k in sorted({*before, *arguments}) if before.get(k) != arguments.get(k)]
            if other:
                raise SystemExit(f"{path}: expected results of these arguments; {', '.join(other)} differ; pass another -o")
            self.data = found

    def entry(self, bundle: Bundle) -> dict[str, Any] | None:
        """What was measured for a bundle with this very manifest."""
        wanted = sha256_file(bundle.file(MANIFEST))
        return next((e for e in self.data["bundles"] if e["manifest_sha256"] == wanted), None)

    def save(self) -> None:
        write(self.path, lambda path: path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8"))


@dataclass
class Benchmark:
    """What is the same for every bundle."""

    classifier: Classifier
    real: Statistics
    num: int
    seed: int
    batch: int
    engine: str
    cache: Path
    bars: Reporter

    def sample(self, name: str, draw: Callable[..., Array]) -> tuple[Array, float]:
        """Images ``[num, 1, 28, 28]`` clipped to [-1, 1], and the seconds they took."""
        task, clock = self.bars.task(name, total=self.num), time.monotonic()
        images = draw(num=self.num, seed=self.seed, batch=self.batch, progress=lambda count: self.bars.advance(task, count))
        if not np.isfinite(images).all():
            raise SystemExit(f"{name}: expected finite images; found NaN or infinity; run: mteo-deploy verify BUNDLE")
        return images.clip(-1, 1), time.monotonic() - clock

    def reference(self, sampler: Sampler) -> Array:
        """The reference trajectory's images, kept beside the results: it costs most, and bundles may share it."""
        plan = sampler.reference_plan
        manifest = sampler.bundle.manifest
        made_by = [manifest["backbone"]["fingerprint"], manifest["precision"], self.engine]
        key = digest([*made_by, plan.to_json(), self.num, self.seed])
        path = self.cache.with_name(f"{self.cache.stem}.reference-{key}.npy")
        if not path.exists():
            name = f"reference ({len(plan.evaluations)} evaluations)"
            images, _ = self.sample(name, lambda **how: sampler.conditioned(plan, **how))
            write(path, lambda temporary: np.save(temporary, images))
        return np.load(path, allow_pickle=False)

    def run(self, sampler: Sampler, reference: Array) -> dict[str, Any]:
        """Measure MTEO, the plain solver and the reference images ``[num, 1, 28, 28]``."""
        bundle, plan = sampler.bundle, sampler.bundle.plan
        label = f"{len(plan.evaluations)} evaluations, {plan.solver}"
        mteo, mteo_seconds = self.sample(f"MTEO ({label})", sampler)
        plain, plain_seconds = self.sample(f"plain ({label})", lambda **how: sampler.conditioned(bundle.plain_plan, **how))
        found = {name: measure(self.classifier, images, self.real) for name, images in (("mteo", mteo), ("plain", plain))}
        for name, images, seconds in (("mteo", mteo, mteo_seconds), ("plain", plain, plain_seconds)):
            found[name] |= {"mse": mean_squared_error(images, reference), "seconds": round(seconds, 2)}
        found["reference"] = measure(self.classifier, reference, self.real)
        return {
            "bundle": bundle.path.resolve().name,
            "manifest_sha256": sha256_file(bundle.file(MANIFEST)),
            "evaluations": len(plan.evaluations),
            "steps": plan.steps,
            "solver": plan.solver,
            "schedule": plan.schedule,
            **found,
            "gap_closed": gap_closed(*(found[name]["frechet"] for name in ("plain", "mteo", "reference"))),
        }


def check_shared(first: Bundle, bundle: Bundle) -> None:
    """A shared reference must solve the same ODE between the same two noise levels from the same noise.

    Raises:
        SystemExit: when it does not.
    """
    ends = [(b.manifest["backbone"]["fingerprint"], b.plan.sigmas[0], b.plan.sigmas[-1]) for b in (first, bundle)]
    if ends[0] != ends[1]:
        raise SystemExit(f"{bundle.path}: expected the backbone and noise range of {first.path}; pass --reference each")


def table(entries: list[dict[str, Any]]) -> Table:
    """One row per bundle."""
    shown = Table(caption="Fréchet distance on classifier features: less is better. MSE against the reference trajectory.")
    names = ["evaluations", "solver", "Fréchet\nplain", "Fréchet\nMTEO", "Fréchet\nreference", "gap\nclosed"]
    names += ["> 0.9\nplain", "> 0.9\nMTEO", "> 0.9\nreference", "MSE\nplain", "MSE\nMTEO"]
    for name in names:
        shown.add_column(name, justify="left" if name == "solver" else "right", no_wrap=True)
    for e in entries:
        parts = [e[name] for name in ("plain", "mteo", "reference")]
        shown.add_row(
            str(e["evaluations"]),
            e["solver"],
            *(f"{part['frechet']:.3f}" for part in parts),
            "-" if e["gap_closed"] is None else f"{e['gap_closed']:.1%}",
            *(f"{part['sure']:.1%}" for part in parts),
            *(f"{part['mse']:.5f}" for part in parts[:2]),
        )
    return shown


def real_statistics(classifier: Classifier, sources: list[Path], seed: int) -> tuple[Statistics, dict[str, float]]:
    """Statistics of all images of the data, and figures of them: count, sure, ``halves`` (distance of two random halves)."""
    images = torch.cat([load_images(source, SIZE, 1) for source in sources])
    features, confidence = classify(classifier, images)
    order = np.random.default_rng(seed).permutation(len(features))
    halves = [Statistics.of(features[half]) for half in np.array_split(order, 2)]
    facts = {"count": len(features), "sure": float((confidence > SURE).mean()), "halves": frechet_distance(*halves)}
    return Statistics.of(features), facts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="bundle directory with a built engine")
    parser.add_argument("--classifier", type=Path, required=True, help="file that examples/train_classifier.py wrote")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="npz files of real images, uint8 [n, 28, 28]")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file; finished bundles in it are skipped")
    parser.add_argument("--num", type=int, default=10_000, help="images per sampler")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--reference",
        choices=("each", "first"),
        default="each",
        help="whose reference trajectory: each bundle's, or the first's",
    )
    args = parser.parse_args()
    if args.num < 2 or args.batch < 1:
        parser.error("expected --num of 2 or more and --batch of 1 or more")
    for source in args.data:
        if not source.is_file():
            parser.error(f"--data {source}: expected an npz file; found none (put another option between --data and BUNDLE)")
    return args


def arguments_of(args: argparse.Namespace, first: Bundle) -> dict[str, Any]:
    """What the figures depend on; files by content, so that results can be moved between machines."""
    return {
        **{name: getattr(args, name) for name in ("num", "batch", "seed", "engine", "device")},
        "classifier": sha256_file(args.classifier),
        "data": sorted(sha256_file(source) for source in args.data),
        "reference": args.reference
        if args.reference == "each"
        else digest([first.manifest[k] for k in ("backbone", "reference")]),
    }


def run(args: argparse.Namespace) -> Results:
    """Measure every bundle that the results do not hold yet."""
    classifier = load(args.classifier)
    bundles = [Bundle.open(path) for path in args.bundles]
    for bundle in bundles:
        if bundle.sample_shape != (1, SIZE, SIZE):
            raise SystemExit(f"{bundle.path}: expected samples (1, {SIZE}, {SIZE}); found {bundle.sample_shape}")
        if args.reference == "first":
            check_shared(bundles[0], bundle)
    results = Results(args.output, arguments_of(args, bundles[0]))
    real, results.data["real"] = real_statistics(classifier, args.data, args.seed)
    results.data["classifier_test_accuracy"] = classifier.test_accuracy
    with reporter() as bars:
        engine = f"{args.engine}-{args.device}"
        benchmark = Benchmark(classifier, real, args.num, args.seed, args.batch, engine, args.output, bars)
        for bundle in bundles:
            if results.entry(bundle) is None:
                sampler = Sampler.load(bundle.path, engine=args.engine, device=args.device)
                owner = bundles[0] if args.reference == "first" else bundle
                source = sampler if owner is bundle else Sampler.load(owner.path, engine=args.engine, device=args.device)
                results.data["bundles"].append(benchmark.run(sampler, benchmark.reference(source)))
                results.save()
    return results


def main() -> None:
    args = parse()
    try:
        results = run(args)
    except MteoError as error:
        raise SystemExit(str(error)) from None
    Console(width=max(Console().width, 128)).print(table(results.data["bundles"]))
    real = results.data["real"]
    print(f"real images: {real['count']}, > 0.9 {real['sure']:.1%}, Fréchet distance of two random halves {real['halves']:.4f}")
    print(json.dumps(results.data))


if __name__ == "__main__":
    main()
