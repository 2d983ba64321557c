"""The drawings of a report: SVG to stand inside a page, PNG for a file of its own.

Figures are made without pyplot, so that no window, backend or setting of the calling program is touched. matplotlib is an
extra: a page is written without it too, with its tables and images.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mteo_deploy import waterfall
from mteo_deploy.errors import MissingPackageError
from mteo_deploy.files import write_atomic
from mteo_deploy.text import in_html, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mteo_deploy.numerics import Check
    from mteo_deploy.pictures import Pictures
    from mteo_deploy.report import Report

INSTALL = "pip install 'mteo-deploy[report]'"
OURS, OTHER, INK, QUIET = "#0072B2", "#D55E00", "#1f2328", "#6e7781"
"""Blue and vermillion of Okabe & Ito's palette, which colour-blind readers tell apart; lines differ in style too."""

SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names out of files may hold a $
    "svg.hashsalt": "mteo-deploy",
}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))

Draw = Callable[["Axes"], None]


def available() -> bool:
    """Is matplotlib installed?"""
    return importlib.util.find_spec("matplotlib") is not None


def require(path: Path) -> None:
    """Check that a picture can be drawn.

    Raises:
        MissingPackageError: naming the extra to install.
    """
    if not available():
        raise MissingPackageError(f"expected matplotlib to draw {path}; found none; run: {INSTALL}")


def svg(draw: Draw, prefix: str, label: str, height: float = 2.9) -> str:
    """One drawing as an ``<svg>`` element to stand inside a page, as wide as its place.

    Args:
        prefix: for the ids inside, which must differ between the drawings of a page.
        label: what a reader hears who does not see it.
        height: in inches, where the width is 5.2.
    """

    import matplotlib.style
    from matplotlib.figure import Figure

    file = StringIO()
    with matplotlib.style.context(["default", SETTINGS]):
        figure = Figure(figsize=(5.2, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", backend="svg", metadata=NO_METADATA)
    text = file.getvalue()[file.getvalue().index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)  # its rule is for every element of the page
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'<svg (.*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{in_html(label)}" ', 1)


def png(compose: Callable[[Figure], None], path: Path, size: tuple[float, float]) -> None:
    """Write a figure of ``size`` inches that ``compose`` draws.

    Raises:
        MissingPackageError: without matplotlib.
    """
    require(path)
    import matplotlib.style
    from matplotlib.figure import Figure

    file = BytesIO()
    with matplotlib.style.context(["default", SETTINGS]):
        figure = Figure(figsize=size, layout="constrained")
        compose(figure)
        figure.savefig(file, format="png", backend="agg", dpi=150)
    write_atomic(path, file.getvalue())


def errors(checks: Sequence[Check]) -> Draw | None:
    """Error of every evaluation, teacher-forced and free-running, against what is allowed; None without any."""
    forced = [check for check in checks if check.name.startswith("evaluation ") and check.errors]
    free = [check for check in checks if check.name == "trajectory" and check.errors]
    lines = [
        ("teacher-forced", OURS, "o", [one for check in forced for one in check.errors], forced),
        ("free-running", OTHER, "s", [one for check in free for one in check.errors], free),
    ]

    def draw(axes: Axes) -> None:
        for name, colour, marker, found, of in lines:
            if not of:
                continue
            shown = [one or np.nan for one in found]  # zero has no place on a logarithmic axis
            axes.plot(range(len(found)), shown, color=colour, marker=marker, ms=5, lw=1.4, label=name)
            allowed = of[0].allowed or 0.0
            axes.axhline(allowed, color=colour, lw=1.2, ls="--")
            axes.annotate(
                f"allowed {name}: {allowed:.0e}", (0, allowed), (2, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", color=colour, size=8.5,
            )  # fmt: skip
            for i in (i for i, one in enumerate(found) if one is None):
                axes.axvline(i, color=colour, ls=":", lw=1.5)
                axes.annotate(
                    "not finite ", (i, 0.04), xycoords=("data", "axes fraction"), rotation=90, ha="right", color=colour
                )
        count = max(len(found) for *_, found, _ in lines)
        axes.set(xlabel="evaluation", ylabel="relative error", yscale="log", xlim=(-0.4, count - 0.6), xticks=range(count))
        low, high = axes.get_ylim()
        axes.set_ylim(low / 2, high * 4)
        axes.legend()

    return draw if forced or free else None


def times(latency: Mapping[str, Any]) -> Draw | None:
    """Share of whole samplings that took at most so long, ours and time-conditioned; None for a report without the times."""
    sample = latency.get("sample", {})
    if "a_times" not in sample:
        return None
    lines = [(str(latency["realisation"]), OURS, "-", sample["a_times"]), ("time-conditioned", OTHER, "--", sample["b_times"])]

    def draw(axes: Axes) -> None:
        for name, colour, style, found in lines:
            median = float(np.median(found))
            axes.ecdf(found, color=colour, ls=style, lw=1.6, label=f"{name}: median {median:.2f} ms")
            axes.plot([median], [0.5], "o", color=colour, ms=6, mec="white")
        low, high, _ = limits(sample)
        axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set(xlabel="one sampling, milliseconds", ylabel="share that took at most so long", ylim=(0, 1.02))
        axes.legend()

    return draw


def limits(sample: Mapping[str, Any]) -> tuple[float, float, bool]:
    """Where the axis of the times begins and ends, and whether that leaves out a long tail of 2 %."""
    every = [*sample["a_times"], *sample["b_times"]]
    low, most, highest = min(every), float(np.percentile(every, 98)), max(every)
    cut = highest - most > most - low
    return low, most if cut else highest, cut


def spans(found: Mapping[str, Any]) -> Draw:
    """One sampling from the left to the right: a row per engine call, and the host's time in the last row."""
    calls = found["calls"]
    gaps, end = [], 0.0
    for call in calls:
        gaps.append((end, call["start"] - end))
        end = call["start"] + call["milliseconds"]
    gaps.append((end, found["milliseconds"] - end))

    def draw(axes: Axes) -> None:
        total, host = found["milliseconds"], waterfall.host_milliseconds(found)
        for row, call in enumerate(calls):
            start, took = call["start"], call["milliseconds"]
            left = start + took / 2 > total / 2  # the side where there is room
            _bars(axes, row, [(start, took)], OURS)
            place, shift = (start, -4) if left else (start + took, 4)
            axes.annotate(
                f"{took:.2f} ms",
                (place, row),
                (shift, 0),
                textcoords="offset points",
                va="center",
                ha="right" if left else "left",
            )
        _bars(axes, len(calls), gaps, OTHER)
        names = [*(call["name"] for call in calls), f"host, between:\n{host:.3f} ms, {host / total:.1%}"]
        axes.set_yticks(range(len(calls) + 1), names)
        axes.set(xlim=(0, total * 1.02), ylim=(len(calls) + 0.6, -0.6), xlabel="milliseconds after the sampling began")

    return draw


def _bars(axes: Axes, row: int, bars: Sequence[tuple[float, float]], colour: str) -> None:
    axes.broken_barh(list(bars), (row - 0.34, 0.68), facecolor=colour, edgecolor=colour, lw=0.8)


def sheet(report: Report, path: Path) -> None:
    """Write the panels of a report as one figure: images, errors, distribution of times, one sampling; those it has.

    Raises:
        MissingPackageError: without matplotlib.
    """
    shown, found = report.pictures, report.latency.get("waterfall")
    drawings = [
        None if shown is None else lambda axes: _pictures(axes, shown),
        errors(report.checks),
        times(report.latency),
        None if found is None else spans(found),
    ]
    panels = [draw for draw in drawings if draw is not None]
    rows = -(-len(panels) // 2)

    def compose(figure: Figure) -> None:
        verdict = "verified" if report.passed else "NOT verified: " + ", ".join(c.name for c in report.checks if not c.passed)
        figure.suptitle(one_line(f"{report.title}: {verdict}"), color=INK if report.passed else "#a4161a", size=12, wrap=True)
        for i, draw in enumerate(panels):
            draw(figure.add_subplot(rows, 2, i + 1))

    png(compose, path, (11.0, 0.6 + 3.9 * max(rows, 1)))


def _pictures(axes: Axes, found: Pictures) -> None:
    rows, columns, height, width, channels = found.pixels.shape
    joined = np.pad(found.pixels, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    joined = joined.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 1), columns * (width + 1), channels)
    axes.imshow(joined[..., 0] if channels == 1 else joined, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks(np.arange(columns) * (width + 1) + width / 2, [_wrap(name) for name in found.columns], size=8)
    axes.set_yticks(np.arange(rows) * (height + 1) + height / 2, found.rows, size=8)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def _wrap(name: str) -> str:
    """A column's name in lines of about a dozen letters."""
    import textwrap

    return "\n".join(textwrap.wrap(name, 14))
