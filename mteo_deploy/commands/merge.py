"""``mteo-deploy merge``."""

from __future__ import annotations

from pathlib import Path

import click

from mteo_deploy.commands.common import PATH, echo, emit, json_option, split_numbers, verb


@click.command()
@click.argument("sets", type=PATH, nargs=-1, required=True)
@click.option("--weights", help="One for each set, by comma [default: their mean].")
@click.option("-o", "--output", type=PATH, required=True, help="Embedding set to write (.safetensors).")
@json_option
@verb
def merge(sets: tuple[Path, ...], weights: str | None, output: Path, as_json: bool) -> None:
    """The weighted sum of embedding sets of one backbone and plan.

    \b
    Example:  mteo-deploy merge first.safetensors second.safetensors -o mean.safetensors
              mteo-deploy merge euler-4.safetensors --weights 0.8 -o weaker.safetensors
    """
    from mteo_deploy.embeddings import merge as run

    merged = run(sets, output, None if weights is None else split_numbers("--weights", weights, float))
    if as_json:
        emit({"output": str(output), "sha256": merged.sha256(), **merged.training})
        return
    parts = " + ".join(f"{part['weight']:g} * {path}" for part, path in zip(merged.training["merged"], sets, strict=True))
    echo(f"{output}: {parts}")
