"""``mteo-deploy bench``."""

from __future__ import annotations

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
    show_table,
    split_numbers,
    verb,
)


@click.command()
@click.argument("bundles", type=PATH, nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--engine", default="all", show_default=True, help="Names by comma, or all that are built.")
@device_option
@click.option("--precision", default="all", show_default=True, help="Names by comma, or all that are built.")
@click.option("--batch", default="1", show_default=True, help="Images per engine call, sizes by comma.")
@click.option("--seconds", type=FINITE, default=10.0, show_default=True, help="Time for the timing, all batch sizes together.")
@click.option("--num", type=int, default=64, show_default=True, help="Images for the error.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of their noise.")
@click.option("--plain", is_flag=True, help="Add the plain solver on the time-conditioned graph, for every bundle and engine.")
@click.option("-o", "--output", "outputs", type=PATH, multiple=True, help="To write, by its ending: .html, .json, .csv, .png.")
@json_option
@quiet_option
@verb
def bench(bundles: tuple[Path, ...], batch: str, outputs: tuple[Path, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Compare bundles of one backbone: error of the images against time.

    The error is against the reference trajectory of the same noise. All candidates are open at once while they are timed:
    they need memory together. -o may be given several times.

    Example:  mteo-deploy bench euler-3 euler-4 euler-8 --plain -o bench.html
    """
    from mteo_deploy.benchmarking import bench as run
    from mteo_deploy.tradeoff import COLUMNS, check_tradeoff_outputs

    check_tradeoff_outputs(outputs)
    found = run(bundles, batch=split_numbers("--batch", batch, int), quiet=quiet or as_json, **options)
    for output in outputs:
        found.save(output)
    if as_json:
        emit(found.to_json())
        return
    for size in found.batches:
        show_table(f"batch {size}", COLUMNS, found.rows(size), words=2)
        echo("")
    for line in found.lines():
        echo(line)
