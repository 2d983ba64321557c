"""What the recipe's choices are worth: one ablation at a time from the defaults, at one budget, on held-out noise.

Every variant learns from the same reference trajectories (those of its own teacher and time points, kept beside the results)
for as many iterations of the same batches; the time they took is printed. The error is the mean squared distance of the
images from the default teacher's reference trajectory, from noise that no variant saw, with its standard error. Variants are
compared image by image: the difference from the defaults' error, with its own standard error; what another seed would change
beside is in the spread of ``--seeds``. With a classifier (``examples/train_classifier.py``) and real images the Fréchet
distance is measured too, on the same images; it is biased upwards by their finite number, so only figures of one ``--held-out``
compare; and of a backbone with class labels, drawn at random, the share of images that it gives the label that was asked for.
Finished variants are in the JSON file, and a run with the same arguments goes on.

    python benchmarks/ablations.py -o ablations.json --steps 3 4 5
    python benchmarks/ablations.py -o ablations.json --classifier classifier.safetensors --data mnist_test.npz --seeds 1 2 3
    python benchmarks/ablations.py -o dit.json --model mnist-dit --guidance-scale 2 --steps 4 --variants "absolute error" ...
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from quality import Statistics, classify, frechet_distance, load, real_statistics, write
from rich.console import Console
from rich.table import Table
from train_classifier import Classifier

from mteo_deploy import assets
from mteo_deploy.bundle import sha256_file
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.distillation.trajectories import Trajectories, reference_trajectories
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.guidance import guided
from mteo_deploy.plan import default_substeps, run

Images = torch.Tensor
HELD_OUT_SEED = 5_000_000

DEFAULTS = "per step and site (MTEO)"
DDIM_20 = {"teacher": "euler", "teacher_evaluations": 20}
COEFFICIENTS = {"learn": ("coefficients",)}
ABSOLUTE_2M = {"solver": "dpmpp-2m", "loss": "absolute", **DDIM_20}

VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULTS: {},
    "one vector per step": {"share": "step"},
    "one time per step": {"share": "time"},
    "step by step": {"objective": "stepwise"},
    "squared error": {"loss": "squared"},
    "absolute error": {"loss": "absolute"},
    "learned coefficients": COEFFICIENTS,
    "learned points": {"learn": ("points",)},
    "learned both": {"learn": ("points", "coefficients")},
    "iPNDM-2": {"solver": "ipndm-2"},
    "DPM-Solver++ 2M": {"solver": "dpmpp-2m"},
    "image alone": {"intermediate": 0.0},
    "features of the image": {"feature_weight": 0.3},
    "lr / 2.5": {"lr": 0.4},
    "lr x 2": {"lr": 2.0},
    "half the trajectories": {"trajectories": 0.5},
    "teacher: DPM-Solver-2": {"teacher": "dpm-solver-2"},
    "teacher: DDIM": {"teacher": "euler"},
    "teacher: DDIM, 20 evaluations": DDIM_20,
    "teacher: half the evaluations": {"teacher_evaluations": 18},
    "logSNR points": {"schedule": "logsnr"},
    "time-uniform points": {"schedule": "time-uniform"},
    "twice the trajectories": {"trajectories": 2.0},
    "teacher: twice the evaluations": {"teacher_evaluations": 72},
    "one vector, learned both": {"share": "step", "learn": ("points", "coefficients")},
    "one time, learned both": {"share": "time", "learn": ("points", "coefficients")},
    "squared error, learned both": {"loss": "squared", "learn": ("points", "coefficients")},
    "squared error, DPM-Solver++ 2M": {"solver": "dpmpp-2m", "loss": "squared"},
    "absolute error, DPM-Solver++ 2M": {"solver": "dpmpp-2m", "loss": "absolute"},
    "absolute error, teacher: DDIM, 20 evaluations": {"loss": "absolute", **DDIM_20},
    "absolute error, teacher: DDIM, 20 evaluations, learned coefficients": {"loss": "absolute", **DDIM_20, **COEFFICIENTS},
    "teacher: DDIM, 20 evaluations, learned coefficients": {**DDIM_20, **COEFFICIENTS},
    "DPM-Solver++ 2M, teacher: DDIM, 20 evaluations": {"solver": "dpmpp-2m", **DDIM_20},
    "DPM-Solver++ 2M, teacher: DDIM, 20 evaluations, learned coefficients": {"solver": "dpmpp-2m", **DDIM_20, **COEFFICIENTS},
    "absolute error, DPM-Solver++ 2M, teacher: DDIM, 20 evaluations": ABSOLUTE_2M,
    "absolute error, DPM-Solver++ 2M, teacher: DDIM, 20 evaluations, learned coefficients": {**ABSOLUTE_2M, **COEFFICIENTS},
    "one time, absolute error, DPM-Solver++ 2M, teacher: DDIM, 20 evaluations, learned coefficients": {
        "share": "time",
        **ABSOLUTE_2M,
        **COEFFICIENTS,
    },
    "features of the image, DPM-Solver++ 2M": {"solver": "dpmpp-2m", "feature_weight": 0.3},
    "iPNDM-2, learned both": {"solver": "ipndm-2", "learn": ("points", "coefficients")},
}
"""Name -> what differs from the defaults; ``lr`` and ``trajectories`` as factors on those."""


def arranged(variant: dict[str, Any], recipe: Recipe) -> tuple[dict[str, str], Recipe]:
    """Arguments of ``distill`` and the recipe of a variant."""
    plan = {name: variant[name] for name in ("solver", "schedule") if name in variant}
    changes = {name: value for name, value in variant.items() if name not in plan}
    if "lr" in changes:
        changes["lr"] *= recipe.lr
    if "trajectories" in changes:
        changes["trajectories"] = int(changes["trajectories"] * recipe.trajectories)
    return plan, replace(recipe, **changes)


@torch.no_grad()
def images(adapter: Adapter, found: EmbeddingSet, held_out: Trajectories, batch: int, plain: bool = False) -> Images:
    """What a set draws from the noise and requests held out; ``plain``: the plan as it was, with the pretrained embeddings."""
    plan = found.plain_plan if plain else found.plan
    base = adapter.embeddings(torch.tensor([e.timestep for e in plan.evaluations], dtype=torch.float32))
    deltas = [torch.from_numpy(found.deltas[site.name]) * (not plain) for site in adapter.sites]
    rows = [b + d for b, d in zip(base, deltas, strict=True)]

    def draw(part: Trajectories) -> Images:
        return list(run(plan, part.noise, lambda i, y: adapter(y, *[r[i : i + 1] for r in rows], **part.requests)))[-1]

    return torch.cat([draw(held_out.take(slice(i, i + batch))) for i in range(0, len(held_out.noise), batch)])


def mean(name: str, values: NDArray[np.float64]) -> dict[str, float]:
    """Mean and standard error under their names."""
    return {name: float(values.mean()), f"{name}_se": float(values.std(ddof=1) / math.sqrt(len(values)))}


class Laboratory:
    """What all variants share: backbone, held-out reference images, classifier, results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.console = args, Console(width=128)
        self.model = args.model or assets.MODEL
        self.adapter = guided(load_backbone(self.model), args.guidance_scale)
        self.work = args.output.with_suffix("")
        self.classifier: Classifier | None = load(args.classifier) if args.classifier else None
        self.taught_by: Classifier | None = load(args.features) if args.features else None
        self.real: Statistics | None = None
        facts: dict[str, Any] = {}
        if self.classifier is not None:
            self.real, facts = real_statistics(self.classifier, args.data, 0)
        self.held_out = self._held_out()
        self.reference = self.held_out.states[-1]
        self.data = self._open(facts)

    def _held_out(self) -> Trajectories:
        """Reference trajectories of noise that no variant learns from; their images depend on no step count."""
        plan = self.adapter.compile_plan(1)
        return reference_trajectories(
            self.adapter,
            plan,
            count=self.args.held_out,
            seed=HELD_OUT_SEED,
            batch=self.args.batch,
            substeps=default_substeps(plan),
            progress=lambda n: None,
            cache=self.work,
        )

    def _open(self, facts: dict[str, Any]) -> dict[str, Any]:
        args = self.args
        names = ("trajectories", "iterations", "batch", "lr", "bf16", "held_out", "guidance_scale")
        arguments = {name: getattr(args, name) for name in names}
        arguments["backbone"] = self.adapter.fingerprint()
        for name in ("classifier", "features"):
            path = getattr(args, name)
            arguments[name] = None if path is None else sha256_file(path)
        reference = self.figures(self.reference)
        if not args.output.exists():
            return {"arguments": arguments, "real": facts, "reference": reference, "rows": []}
        found: dict[str, Any] = json.loads(args.output.read_text(encoding="utf-8"))
        other = [name for name in arguments if found.get("arguments", {}).get(name) != arguments[name]]
        if other:
            raise SystemExit(f"{args.output}: expected results of these arguments; {', '.join(other)} differ; pass another -o")
        return found

    def save(self) -> None:
        write(self.args.output, lambda path: path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8"))

    def errors(self, found: Images) -> NDArray[np.float64]:
        """Mean squared difference from the reference, of every image."""
        return (found - self.reference).square().mean(dim=(1, 2, 3)).double().numpy()

    def figures(self, found: Images) -> dict[str, float]:
        """Error with its standard error; where there is a classifier, the Fréchet distance to the real images, and the share
        that it gives the label asked for."""
        figures = mean("error", self.errors(found))
        if self.classifier is not None and self.real is not None:
            features, _ = classify(self.classifier, found.clamp(-1, 1))
            figures["frechet"] = frechet_distance(Statistics.of(features), self.real)
            if (labels := self.held_out.requests.get("class_labels")) is not None:
                with torch.inference_mode():
                    named = self.classifier.head(torch.from_numpy(features)).argmax(1)
                figures["right"] = float((named == labels).float().mean())
        return figures

    def features(self, found: Images) -> Images:
        """For the variants that learn from them: another classifier's than that which measures."""
        assert self.taught_by is not None
        return self.taught_by.features(found.clamp(-1, 1))

    def measure(self, name: str, steps: int, seed: int) -> dict[str, Any]:
        """Learn one variant and measure it."""
        args = self.args
        default = Recipe(args.trajectories, args.iterations, args.batch, args.lr, bf16=args.bf16, seed=seed * 1_000_000)
        plan, recipe = arranged(VARIANTS[name], default)
        set_path = self._path(name, steps, seed)
        features = self.features if recipe.feature_weight else None
        found = distill(
            self.model,
            set_path,
            steps=steps,
            **plan,
            recipe=recipe,
            features=features,
            cache=self.work,
            device="cpu",
            guidance_scale=args.guidance_scale,
        )
        row = {"variant": name, "steps": steps, "seed": seed, "evaluations": len(found.plan.evaluations)}
        row |= {"numbers": found.training["parameters"], "seconds": found.training["seconds"]}
        row["threads"] = torch.get_num_threads()
        row |= {"recipe": asdict(recipe), "reference": found.training["reference"], "sigmas": list(found.plan.sigmas), **plan}
        row["plain"] = self.figures(images(self.adapter, found, self.held_out, args.batch, plain=True))
        drawn = images(self.adapter, found, self.held_out, args.batch)
        return row | self.figures(drawn) | self._against(steps, seed, drawn)

    def _path(self, name: str, steps: int, seed: int) -> Path:
        return self.work / f"{name.translate(str.maketrans(' :/', '---'))}-{steps}-{seed}.safetensors"

    def _against(self, steps: int, seed: int, drawn: Images) -> dict[str, float]:
        """The difference from the error of the defaults, image by image; empty where they have not been learned."""
        path = self._path(DEFAULTS, steps, seed)
        if not path.exists():
            return {}
        own = images(self.adapter, EmbeddingSet.load(path), self.held_out, self.args.batch)
        return mean("difference", self.errors(drawn) - self.errors(own))

    def run(self) -> None:
        """All variants, the first steps and seeds first; what is in the results already is left as it is."""
        done = {(row["variant"], row["steps"], row["seed"]) for row in self.data["rows"]}
        for seed in self.args.seeds:
            for steps in self.args.steps:
                for name in self.args.variants:
                    if (name, steps, seed) in done or (VARIANTS[name].get("feature_weight") and self.taught_by is None):
                        continue
                    row = self.measure(name, steps, seed)
                    self.data["rows"].append(row)
                    self.save()
                    self.console.print(f"{steps} steps, {name}: {row['error']:.5f} +- {row['error_se']:.5f}")

    def table(self) -> Table:
        """One row for each variant and step count, means over seeds."""
        shown = Table(show_edge=False, caption="Difference from the defaults' error, image by image.")
        names = ["steps", "variant", "seeds", "numbers", "s", "error", "+-", "difference", "+-", "seeds' +-", "Fréchet"]
        names += ["right"] if "class_labels" in self.held_out.requests else []
        for column in names:
            shown.add_column(column, justify="left" if column == "variant" else "right", no_wrap=column != "variant")
        keys = dict.fromkeys((row["steps"], row["variant"]) for row in self.data["rows"])
        for steps, name in sorted(keys, key=lambda key: key[0]):
            rows = [row for row in self.data["rows"] if (row["steps"], row["variant"]) == (steps, name)]
            errors = [row["error"] for row in rows]
            shown.add_row(
                str(steps),
                name,
                str(len(rows)),
                str(rows[0]["numbers"]),
                f"{np.mean([row['seconds'] for row in rows]):.0f}",
                f"{np.mean(errors):.5f}",
                f"{np.mean([row['error_se'] for row in rows]):.5f}",
                *(average(rows, "difference", 5), average(rows, "difference_se", 5)),
                f"{np.std(errors):.5f}" if len(rows) > 1 else "-",
                average(rows, "frechet", 2),
                *([average(rows, "right", 3)] if "class_labels" in self.held_out.requests else []),
            )
        return shown


def average(rows: list[dict[str, Any]], name: str, digits: int) -> str:
    found = [row[name] for row in rows if name in row]
    return f"{np.mean(found):.{digits}f}" if found else "-"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file; trajectories and sets lie beside it")
    parser.add_argument("--model", type=Path, help="diffusers pipeline directory [default: the packaged MNIST backbone]")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--trajectories", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--guidance-scale", type=float, help="of a backbone with labels [default: no guidance]")
    parser.add_argument("--held-out", type=int, default=1024, help="images that the figures are of")
    parser.add_argument("--threads", type=int, help="of torch [default: its own choice]")
    parser.add_argument("--classifier", type=Path, help="file that examples/train_classifier.py wrote")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="npz files of real images, with --classifier")
    parser.add_argument("--features", type=Path, help="classifier of another seed, whose features are learned from")
    args = parser.parse_args()
    if (args.classifier is None) != (not args.data):
        parser.error("expected --classifier and --data together")
    if args.held_out < 2:
        parser.error("expected --held-out of 2 or more")
    return args


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    laboratory = Laboratory(args)
    laboratory.run()
    laboratory.console.print(laboratory.table())


if __name__ == "__main__":
    main()
