"""``mteo-deploy sample``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mteo_deploy.commands.common import (
    FINITE,
    PATH,
    device_option,
    echo,
    emit,
    engine_option,
    json_option,
    parse_size,
    quiet_option,
    realisation_option,
    split_numbers,
    verb,
)
from mteo_deploy.errors import InputError


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--num", type=int, default=16, show_default=True, help="How many images.")
@click.option("--seed", type=int, default=0, show_default=True, help="Image i depends on (seed, i) only.")
@click.option("--batch", type=int, default=16, show_default=True, help="Images per engine call.")
@click.option("--size", help="HEIGHTxWIDTH of the state, if the bundle leaves them open [default: the backbone's own].")
@click.option("-o", "--output", default="grid.png", show_default=True, help=".png (grid), .npz, or a folder (end it in /).")
@engine_option
@device_option
@realisation_option
@click.option("--tables", type=PATH, help="Another bundle, whose embeddings and steps to use in this one's table engine.")
@click.option("--prompt", multiple=True, help="For all images; repeatable: one for each. Needs a bundle with a text encoder.")
@click.option("--negative-prompt", multiple=True, help="Likewise, for a bundle with guidance [default: the empty one].")
@click.option("--latents", is_flag=True, help="Leave them as they are, where the bundle could decode them.")
@click.option(
    "--tile", type=int, help="Decode larger images in tiles of so many latents; 0: whole [default: the bundle's own]."
)
@click.option("--class-labels", help="For a backbone with classes: one label, or as many as images, by comma.")
@click.option("--guidance-scale", type=FINITE, help="For a bundle with guidance [default: what it was exported with].")
@click.option(
    "--requests", "request_file", type=PATH, help="npz of request inputs (prompt embeddings): one each, or as many as images."
)
@json_option
@quiet_option
@verb
def sample(
    bundle: Path,
    num: int,
    seed: int,
    batch: int,
    size: str | None,
    output: str,
    latents: bool,
    tile: int | None,
    prompt: tuple[str, ...],
    negative_prompt: tuple[str, ...],
    class_labels: str | None,
    guidance_scale: float | None,
    request_file: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Draw images from a built bundle.

    \b
    Example:  mteo-deploy sample bundle --num 64 --seed 0 --batch 16 -o grid.png
              mteo-deploy sample bundle --size 32x48 -o grid.png
              mteo-deploy sample bundle --prompt "a castle in the sea" --num 4 -o castles
    """
    import time

    from mteo_deploy import images
    from mteo_deploy import requests as given
    from mteo_deploy.outputs import draw_into, settings_of
    from mteo_deploy.progress import reporter
    from mteo_deploy.sample_request import SampleRequest
    from mteo_deploy.sampler import Sampler

    if not output:
        raise InputError("expected a path with -o/--output; found an empty one")
    place, folder = Path(output), output.endswith(("/", os.sep))
    images.check_output(place, folder=folder)
    requests: dict[str, Any] = {} if request_file is None else given.read(request_file)
    requests |= {} if class_labels is None else {"class_labels": split_numbers("--class-labels", class_labels, int)}
    requests |= {} if guidance_scale is None else {given.GUIDANCE_SCALE: guidance_scale}
    texts = list(prompt) or None, list(negative_prompt) or None
    asked = SampleRequest(num, seed, batch, requests, None if size is None else parse_size(size), latents, *texts, tile)
    with Sampler.load(bundle, **options) as sampler, reporter(quiet or as_json) as report:
        shape = sampler.bundle.shape_at(asked.size) if latents else sampler.bundle.image_shape_at(asked.size)
        images.check_output(place, shape, folder)
        clock = time.perf_counter()
        task = report.task("sampling", num)
        settings = settings_of(sampler, asked, options["tables"])
        there = draw_into(place, asked, settings, sampler.drawing(asked), lambda n: report.advance(task, n), folder)
        seconds, decoding = time.perf_counter() - clock, sampler.decoding
    if as_json:
        known = {"output": output, "num": num, "seed": seed, "batch": batch}
        emit({**known, "there": there, "seconds": seconds, "decoding": decoding})
        return
    without = sampler.bundle.manifest.get("left_out", {}).get("decoder")
    share = f", {decoding / seconds:.0%} of it decoding" if sampler.bundle.decoder and not latents else ""
    made = f", {there} of them were there" if there else ""
    echo(f"{output}: {num} images of {len(sampler.plan.evaluations)} evaluations each in {seconds:.2f} s{share}{made}")
    if without is not None:
        echo(f"these are latents: {without}")
