"""Tables, plots and image strips of `benchmarks/results.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from neighbours import METHODS
from numpy.typing import NDArray
from quality import write

from mteo_deploy.images import grid, write_png
from mteo_deploy.quality import gap_closed

Rows = Sequence[Mapping[str, Any]]
ORDER = ("plain Euler", "plain", "scalar time", "time points", "principal directions", "MTEO")
LABELS = {"plain": "best plain solver"}
NEIGHBOURS = (
    " The neighbours are written after their papers' ideas in `benchmarks/neighbours.py`; "
    "each stands on the best of Euler, second-order iPNDM and, on time-uniform points, second-order DEIS, by the loss it "
    "learned with, {budget}."
)


def of(rows: Rows, method: str, count: int | None = None) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["method"] == method and count in (None, row["evaluations"])]


def mean(rows: Rows, name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def spread(rows: Rows, name: str, form: str) -> str:
    """Mean and half of the range over the seeds."""
    values = [row[name] for row in rows]
    return f"{np.mean(values):{form}}" + (f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else "")


def counts(rows: Rows) -> list[int]:
    return sorted({row["evaluations"] for row in of(rows, "MTEO")})


def methods(rows: Rows) -> list[str]:
    present = {row["method"] for row in rows}
    return [name for name in ORDER if name in present]


def there(rows: Rows, count: int) -> list[str]:
    """Methods that have a figure at a count: neighbours may be compared at a few."""
    return [name for name in methods(rows) if of(rows, name, count)]


def nearest(rows: Rows, count: int) -> str:
    return min(there(rows, count), key=lambda name: mean(of(rows, name, count), "frechet"))


def closed(rows: Rows, method: str, count: int) -> float | None:
    """Share of the distance between plain Euler and the reference trajectory that a method removes."""
    plain, found, reference = (of(rows, "plain Euler", count), of(rows, method, count), of(rows, "reference"))
    return gap_closed(*(mean(one, "frechet") for one in (plain, found, reference)))


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def frechet_table(rows: Rows) -> str:
    """A line for each method, a column for each count; the lowest of a column in bold."""

    def cell(name: str, n: int) -> str:
        text = spread(of(rows, name, n), "frechet", ".2f")
        return f"**{text}**" if name == nearest(rows, n) else text

    return simple_table(rows, "Fréchet distance at evaluations", cell, methods(rows))


def simple_table(rows: Rows, title: str, cell: Any, names: Sequence[str]) -> str:
    numbers = counts(rows)
    lines = [[LABELS.get(name, name), *(cell(name, n) if of(rows, name, n) else "" for n in numbers)] for name in names]
    return table([title, *map(str, numbers)], lines)


def error_table(rows: Rows) -> str:
    return simple_table(
        rows, "squared error at evaluations", lambda name, n: f"{mean(of(rows, name, n), 'error'):.4f}", methods(rows)
    )


def gap_table(rows: Rows) -> str:
    def cell(name: str, n: int) -> str:
        share = closed(rows, name, n)
        return "no gap" if share is None else f"{share:.1%}"

    return simple_table(rows, "gap closed at evaluations", cell, [name for name in methods(rows) if name != "plain Euler"])


def cost_table(rows: Rows) -> str:
    """Numbers learned and seconds of learning; which solver lies below, and which teacher was learned from."""

    def cell(name: str, n: int) -> str:
        row = of(rows, name, n)[0]
        cost = f", {row['learned']:,} in {row['training_seconds']:.0f} s" if row["learned"] else ""
        teacher = f" from {row['teacher']}" if "teacher" in row else ""
        return f"{row['detail']}{cost}{teacher}"

    return simple_table(rows, "solver, numbers learned, seconds, teacher", cell, methods(rows))


def findings(rows: Rows) -> list[str]:
    """What the goals ask, answered by the figures."""
    few = [n for n in counts(rows) if n <= 6]
    first = [n for n in few if nearest(rows, n) == "MTEO"]
    lines = [f"MTEO is first at {', '.join(map(str, first)) or 'none'} of {', '.join(map(str, few))} evaluations."]
    for row in {row["evaluations"]: row for row in of(rows, "DDIM")}.values():
        same = of(rows, "DDIM", row["evaluations"])
        enough = [n for n in counts(rows) if mean(of(rows, "MTEO", n), "frechet") <= mean(same, "frechet")]
        lines.append(
            f"{row['evaluations']} evaluations of DDIM ({row['detail']}): {spread(same, 'frechet', '.2f')}; "
            + (f"MTEO is at least as near with {min(enough)}." if enough else "MTEO is not as near with any of these counts.")
        )
    reference = of(rows, "reference")
    lines.append(
        f"Reference trajectory, {reference[0]['evaluations']} evaluations of {reference[0]['detail']}: "
        f"{spread(reference, 'frechet', '.2f')}; the classifier names {mean(reference, 'sure'):.1%} of its images above 0.9."
    )
    return lines


def plot(rows: Rows, path: Path) -> None:
    """Fréchet distance against evaluations, both logarithmic; a band over the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    numbers = counts(rows)
    for name in methods(rows):
        at = [n for n in numbers if of(rows, name, n)]
        values = np.array([[row["frechet"] for row in of(rows, name, n)] for n in at])
        line = axes.plot(at, values.mean(1), marker="o", label=LABELS.get(name, name), lw=2.5 if name == "MTEO" else 1.3)
        axes.fill_between(at, values.min(1), values.max(1), color=line[0].get_color(), alpha=0.2, lw=0)
    reference = of(rows, "reference")
    axes.axhline(mean(reference, "frechet"), color="0.4", ls="--", lw=1)
    axes.annotate(f"reference trajectory ({reference[0]['evaluations']})", (numbers[0], mean(reference, "frechet")),
                  ha="left", va="bottom", color="0.4")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="Fréchet distance (classifier features)")
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    write(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    pyplot.close(figure)


def strip(strips: Mapping[tuple[str, int], NDArray[np.float32]], rows: Rows, path: Path) -> list[str]:
    """Images of the same noise, a row for each way; returns what the rows are, from above."""
    wanted = [(name, n) for n in counts(rows) if n <= 4 for name in ("plain", "MTEO")]
    wanted += [key for key in strips if key[0] == "reference"]
    shown = [key for key in wanted if key in strips]
    images = np.concatenate([strips[key] for key in shown])
    write_png(grid(images, columns=len(strips[shown[0]])), path, scale=2)
    return [f"{LABELS.get(name, name)}, {n}" for name, n in shown]


def section_of_more(rows: Rows, real: Mapping[str, Any]) -> list[str]:
    """The same of more images of one seed; nothing where the reference trajectory, MTEO or plain Euler is missing."""
    wanted = [n for n in counts(rows) if of(rows, "plain Euler", n)]
    if not wanted or not of(rows, "reference"):
        return []
    rows = [row for row in rows if row["method"] in ("DDIM", "reference") or row["evaluations"] in wanted]
    (num,), (seed,) = {row["num"] for row in rows}, {row["seed"] for row in rows}
    return [
        f"## {num:,} images",
        f"Of seed {seed} (`--num {num} --seeds {seed}`), as far as they were drawn; as many images of the training set are "
        f"{real['train'][num]:.2f} away.",
        "\n".join(f"- {line}" for line in findings(rows)[1:]),  # who is first of so few says nothing
        frechet_table(rows),
        gap_table(rows),
    ]


def write_page(
    output: Path,
    rows: Rows,
    strips: Mapping[tuple[str, int], NDArray[np.float32]],
    context: Mapping[str, Any],
    larger: Rows = (),
) -> None:
    """``README.md``, ``quality.png`` and ``strips.png`` in ``output``.

    Args:
        larger: rows of more images, of one seed; not all methods and counts need be there.
    """
    output.mkdir(parents=True, exist_ok=True)
    plot(rows, output / "quality.png")
    shown = strip(strips, rows, output / "strips.png")
    real, seeds = context["real"], ", ".join(map(str, context["seeds"]))
    parts = [
        "# Results on the packaged MNIST backbone",
        f"{context['num']:,} images {'for each of the seeds' if len(context['seeds']) > 1 else 'of seed'} {seeds}, "
        f"from the same noise for every method, against the {real['count']:,} MNIST test images, on the features of a digit "
        f"classifier ({context['classifier_test_accuracy']:.2%} right on them). As many images of the training set are "
        f"{real['train'][context['num']]:.2f} away: the distance is biased upwards by finite samples, for all alike."
        + (" Mean and half of the range over the seeds." if len(context["seeds"]) > 1 else "")
        + " `make results DATA=DIRECTORY` makes this page, from the figures in `figures.jsonl` and what is not there yet.",
        "![Fréchet distance against evaluations](quality.png)",
        "\n".join(f"- {line}" for line in findings(rows)),
        frechet_table(rows),
        gap_table(rows),
        error_table(rows),
        cost_table(rows),
        "Gap closed: of the distance between plain Euler and the reference trajectory. Squared error: of the image against "
        "the reference trajectory's of the same noise. Seconds are those of each training where it ran, on one or two threads "
        "and often beside others. The best plain solver of each count and its time points, those "
        "of DDIM, and the solver below MTEO where there are sets for several, are chosen by the Fréchet distance of "
        f"{context['screen']:,} images; plain Euler is on the backbone's own schedule."
        + (NEIGHBOURS.format(**context) if {row["method"] for row in rows} & set(METHODS) else ""),
        f"![Image strips](strips.png)\n\nRows from above: {'; '.join(shown)}. Columns share their noise.",
        *section_of_more(larger, real),
    ]
    write(output / "README.md", lambda path: path.write_text("\n\n".join(parts) + "\n", encoding="utf-8"))
