"""``mteo-deploy evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
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
    split_numbers,
    verb,
)


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--data", type=PATH, required=True, help="Real images: folder, zip or tar of one, npz; or npz with mu, sigma.")
@click.option("--features", default="inception", show_default=True, help="inception (torch-fidelity), or a network as .onnx.")
@click.option("--num", type=int, default=10_000, show_default=True, help="Images of each sampler, for each seed.")
@click.option("--seeds", default="0", show_default=True, help="Of the noise, by comma.")
@click.option("--batch", type=int, default=250, show_default=True, help="Images per engine call.")
@engine_option
@device_option
@realisation_option
@click.option(
    "--requests", type=PATH, help="npz of what the backbone wants beside the noise, [rows, ...] each; rows are drawn."
)
@json_option
@quiet_option
@verb
def evaluate(bundle: Path, data: Path, seeds: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Fréchet distance of a built bundle's images to real ones, beside the plain solver's and the reference trajectory's.

    A feature network in ONNX takes float32 images [n, channels, height, width] in [-1, 1]; its first output are the features.

    \b
    Example:  mteo-deploy evaluate bundle --data images.zip
              mteo-deploy evaluate bundle --data mnist_test.npz --features classifier.onnx --seeds 0,1,2
    """
    from mteo_deploy.evaluation import evaluate as run

    found = run(bundle, data, seeds=split_numbers("--seeds", seeds, int), quiet=quiet or as_json, **options)
    if as_json:
        emit(found.to_json())
        return
    rows = [
        [name, f"{one.evaluations}", _spread(one.frechet, ".2f"), _spread(one.error, ".4f")]
        for name, one in found.samplers.items()
    ]
    context = found.context
    title = f"{context['num']} images against {context['data']}, features {context['features']}"
    show_table(title, ["sampler", "evaluations", "Fréchet distance", "squared error"], rows)
    closed = [share for share in found.gap_closed if share is not None]
    echo(f"gap closed: {_spread(closed, '.1%')}" if closed else "no gap: the plain solver is as near as the reference")


def _spread(values: Sequence[float], form: str) -> str:
    """Mean, and where there are several the range they span."""
    mean = format(sum(values) / len(values), form)
    return mean if len(values) == 1 else f"{mean} [{min(values):{form}}, {max(values):{form}}]"
