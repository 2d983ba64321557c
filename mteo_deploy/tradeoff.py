"""What ``bench`` found: candidates by quality and time, which of them are worth having, and the files that become of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteo_deploy import plots
from mteo_deploy.errors import InputError
from mteo_deploy.files import write_atomic
from mteo_deploy.page import document, figure, no_plots, table
from mteo_deploy.report import check_outputs
from mteo_deploy.text import in_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".html", ".json", ".csv", ".png")
MARGIN = 0.99
"""Part of another one's error from which an error counts as smaller: how an engine rounds moves it in the third digit."""

MARKERS = {"onnxruntime": "o", "openvino": "s", "tensorrt": "^"}


@dataclass(frozen=True)
class Point:
    """One candidate at one batch size.

    Attributes:
        plain: the bundle's plain plan on the time-conditioned graph, nothing learned: what one would run instead.
        error: of the images against the reference trajectory's; None where they are not finite.
        p50: median time of one batch, in milliseconds.
        ratio: to the fastest candidate at this batch size, median over the rounds, with its 95 % bootstrap interval.
        front: worth having at this batch size, as :func:`pareto_front` has it.
    """

    bundle: str
    evaluations: int
    solver: str
    plain: bool
    engine: str
    device: str
    precision: str
    realisation: str
    batch: int
    error: float | None
    p50: float
    ratio: float
    ratio_low: float
    ratio_high: float
    front: bool = False

    @property
    def name(self) -> str:
        """What tells it from the others, in words."""
        kind = f"plain {self.solver}" if self.plain else self.bundle
        return f"{kind}, {self.evaluations} evaluations, {self.engine} on {self.device}, {self.precision}"


def pareto_front(points: Sequence[tuple[float | None, float]]) -> list[bool]:
    """Which ``(error, time)`` are worth having: no other one is at least as fast with at least as small an error.

    From the fastest on, one joins the front when its error is below :data:`MARGIN` of every faster one's. Equal points stay
    together; an error of None, or one that is not finite, is never worth having.
    """
    front = [False] * len(points)
    best, kept = float("inf"), (float("inf"), float("inf"))
    known = [(error, time, i) for i, (error, time) in enumerate(points) if error is not None and isfinite(error)]
    for error, time, i in sorted(known, key=lambda one: (one[1], one[0])):
        front[i] = error < MARGIN * best or (error, time) == kept
        if front[i]:
            best, kept = error, (error, time)
    return front


@dataclass(frozen=True)
class Tradeoff:
    """What ``bench`` found.

    Attributes:
        reference: ``evaluations``, ``bundle``, ``engine`` and ``precision`` of the reference trajectory.
        images: how many were compared, from noise of ``seed``.
        rounds: batch size -> rounds that every candidate was timed in.
        doubts: why the times are not to be trusted, in words.
        environment: versions and machine.
    """

    points: list[Point]
    reference: dict[str, Any]
    images: int
    seed: int
    rounds: dict[int, int]
    doubts: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, points: Sequence[Point], **rest: Any) -> Tradeoff:
        """With the front of every batch size marked, and each batch size's points from the fastest on."""
        marked: list[Point] = []
        for batch in dict.fromkeys(point.batch for point in points):
            same = sorted((point for point in points if point.batch == batch), key=lambda point: point.p50)
            front = pareto_front([(point.error, point.p50) for point in same])
            marked += [replace(point, front=on) for point, on in zip(same, front, strict=True)]
        return cls(marked, **rest)

    @property
    def batches(self) -> list[int]:
        return list(dict.fromkeys(point.batch for point in self.points))

    def at(self, batch: int) -> list[Point]:
        """The points of one batch size, from the fastest on."""
        return [point for point in self.points if point.batch == batch]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """How it was measured, and what speaks against it, in words."""
        found = [
            f"error: relative, root mean square, of {self.images} images (seed {self.seed}) against the reference trajectory: "
            f"{self.reference['evaluations']} evaluations on the time-conditioned graph of {self.reference['bundle']} in "
            f"{self.reference['engine']}, {self.reference['precision']}",
            "time: medians of whole samplings of one batch, all candidates open at once, interleaved in "
            + ", ".join(f"{rounds} rounds at batch {batch}" for batch, rounds in self.rounds.items())
            + "; ratios to the fastest, round by round, with 95 % intervals",
        ]
        if self.reference["precision"] != "fp32":
            name = self.reference["precision"]
            found.insert(1, f"the reference is in {name} too: add a bundle in fp32 to see all of what rounding costs")
        return found + ([f"times marked unreliable: {'; '.join(self.doubts)}"] if self.doubts else [])

    def rows(self, batch: int) -> list[list[str]]:
        """The table of one batch size: :data:`COLUMNS` in words."""
        return [
            [
                p.name,
                "front" if p.front else "",
                "not finite" if p.error is None else f"{p.error:.3g}",
                f"{p.p50:.2f}",
                f"{p.ratio:.3f} [{p.ratio_low:.3f}, {p.ratio_high:.3f}]",
            ]
            for p in self.at(batch)
        ]

    def csv(self) -> str:
        """One line per candidate and batch size."""
        file = StringIO()
        writer = csv.DictWriter(file, [one.name for one in fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(point) for point in self.points)
        return file.getvalue()

    def html(self) -> str:
        """One page that asks for nothing: drawing and table per batch size."""
        parts = ["<header><h1>mteo-deploy bench</h1></header>", f"<h2>{len(self.at(self.batches[0]))} candidates</h2>"]
        *said, last = self.lines()
        parts += [f"<p>{in_html(line)}</p>" for line in said]
        parts.append(f'<p class="doubt">{in_html(last)}</p>' if self.doubts else f"<p>{in_html(last)}</p>")
        for batch in self.batches:
            caption = (
                f"Error against time at batch {batch}, both better when smaller. The line joins what no other candidate beats "
                "in both. Numbers: evaluations."
            )
            drawing = figure(draw(self.at(batch)), f"b{batch}", caption, 3.6)
            made = table(COLUMNS, self.rows(batch), numeric=2)
            parts.append(f'<section><h3>Batch {batch}</h3><div class="beside">{made}{drawing}</div></section>')
        parts += [no_plots(), f"<h3>Environment</h3>{table(['', ''], [[k, v] for k, v in self.environment.items()])}"]
        return document("mteo-deploy bench", "\n".join(parts))

    def save(self, path: Path) -> None:
        """Write a page for a path ending in ``.html``, ``.csv``, a picture for ``.png``, or ``.json``.

        Raises:
            InputError: for another ending.
            MissingPackageError: for a picture without matplotlib.
        """
        check_tradeoff_outputs([path])
        if path.suffix.lower() == ".png":
            plots.png(self._compose, path, (6.5 * len(self.batches), 5.0))
            return
        make = {".html": self.html, ".csv": self.csv}.get(path.suffix.lower())
        write_atomic(path, make() if make else json.dumps(self.to_json(), indent=1) + "\n")

    def _compose(self, figure: Figure) -> None:
        for i, batch in enumerate(self.batches):
            axes = figure.add_subplot(1, len(self.batches), i + 1)
            draw(self.at(batch))(axes)
            axes.set_title(f"batch {batch}", size=11)


COLUMNS = ["candidate", "", "error", "median, ms", "over the fastest"]


def check_tradeoff_outputs(paths: Sequence[Path]) -> None:
    """Refuse what :meth:`Tradeoff.save` cannot write, before any work is done.

    Raises:
        InputError: for another ending, a folder, or the same path twice.
        MissingPackageError: for a picture without matplotlib.
    """
    for path in paths:
        if path.suffix.lower() not in ENDINGS:
            raise InputError(f"expected an output ending in {', '.join(ENDINGS)}; found {path}; pass another -o")
    check_outputs(paths)


def draw(points: Sequence[Point]) -> plots.Draw:
    """Error against time, both logarithmic, with the front; the shape tells the engine, a hollow one bf16."""

    def draw_on(axes: Axes) -> None:
        shown = [(point, point.error) for point in points if point.error]  # zero has no place on a logarithmic axis
        labels: set[str] = set()
        for point, error in shown:
            colour = plots.OTHER if point.plain else plots.OURS
            label = f"{'plain' if point.plain else 'MTEO'}, {point.engine} {point.precision}"
            face = "white" if point.precision == "bf16" else colour
            axes.plot(
                [point.p50], [error], MARKERS.get(point.engine, "D"), ms=8, mec=colour, mfc=face, mew=1.6, ls="none",
                label="_" + label if label in labels else label,
            )  # fmt: skip
            labels.add(label)
            axes.annotate(f"{point.evaluations}", (point.p50, error), (6, 5), textcoords="offset points", size=9)
        front = [(point.p50, error) for point, error in shown if point.front]
        axes.plot(*zip(*front, strict=True), color=plots.QUIET, lw=1.2, zorder=0) if front else None
        axes.set(xlabel="one batch, milliseconds (median)", ylabel="relative error of the images", xscale="log", yscale="log")
        axes.margins(0.12)
        _plain_numbers(axes)
        if labels:
            axes.legend(fontsize=8.5)

    return draw_on


def _plain_numbers(axes: Axes) -> None:
    """Ticks as one would say them: 0.2, not 2 x 10^-1."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
