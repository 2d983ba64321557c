"""The page a report becomes: one HTML file that asks for nothing, with images inside and nothing to run.

Read on a wide screen, on a telephone, on paper, or aloud: tables are tables, every drawing says in words what it shows, and
what a colour tells is told by a word too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteo_deploy import bisection, costs, images, inspection, plots, waterfall
from mteo_deploy.text import in_html

if TYPE_CHECKING:
    from mteo_deploy.numerics import Check
    from mteo_deploy.pictures import Pictures
    from mteo_deploy.report import Report

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Has the browser refuse whatever would leave the page."""

SHOWN = 96
"""CSS pixels that an image is wide at least, by whole multiples of its own."""

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1f2328; background: #fff;
  max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.1rem; margin: 0; color: #57606a; font-weight: 600 }
h2 { font-size: 1.5rem; line-height: 1.3; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere }
header + h2 { margin-top: .5rem }
h3 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #d0d7de }
p { margin: .4rem 0; max-width: 62rem; overflow-wrap: anywhere }
nav a { margin-right: 1rem } a { color: #0550ae }
.verdict { display: inline-block; padding: .15rem .7rem; border-radius: 1rem; font-weight: 600; border: 2px solid }
.ok { color: #116329 } .failed { color: #a4161a; font-weight: 600 }
.doubt { border-left: 4px solid #bf8700; background: #fff8e5; padding: .4rem .8rem } .note { color: #57606a; font-size: .9rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0; padding: 0 }
.tiles div { border: 1px solid #d0d7de; border-radius: .5rem; padding: .6rem .8rem }
.tiles dt { color: #57606a; font-size: .85rem } .tiles dd { margin: 0; font-size: 1.35rem; font-weight: 600 }
.tiles dd small { display: block; font-size: .85rem; font-weight: 400; color: #57606a }
.wide { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e8ec }
thead th { border-bottom: 1px solid #8c959f } .n { text-align: right }
.pictures td, .pictures th { border: 0; padding: .15rem .3rem .15rem 0; font-size: .8rem; font-weight: 400; color: #57606a;
  vertical-align: bottom }
.pictures tbody th { vertical-align: middle; min-width: 4.5rem } .pictures img { display: block }
img { image-rendering: pixelated } p img { max-width: 100% }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem 2rem }
figure { margin: .5rem 0; max-width: 36rem } figure svg { width: 100%; height: auto; display: block }
figcaption { font-size: .9rem; color: #57606a }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0 }
@media (max-width: 40rem) { body { font-size: 15px } td, th { padding-right: .55rem }
  .detail td:last-child { overflow-wrap: anywhere } .pictures img { width: max(2.4rem, 12vw); height: auto }
  .pictures td, .pictures th { font-size: .62rem; width: auto !important } .pictures tbody th { min-width: 0 } }
@media (min-width: 64rem) { .beside { display: grid; grid-template-columns: 1.3fr 1fr; gap: 2rem; align-items: start } }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt } h2 { break-before: page }
  header + h2 { break-before: auto } figure, tr, .tiles div { break-inside: avoid }
  h3 { break-after: avoid } nav { display: none } .wide { overflow: visible } }
"""


def document(title: str, body: str) -> str:
    """A whole HTML file around a body."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{in_html(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def page(*reports: Report, picture: Path | None = None, caption: str = "") -> str:
    """One HTML page of reports, one after the other.

    Args:
        picture: PNG file to show above them.
        caption: what it shows.
    """
    parts = ["<header><h1>mteo-deploy report</h1></header>"]
    if len(reports) > 1:
        links = (f'<a href="#r{i}">{in_html(one.title)}</a>' for i, one in enumerate(reports))
        parts.append(f"<nav>{' '.join(links)}</nav>")
    if picture is not None:
        parts.append(f"<p>{_image(picture.read_bytes(), caption)}</p><p>{in_html(caption)}</p>")
    parts += [_report(report, f"r{i}") for i, report in enumerate(reports)]
    names = ", ".join(dict.fromkeys(report.bundle for report in reports))
    return document(f"mteo-deploy report: {names}", "\n".join(parts))


def _report(report: Report, name: str) -> str:
    failed = [check.name for check in report.checks if not check.passed]
    verdict = "verified" if report.passed else "NOT verified"
    count = (
        f"{len(report.checks)} checks passed"
        if report.passed
        else f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(failed)}"
    )
    sections = {
        "Images": _pictures(report.pictures),
        "Numbers": _numbers(report.checks, name),
        "Bisection": _paragraphs(bisection.lines(report.bisection)),
        "Latency": _latency(report, name),
        "Costs": _paragraphs(costs.lines(report.costs)),
        "Precision": _precision(report.compiler.get("precision")) + _auto(report.compiler.get("auto")),
        "Compiler": _compiler(report.compiler),
        "Environment": table(["", ""], [[k, v] for k, v in report.environment.items()]) if report.environment else "",
    }
    kind, mark = ("ok", "✓") if report.passed else ("failed", "✗")
    return (
        f'<h2 id="{name}">{in_html(report.title)}: {verdict}</h2>\n'
        f'<p><span class="verdict {kind}">{mark} {verdict}</span> {in_html(count)}</p>'
        + _tiles(report)
        + "\n".join(f"<section><h3>{title}</h3>\n{body}</section>" for title, body in sections.items() if body)
    )


def _paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p>{in_html(line)}</p>" for line in lines)


def _tiles(report: Report) -> str:
    """The figures that a reader looks for first."""
    tiles: list[tuple[str, str, str]] = []
    for check in report.checks:
        if check.name == "trajectory" and check.errors:
            error = "not finite" if check.errors[-1] is None else f"{check.errors[-1]:.1e}"
            tiles.append(("error of the images", error, f"relative, against torch; allowed {check.allowed:.0e}"))
    if report.latency:
        loop, sample = report.latency["loop"], report.latency["sample"]
        many = f"batch {report.latency['batch']}, {report.latency['evaluations']} evaluations"
        tiles.append(("one sampling, median", f"{loop['a_p50']:.2f} ms", many))
        interval = f"[{sample['ratio_low']:.3f}, {sample['ratio_high']:.3f}], 95 %"
        tiles.append(("over time-conditioned", f"{sample['ratio']:.3f}", interval))
    if report.compiler:
        before, after = report.compiler["time_conditioned"], _last(report.compiler["graphs"][0])
        fewer = f"{before['nodes']} nodes before, {after['nodes']} in {report.compiler['graphs'][0]['graph'].split('/')[-1]}"
        tiles.append(("parameters folded away", f"{before['parameters'] - after['parameters']:,}", fewer))
    made = "".join(f"<div><dt>{a}</dt><dd>{in_html(b)}<small>{in_html(c)}</small></dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{made}</dl>\n' if tiles else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: int | None = None, caption: str = "") -> str:
    """An HTML table; cells that :class:`Raw` marks stand as they are.

    Args:
        numeric: column from which on cells are numbers.
    """

    def cell(tag: str, i: int, text: str) -> str:
        kind = ' class="n"' if numeric is not None and i >= numeric else ""
        return f"<{tag}{kind}>{text if isinstance(text, Raw) else in_html(text)}</{tag}>"

    top = f"<thead><tr>{''.join(cell('th', i, text) for i, text in enumerate(head))}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    title = f"<caption>{in_html(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}{top}<tbody>{body}</tbody></table></div>'


class Raw(str):
    """HTML that is not to be escaped again."""


def figure(draw: plots.Draw | None, name: str, caption: str, height: float = 2.9) -> str:
    """A drawing with its caption; nothing without matplotlib, or where there is nothing to draw."""
    if draw is None or not plots.available():
        return ""
    return f"<figure>{plots.svg(draw, name, caption, height)}<figcaption>{in_html(caption)}</figcaption></figure>"


def no_plots() -> str:
    """The line that stands in the drawings' place where there is no matplotlib."""
    return "" if plots.available() else f'<p class="note">for plots: {in_html(plots.INSTALL)}</p>'


def _image(data: bytes, alt: str, width: int | None = None, height: int | None = None) -> str:
    size = f' width="{width}" height="{height}"' if width and height else ""
    return f'<img alt="{in_html(alt)}"{size} src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _pictures(found: Pictures | None) -> str:
    """Rows are noises, columns evaluations; every image a PNG of its own."""
    if found is None:
        return ""
    height, width = found.pixels.shape[2:4]
    times = max(1, -(-SHOWN // width))
    head = "".join(f'<th scope="col" style="width:{width * times}px">{in_html(name)}</th>' for name in found.columns)
    rows = []
    for row, name in zip(found.pixels, found.rows, strict=True):
        cells = (
            _image(images.png(one), f"{name}, {column}", width * times, height * times)
            for one, column in zip(row, found.columns, strict=True)
        )
        rows.append(f'<tr><th scope="row">{in_html(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    made = f'<table class="pictures"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return (
        f'<div class="wide">{made}</div><p class="note">The state after every evaluation, clipped to [-1, 1]. Every row begins '
        f"with one noise of the stored reference, seed {found.seed}.</p>"
    )


def _numbers(checks: Sequence[Check], name: str) -> str:
    marks = [Raw(f'<span class="{"ok" if c.passed else "failed"}">{"ok" if c.passed else "FAILED"}</span>') for c in checks]
    rows = [[c.name, mark, c.detail] for c, mark in zip(checks, marks, strict=True)]
    drawing = plots.errors(checks)
    caption = (
        "Relative error against torch. Teacher-forced: each evaluation is given torch's own state; free-running: its "
        "predecessor's. Dashed: what is allowed."
    )
    missing = no_plots() if drawing else ""
    made = table(["check", "", "found"], rows)
    return f'<div class="beside"><div class="detail">{made}</div>{figure(drawing, f"{name}-errors", caption)}</div>{missing}'


def _latency(report: Report, name: str) -> str:
    found = report.latency
    if not found:
        return ""
    doubtful = ' class="doubt"' if found["doubts"] else ""
    *lines, last = report.latency_lines()  # the last one says why the times are not to be trusted, where they are not
    said = "".join(f"<p>{in_html(line)}</p>" for line in lines) + f"<p{doubtful}>{in_html(last)}</p>"
    drawings = [figure(plots.times(found), f"{name}-times", _times_caption(found))]
    calls = found.get("waterfall")
    if calls:
        caption = (
            f"One sampling, the median one of {calls['loops']}: {calls['milliseconds']:.2f} ms, of which the host, outside the "
            f"engine calls, {waterfall.host_milliseconds(calls):.3f} ms."
        )
        drawings.append(figure(plots.spans(calls), f"{name}-calls", caption, 1.1 + 0.36 * len(calls["calls"])))
    return f'{said}<div class="plots">{"".join(drawings)}</div>{no_plots()}{_calls(calls)}'


def _times_caption(found: Mapping[str, Any]) -> str:
    sample = found["sample"]
    outside = " The slowest 2 % lie outside." if "a_times" in sample and plots.limits(sample)[2] else ""
    return (
        f"Whole samplings of batch {found['batch']}, {sample['pairs']} interleaved pairs: {found['realisation']} over "
        f"time-conditioned, median of the pairs' ratios {sample['ratio']:.3f}, 95 % interval "
        f"[{sample['ratio_low']:.3f}, {sample['ratio_high']:.3f}].{outside}"
    )


def _calls(found: Mapping[str, Any] | None) -> str:
    """The waterfall as a table, for who does not see it."""
    if not found:
        return ""
    rows = [[call["name"], f"{call['start']:.3f}", f"{call['milliseconds']:.3f}"] for call in found["calls"]]
    rows.append(["host, outside the engine calls", "", f"{waterfall.host_milliseconds(found):.3f}"])
    made = table(["one sampling", "begins at, ms", "takes, ms"], rows, numeric=1)
    return f"<details><summary>Engine calls of one sampling</summary>{made}</details>"


def _last(graph: Mapping[str, Any]) -> dict[str, Any]:
    after: dict[str, Any] = graph["passes"][-1]["after"]
    return after


def _compiler(found: Mapping[str, Any]) -> str:
    """Every graph's size after every pass, graphs that went the same way together, and what became of the sites."""
    if not found:
        return ""
    rows = [["time-conditioned network, before any pass", "", *_size(found["time_conditioned"]), "", ""]]

    def way(graph: Mapping[str, Any]) -> list[Any]:
        return [graph["removed_weights"], [[p["name"], p["modified"], p["before"], p["after"]] for p in graph["passes"]]]

    for _, same in groupby(found["graphs"], way):
        graphs = list(same)
        names = [one["graph"].removeprefix("graphs/") for one in graphs]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} graphs, each)"
        before = graphs[0]["passes"][0]["before"]
        rows.append([name, "from", *_size(before), "", ""])
        for i, one in enumerate(graphs[0]["passes"]):
            errors = [p["error"] for p in (graph["passes"][i] for graph in graphs) if p["error"] is not None]
            removed = f"{graphs[0]['removed_weights']}" if i == len(graphs[0]["passes"]) - 1 else ""
            after = one["name"] if one["modified"] else f"{one['name']} (nothing to do)"
            rows.append(["", after, *_size(one["after"]), f"{max(errors):.1g}" if errors else "not compared", removed])
    head = ["graph", "after pass", "nodes", "parameters", "bytes", "outputs changed by", "weights folded away"]
    return table(head, rows, numeric=2) + _sites(found["sites"])


SENSITIVE = 12
"""Layers that the page lists as the most sensitive."""

IMAGE_ERRORS = (("all images together", "images"), ("the median image", "median_image"))
"""Names for a reader of the errors of whole trajectories."""


def _auto(found: Mapping[str, Any] | None) -> str:
    """What ``export --precision auto`` tried."""
    if not found:
        return ""
    title = f"Measured at export, the median image's error at most {found['max_error']:g}"
    return table(inspection.TRIED, inspection.tried_rows(found), caption=title)


def _precision(found: Mapping[str, Any] | None) -> str:
    """What lowering did: errors by evaluation, layers that stayed in float32 and why, the most sensitive layers."""
    if not found:
        return ""
    parts = [f"<p>{in_html(found['name'])}: {in_html(inspection.layer_fates(found))}</p>"]
    ways = [(title, found[key]) for title, key in (("error", "errors"), ("with one scale for all", "pooled")) if key in found]
    if ways:
        lines = [[str(i), *(f"{way['evaluations'][i]:.1e}" for _, way in ways)] for i in range(len(ways[0][1]["evaluations"]))]
        lines += [[what, *(f"{way[key]:.1e}" for _, way in ways)] for what, key in IMAGE_ERRORS]
        off = found.get("left_in_float32", [])
        if any(off):
            lines = [[*line, f"{len(off[i])}" if i < len(off) else ""] for i, line in enumerate(lines)]
        head = ["evaluation", *(title for title, _ in ways), *(["left in float32 for --max-error"] if any(off) else [])]
        parts.append(table(head, lines, numeric=1, caption="Relative error against float32"))
    if kinds := inspection.kind_rows(found):
        title = f"Time of an evaluation in {found['engine']}, by kind of layer, over that with all quantised"
        parts.append(table(inspection.KINDS, kinds, numeric=1, caption=title))
    loudest = sorted(found.get("sensitivity", []), key=lambda row: max(row["errors"]), reverse=True)[:SENSITIVE]
    if loudest:
        rows = [[row["layer"], *(f"{error:.1e}" for error in row["errors"]), f"{row['work']:.1%}"] for row in loudest]
        head = ["layer, quantised alone", *(f"evaluation {i}" for i in range(len(loudest[0]["errors"]))), "share of the work"]
        parts.append(f"<details><summary>The most sensitive layers</summary>{table(head, rows, numeric=1)}</details>")
    return "".join(parts)


def _size(found: Mapping[str, int]) -> list[str]:
    return [f"{found[name]:,}" for name in ("nodes", "parameters", "bytes")]


def _sites(sites: Sequence[Mapping[str, Any]]) -> str:
    kinds = sorted({kind for site in sites for where in site["constants"].values() for kind in where})
    rows = [
        [site["site"], *("; ".join(dict.fromkeys(w[kind] for w in site["constants"].values() if kind in w)) for kind in kinds)]
        for site in sites
    ]
    made = f'<div class="detail">{table(["site", *kinds], rows)}</div>'
    return f"<details><summary>What became of the {len(sites)} sites</summary>{made}</details>" if rows else ""
