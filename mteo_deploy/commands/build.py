"""``mteo-deploy build``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mteo_deploy.commands.common import PATH, echo, emit, json_option, named_values, quiet_option, split_numbers, verb
from mteo_deploy.text import command


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--engine", default="auto", show_default=True, help="onnxruntime, openvino, tensorrt, or auto: time them.")
@click.option("--device", help="Where it runs the graphs [default: the engine's best].")
@click.option("--realisation", default="auto", show_default=True, help="baked, table, fused, or auto: time them.")
@click.option(
    "--precision", default="fp32", show_default=True, help="fp32 or bf16: what it may compute in where types say no less."
)
@click.option("--batch", help="Batch sizes to compile for, by comma; the first is timed [default: export's, else any].")
@click.option(
    "--option",
    "given",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the engine's own; repeatable; doctor lists them.",
)
@click.option("--threads", type=int, help="Threads inside an operator [default: the engine's choice].")
@json_option
@quiet_option
@verb
def build(bundle: Path, batch: str | None, given: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Make a bundle's graphs ready in an engine.

    \b
    Example:  mteo-deploy build bundle
              mteo-deploy build bundle --engine openvino --precision bf16 --batch 1,8
              mteo-deploy build bundle --engine onnxruntime --option spinning=off
    """
    from mteo_deploy.engines.build import build as run

    sizes = [] if batch is None else split_numbers("--batch", batch, int)
    directory = run(bundle, batch=sizes, engine_options=named_values("--option", given), quiet=quiet or as_json, **options)
    record = json.loads((directory / "engine.json").read_text())
    if as_json:
        emit(record)
        return
    measured = record["measured"]
    for loops in (measured.get("engines", {}), measured):
        for name, ratio in loops.get("loops", {}).items():
            interval = f"[{ratio['ratio_low']:.3f}, {ratio['ratio_high']:.3f}]"
            echo(f"{name} / {loops['against']}, whole loop at batch {loops['batch']}: {ratio['ratio']:.3f} {interval}")
    for name, problem in measured.get("engines", {}).get("refused", {}).items():
        echo(f"{name} left out: {problem}")
    if decoder := measured.get("decoder"):
        echo(
            f"decoder at batch {decoder['batch']}: {decoder['milliseconds']:.2f} ms, {decoder['share']:.0%} of a whole sampling"
        )
    if record["missed"]:
        echo(f"{record['missed']['name']} did not fit: {'; '.join(record['missed']['changed'])}")
    echo(f"built {directory}, realisation {record['realisation']}")
    echo(f"next: {command('mteo-deploy', 'sample', bundle)} --num 64 -o grid.png")
