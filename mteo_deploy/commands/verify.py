"""``mteo-deploy verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mteo_deploy.commands.common import (
    FINITE,
    PATH,
    device_option,
    echo,
    emit,
    json_option,
    quiet_option,
    realisation_option,
    show_table,
    verb,
)


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--engine", default="auto", show_default=True, help="auto: the newest built; all, or some by comma: compare.")
@device_option
@realisation_option
@click.option("--batch", type=int, default=1, show_default=True, help="Images per engine call in the latency part.")
@click.option("--seconds", type=FINITE, default=3.0, show_default=True, help="Time for the latency part; 0 leaves it out.")
@click.option("--max-p50-ms", type=FINITE, help="Budget: median time to sample one batch, in ms.")
@click.option("--max-p99-ms", type=FINITE, help="Budget: its 99th percentile.")
@click.option("--max-overhead", type=FINITE, help="Budget: evaluations over time-conditioned ones, e.g. 0.02.")
@click.option("--max-error", type=FINITE, help="Budget: relative error of the images against torch's.")
@click.option("--budgets", "budget_file", type=PATH, help="TOML file of budgets, e.g. max_p50_ms = 25; options go before it.")
@click.option("--against", type=PATH, help="An older report.json: fail where this run is slower.")
@click.option("--bisect", is_flag=True, help="Where an evaluation departs, name the first layer that does.")
@click.option("--costs", is_flag=True, help="Also: per evaluation, batch and thread; start, memory, energy, limit.")
@click.option(
    "-o",
    "--output",
    "outputs",
    type=PATH,
    multiple=True,
    help="Report to write, by its ending: .json, .html, .xml (JUnit), .png.",
)
@json_option
@quiet_option
@verb
def verify(
    bundle: Path,
    outputs: tuple[Path, ...],
    budget_file: Path | None,
    against: Path | None,
    max_p50_ms: float | None,
    max_p99_ms: float | None,
    max_overhead: float | None,
    max_error: float | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Check numbers against the stored torch reference, canaries, latency, budgets and an older report.

    Exit code 1 when something is wrong. -o may be given several times.

    \b
    Example:  mteo-deploy verify bundle --max-overhead 0.02 -o report.html -o report.json
              mteo-deploy verify bundle --budgets budgets.toml --against report.json -o junit.xml
              mteo-deploy verify bundle --engine all --bisect --costs -o report.html
    """
    from mteo_deploy.comparison import names_several, verify_engines
    from mteo_deploy.gates import Budgets
    from mteo_deploy.report import DRAWN, Report, check_outputs
    from mteo_deploy.verification import verify as verify_one

    check_outputs(outputs, several=names_several(options["engine"]))
    options["draw"] = any(output.suffix.lower() in DRAWN for output in outputs)
    budgets = (Budgets.read(budget_file) if budget_file else Budgets()).override(
        max_p50_ms=max_p50_ms, max_p99_ms=max_p99_ms, max_overhead=max_overhead, max_error=max_error
    )
    older = Report.read(against) if against else None
    run = verify_engines if names_several(options["engine"]) else verify_one
    report = run(bundle, quiet=quiet or as_json, budgets=budgets, older=older, **options)
    for output in outputs:
        report.save(output)
    if as_json:
        emit(report.to_json())
        sys.exit(0 if report.passed else 1)
    every = [report] if isinstance(report, Report) else report.every
    for one in every:
        title = "" if one is report else f"{one.engine} on {one.device}, {one.precision}"
        show_table(title, ["check", "", "found"], [[c.name, "ok" if c.passed else "FAILED", c.detail] for c in one.checks], 3)
        echo("")
        for line in one.latency_lines() + one.further_lines():
            echo(line)
    wrong = [c.name if one is report else f"{one.engine} {c.name}" for one in every for c in one.checks if not c.passed]
    echo("NOT verified: " + ", ".join(wrong) if wrong else "verified")
    sys.exit(0 if report.passed else 1)
