"""The published tables and plots, from nothing but MNIST: `make results DATA=DIRECTORY`.

Every sampler starts from the same noise, runs on the same frozen backbone in ONNX Runtime and is measured on the same
features: plain solvers (all of them on two schedules, screened on fewer images; the best of each count goes on), the
neighbours of `neighbours.py`, MTEO (on every solver that there is a set for, screened alike), and the reference trajectory. A
figure is a line of OUTPUT/figures.jsonl, so a stopped run loses at most one, and another machine can go on with the file;
it names the backbone, the classifier and what was learned (the embedding set, a neighbour's numbers) that it is of. What
neighbours learned are lines of OUTPUT/neighbours.jsonl. Bundles and reference images are kept under WORK and not made again.

    python benchmarks/results.py DATA --work runs/results -o docs/results      # DATA/mnist_train.npz, DATA/mnist_test.npz
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from neighbours import METHODS, Budget, Neighbour, learn, numbers, restore
from numpy.typing import NDArray
from quality import Statistics, classify, digest, frechet_distance, load, mean_squared_error, measure, real_statistics, write
from results_page import write_page
from rich.console import Console
from train_backbone import load_images
from train_classifier import SIZE

from mteo_deploy import assets
from mteo_deploy.bundle import sha256_file
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.distillation.trajectories import reference_trajectories
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.engines.build import build
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.export import export
from mteo_deploy.plan import Evaluation, Plan
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.solvers import SOLVERS

Array = NDArray[np.float32]
Draw = Callable[[Array], Array]
CLASSIFIER = Path(__file__).resolve().parent / "classifier.safetensors"
LEARN_SEED = 1_000_000
TEACHER, TEACHER_EVALUATIONS = "euler", 20
"""Whose trajectories all learn from that learns here: the packaged sets' teacher."""
PLAIN_SCHEDULES = (None, "time-uniform")
"""Time points of the plain solvers: the backbone's own, and those that plain Euler is nearer with at 4 and 5 evaluations."""
BASES = (("euler", None), ("ipndm-2", None), ("deis-2", "time-uniform"))
"""Solvers and time points that a neighbour may stand on; the last is the best plain solver of 3 to 6 evaluations."""
DDIM = (10, 20)
"""Evaluations of plain DDIM that MTEO's few are held against."""
LARGER = 10_000
"""Images of one seed whose figures stand on the page too, where they are in the file."""


@dataclass(frozen=True)
class Way:
    """One way to images: ``method`` with ``detail`` (which solver), at a number of evaluations.

    Attributes:
        embeddings: what was learned, by the beginning of the SHA-256 of the set or of a neighbour's numbers; or empty.
        teacher: what the set learned from (:func:`taught`).
    """

    method: str
    detail: str
    evaluations: int
    draw: Draw
    learned: int = 0
    seconds: float | None = None
    embeddings: str = ""
    teacher: str = ""


def _detail(solver: str, schedule: str | None) -> str:
    return solver if schedule is None else f"{solver}, {schedule}"


def taught(training: dict[str, Any]) -> str:
    """What a set learned from: solver and evaluations of its trajectories, and whether it began with another set."""
    if "merged" in training:
        return " + ".join(f"{part['weight']:g} x {taught(part['training'])}" for part in training["merged"])
    begun = ", begun with another set" if "init" in training else ""
    learned = "".join(f", {name} learned" for name in training["recipe"].get("learn", ()))
    return "{solver} ({evaluations})".format(**training["reference"]) + learned + begun


class Lines:
    """What is finished, one JSON line each.

    Args:
        made_by: what all lines are of (backbone, classifier): part of every line, and lines of others are left alone.
    """

    def __init__(self, path: Path, made_by: dict[str, str]) -> None:
        self.path, self.made_by = path, made_by
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.rows = [row for row in found if made_by.items() <= row.items()]

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        row = self.made_by | row
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


class Laboratory:
    """Backbone, classifier, engine and everything that is made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.console = args, Console()
        self.adapter: Adapter = load_backbone(args.model)
        self.classifier = load(args.classifier)
        self.real: Statistics
        self.real, self.facts = real_statistics(self.classifier, [args.data / "mnist_test.npz"], 0)
        self.facts["train"] = {num: self._of_training_images(num) for num in (args.num, LARGER)}
        made_by = {"backbone": self.adapter.fingerprint()[:12], "classifier": sha256_file(args.classifier)[:12]}
        self.figures = Lines(args.output / "figures.jsonl", made_by)
        self.neighbours = Lines(args.output / "neighbours.jsonl", {"backbone": made_by["backbone"]})
        # any bundle has the graph with ordinary time conditioning; the reference is that of the fewest steps, whatever is asked
        count = min((int(name.rpartition("-")[2]) for name in assets.embedding_sets(args.model)), default=min(args.counts))
        self.conditioned = Sampler.load(self.bundle(count, next(iter(self.sets(count)))))
        self._references: dict[int, Array] = {}

    def _of_training_images(self, num: int) -> float:
        """Fréchet distance of as many images of the training set as a way draws: what no sampler can be asked to beat."""
        images = load_images(self.args.data / "mnist_train.npz", SIZE, 1)
        rows = np.random.default_rng(0).permutation(len(images))[:num]
        return frechet_distance(Statistics.of(classify(self.classifier, images[rows])[0]), self.real)

    def sets(self, count: int) -> dict[str, Path]:
        """Solver -> the backbone's own embedding set of this many steps; one learned here on Euler where there is none."""
        found = {
            name.removesuffix(f"-{count}"): path
            for name, path in assets.embedding_sets(self.args.model).items()
            if name.endswith(f"-{count}")
        }
        if found:
            return found
        path = self.args.work / "sets" / f"euler-{count}.safetensors"
        if not path.exists():
            args = self.args
            recipe = Recipe(args.trajectories, args.iterations, teacher=TEACHER, teacher_evaluations=TEACHER_EVALUATIONS)
            distill(self.args.model, path, steps=count, recipe=recipe)
        return {"euler": path}

    def bundle(self, count: int, solver: str) -> Path:
        embeddings = self.sets(count)[solver]
        path = self.args.work / "bundles" / f"{solver}-{count}-{sha256_file(embeddings)[:12]}"
        if not path.exists():
            export(path, model=self.args.model, embeddings=embeddings, realisations=("table",), quiet=True)
            build(path, engine="onnxruntime", realisation="table", quiet=True)
        return path

    def network(self, state: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The backbone with ordinary time conditioning, in ONNX Runtime."""
        feeds = {"state": state.numpy(), "timestep": timestep.reshape(1).numpy()}
        return torch.from_numpy(np.asarray(self.conditioned.conditioned_session.run(feeds)[0]).copy())

    def noise(self, seed: int, start: int, stop: int) -> Array:
        return noise_for(self.adapter.sample_shape, seed, range(start, stop))

    def images(self, draw: Draw, seed: int, num: int) -> Array:
        batch = self.args.batch
        parts = [draw(self.noise(seed, i, min(i + batch, num))).clip(-1, 1) for i in range(0, num, batch)]
        return np.concatenate(parts)

    def reference(self, seed: int) -> Array:
        """The reference trajectory's images: the most expensive ones, kept."""
        path = self.args.work / f"reference-{seed}-{self.args.num}.npy"
        if not path.exists():
            images = self.images(self._plan(self.conditioned.reference_plan), seed, self.args.num)
            write(path, lambda temporary: np.save(temporary, images))
        if seed not in self._references:
            self._references[seed] = np.load(path, allow_pickle=False)
        return self._references[seed]

    def _plan(self, plan: Plan) -> Draw:
        return lambda noise: np.asarray(self.conditioned.conditioned_states(plan, noise)[-1])

    # --- the ways ---

    def plain(self, count: int) -> Iterator[Way]:
        """Every solver that has a plan of this many evaluations, on each schedule; of those that are one plan, the first."""
        seen: list[tuple[Evaluation, ...]] = []
        for schedule, (name, solver) in product(PLAIN_SCHEDULES, SOLVERS.items()):
            if count % solver.evaluations_per_interval == 0:
                plan = self.adapter.compile_plan(count // solver.evaluations_per_interval, name, schedule)
                if len(plan.evaluations) == count and plan.evaluations not in seen:
                    seen.append(plan.evaluations)
                    yield Way("plain", _detail(name, schedule), count, self._plan(plan))

    def euler(self, method: str, count: int) -> Iterator[Way]:
        """Euler, which is DDIM, on each schedule; first on the backbone's own."""
        for schedule in PLAIN_SCHEDULES:
            yield Way(
                method, _detail("euler", schedule), count, self._plan(self.adapter.compile_plan(count, "euler", schedule))
            )

    def best(self, ways: Iterable[Way]) -> Way:
        """By Fréchet distance on the first ``screen`` images of the first seed; one alone needs no screening."""
        ways = list(ways)
        if len(ways) == 1:
            return ways[0]
        return min(ways, key=lambda way: float(self.measure(way, self.args.seeds[0], self.args.screen)["frechet"]))

    def mteo(self, count: int) -> Iterator[Way]:
        """On every solver that there is a set for."""
        for solver, path in self.sets(count).items():
            sampler, found = Sampler.load(self.bundle(count, solver)), EmbeddingSet.load(path)
            learned, seconds = found.training["parameters"], found.training["seconds"]
            schedule = found.plain_plan.schedule
            detail = _detail(solver, None if schedule == self.adapter.levels.default_schedule else schedule)
            yield Way("MTEO", detail, count, sampler.image, learned, seconds, sha256_file(path)[:12], taught(found.training))

    def neighbour(self, method: str, count: int) -> Way:
        """On the best of ``BASES``, by the loss it was trained to; learned once."""
        best = min((self._learned(method, count, *base) for base in BASES), key=lambda one: one["loss"])
        student = restore(self._student(method, count, best["solver"], best["schedule"]), best["numbers"]).eval()

        @torch.no_grad()
        def draw(noise: Array) -> Array:
            return student(torch.from_numpy(noise), self.network).numpy()

        learned = sum(parameter.numel() for parameter in student.parameters())
        teacher, solver = f"{best['teacher']} ({best['teacher_evaluations']})", _detail(best["solver"], best["schedule"])
        return Way(method, solver, count, draw, learned, best["seconds"], digest(best["numbers"]), teacher)

    def _student(self, method: str, count: int, solver: str, schedule: str | None) -> Neighbour:
        return METHODS[method](self.adapter.levels, self.adapter.compile_plan(count, schedule=schedule).sigmas, solver)

    def _learned(self, method: str, count: int, solver: str, schedule: str | None) -> dict[str, Any]:
        """The line of a neighbour on one solver, of this budget."""
        args = self.args
        key: dict[str, Any] = {"method": method, "evaluations": count, "solver": solver, "schedule": schedule}
        key |= {"teacher": TEACHER, "teacher_evaluations": TEACHER_EVALUATIONS}
        key |= {"trajectories": args.trajectories, "iterations": args.neighbour_iterations, "lr": METHODS[method].lr}
        if (found := self.neighbours.find(**key)) is not None:
            return found
        noise, images = self.trajectories()
        student, clock = self._student(method, count, solver, schedule), time.monotonic()

        def network(state: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.adapter(state, *self.adapter.embeddings(timestep.reshape(1)))

        losses = learn(student, network, noise, images, Budget(iterations=args.neighbour_iterations))
        found = {"first_loss": losses[0], "loss": float(np.mean(losses[-20:])), "seconds": round(time.monotonic() - clock, 1)}
        self.console.print(
            f"{method}, {count} evaluations, {_detail(solver, schedule)}: loss {losses[0]:.4f} -> {found['loss']:.4f}"
        )
        return self.neighbours.add({**key, **found, "numbers": numbers(student)})

    def trajectories(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and images that the neighbours learn from, ``[count, ...]``."""
        path = self.args.work / f"trajectories-{TEACHER}-{TEACHER_EVALUATIONS}-{self.args.trajectories}.npz"
        if not path.exists():
            plan = self.adapter.compile_plan(1)
            made = reference_trajectories(
                self.adapter,
                plan,
                count=self.args.trajectories,
                seed=LEARN_SEED,
                batch=64,
                substeps=TEACHER_EVALUATIONS,
                teacher=TEACHER,
                progress=lambda count: None,
            )
            write(path, lambda temporary: np.savez(temporary, noise=made.noise.numpy(), images=made.states[-1].numpy()))
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["noise"]), torch.from_numpy(arrays["images"])

    # --- the figures ---

    @staticmethod
    def _key(way: Way, seed: int, num: int) -> dict[str, Any]:
        key = {"method": way.method, "detail": way.detail, "evaluations": way.evaluations, "seed": seed, "num": num}
        return key | ({"embeddings": way.embeddings} if way.embeddings else {})

    def larger(self) -> list[dict[str, Any]]:
        """Figures of ``LARGER`` images of the first seed, as far as there are any; none is measured."""
        if self.args.num >= LARGER:
            return []
        found = (self.figures.find(**self._key(way, self.args.seeds[0], LARGER)) for way in self.ways())
        return [row for row in found if row is not None]

    def measure(self, way: Way, seed: int, num: int) -> dict[str, Any]:
        """Fréchet distance, share named above 0.9 and squared error; taken from the file where it stands there."""
        key, said = self._key(way, seed, num), {"teacher": way.teacher} if way.teacher else {}
        if (found := self.figures.find(**key)) is not None:
            return found | said
        clock = time.monotonic()
        reference = self.reference(seed)[:num]
        images = reference if way.method == "reference" else self.images(way.draw, seed, num)
        error = mean_squared_error(images, reference)
        row = {**key, **said, "learned": way.learned, "training_seconds": way.seconds, "error": error}
        row |= measure(self.classifier, images, self.real) | {"seconds": round(time.monotonic() - clock, 1)}
        self.console.print(
            f"{way.method} ({way.detail}) {way.evaluations} evaluations, seed {seed}, {num} images: Fréchet distance "
            f"{row['frechet']:.3f}, error {error:.4f}, {row['seconds']:.0f} s"
        )
        return self.figures.add(row)

    def ways(self) -> Iterator[Way]:
        reference = self.conditioned.reference_plan
        yield Way("reference", reference.solver, len(reference.evaluations), self._plan(reference))
        for count in DDIM:
            yield self.best(self.euler("DDIM", count))
        for count in self.args.counts:
            yield self.best(self.plain(count))
            yield next(self.euler("plain Euler", count))
            yield self.best(self.mteo(count))
            for method in self.args.neighbours if count in self.args.neighbour_counts else ():
                yield self.neighbour(method, count)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory of mnist_train.npz and mnist_test.npz (images and labels, uint8)")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results"), help="tables and plots")
    parser.add_argument("--work", type=Path, default=Path("runs/results"), help="what is made once, and every figure")
    parser.add_argument("--classifier", type=Path, default=CLASSIFIER, help="another of examples/train_classifier.py's")
    parser.add_argument("--model", type=Path, default=assets.MODEL, help="another backbone of 28x28 gray images")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8], help="evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise")
    parser.add_argument("--num", type=int, default=10_000, help="images for each way and seed")
    parser.add_argument("--neighbours", nargs="*", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--neighbour-counts", type=int, nargs="+", help="where they are compared [default: everywhere]")
    parser.add_argument("--screen", type=int, default=1_000, help="images on which plain solvers are screened")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--trajectories", type=int, default=1024, help="reference trajectories to learn from")
    parser.add_argument("--iterations", type=int, default=400, help="of MTEO, where no set is packaged")
    parser.add_argument("--neighbour-iterations", type=int, default=120)
    args = parser.parse_args()
    args.neighbour_counts = args.neighbour_counts or args.counts
    for name in ("mnist_train.npz", "mnist_test.npz"):
        if not (args.data / name).is_file():
            parser.error(f"expected {name} in {args.data}, arrays images uint8 [n, 28, 28] and labels uint8 [n]; found none")
    return args


def main() -> None:
    args = parse()
    laboratory = Laboratory(args)
    rows: list[dict[str, Any]] = []
    strips: dict[tuple[str, int], Array] = {}
    for done, seed in enumerate(args.seeds, start=1):
        for way in laboratory.ways():
            rows.append(laboratory.measure(way, seed, args.num))
            if (way.method, way.evaluations) not in strips:
                strips[way.method, way.evaluations] = laboratory.images(way.draw, args.seeds[0], 12)
        context = {
            "num": args.num,
            "screen": args.screen,
            "seeds": args.seeds[:done],
            **laboratory.figures.made_by,
            "real": laboratory.facts,
            "budget": f"in {args.neighbour_iterations} iterations of {Budget.batch} out of {args.trajectories:,} trajectories",
            "classifier_test_accuracy": laboratory.classifier.test_accuracy,
        }
        write_page(args.output, rows, strips, context, laboratory.larger())
        print(f"wrote {args.output}, seeds {', '.join(map(str, args.seeds[:done]))}")


if __name__ == "__main__":
    main()
