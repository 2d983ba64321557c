"""``mteo-deploy profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mteo_deploy.commands.common import (
    PATH,
    device_option,
    echo,
    emit,
    engine_option,
    json_option,
    quiet_option,
    realisation_option,
    show_table,
    verb,
)


@click.command()
@click.argument("bundle", type=PATH)
@engine_option
@device_option
@realisation_option
@click.option("--batch", type=int, default=1, show_default=True, help="Images per engine call.")
@click.option("--loops", type=int, default=20, show_default=True, help="Samplings to time.")
@click.option("--top", type=int, default=8, show_default=True, help="How many of the longest layers to list.")
@click.option("-o", "--output", type=PATH, help="Write JSON here; a Chrome trace for a name ending in .trace.json.")
@json_option
@quiet_option
@verb
def profile(bundle: Path, output: Path | None, top: int, as_json: bool, quiet: bool, **options: Any) -> None:
    """Where the time of one sampling goes, by what layers do, beside ordinary time conditioning.

    Decoder and text encoder are the same for both: they are in the list of graphs.

    Example:  mteo-deploy profile bundle -o sample.trace.json
    """
    from mteo_deploy.files import check_file
    from mteo_deploy.profiling import profile as run

    if output:
        check_file(output)
    found = run(bundle, quiet=quiet or as_json, **options)
    if output:
        found.save(output)
    if as_json:
        emit(found.to_json())
        return
    groups = found.groups()
    total = [sum(pair[i] for pair in groups.values()) for i in range(2)]
    rows = [
        [name, f"{ours:.3f}", f"{ours / total[0]:.1%}", f"{theirs:.3f}", f"{ours - theirs:+.3f}"]
        for name, (ours, theirs) in [*groups.items(), ("all", (total[0], total[1]))]
    ]
    title = f"{found.engine} on {found.device}, {found.precision}, batch {found.batch}: ms in one sampling"
    show_table(title, ["layers", found.realisation, "share", "time-conditioned", ""], rows)
    graphs = found.graphs()
    show_table("", ["graph", "ms in one sampling"], [[name, f"{took:.3f}"] for name, took in graphs.items()])
    longest = sorted([*found.layers, *found.beside], key=lambda layer: -layer.milliseconds)[:top]
    rows = [[layer.name[-60:], layer.kind, layer.graph, f"{layer.milliseconds:.3f}"] for layer in longest]
    show_table("", ["longest layers", "kind", "graph", "ms in one sampling"], rows)
    echo("times with profiling switched on: for shares and differences; for totals see: mteo-deploy verify")
