"""``mteo-deploy distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mteo_deploy.commands.common import (
    FINITE,
    PATH,
    backbone_options,
    echo,
    emit,
    json_option,
    null_class_option,
    open_backbone,
    parse_bytes,
    quiet_option,
    split_names,
)


@click.command()
@backbone_options
@click.option("--steps", type=int, help="Steps of the schedule [default: 4, or what a list of noise levels has].")
@click.option("--solver", default="euler", show_default=True, help="euler (DDIM), unipc-2, scheduler, ...: docs/solvers.md.")
@click.option(
    "--schedule",
    help="polynomial, logsnr, time-uniform, scheduler (the pipeline's), or noise levels by comma [default: the backbone's].",
)
@click.option("-o", "--output", type=PATH, required=True, help="Embedding set to write (.safetensors).")
@click.option("--trajectories", type=int, default=1024, show_default=True, help="Reference trajectories to learn from.")
@click.option("--iterations", type=int, default=400, show_default=True)
@click.option("--batch", type=int, default=64, show_default=True)
@click.option("--lr", type=FINITE, default=0.05, show_default=True, help="Adam's learning rate, decayed by a cosine.")
@click.option("--seed", type=int, default=1_000_000, show_default=True)
@click.option("--bf16", is_flag=True, help="Train under bf16 autocast.")
@click.option(
    "--weights", default="fp32", show_default=True, help="The backbone's, while training: fp32, or bf16 (half the memory)."
)
@click.option(
    "--precision", default="fp32", show_default=True, help="Learn against the network in int8 or fp8, as export writes it."
)
@click.option("--keep", default="", help="Layers to leave in float32 then, as patterns by comma.")
@click.option("--checkpointing", is_flag=True, help="Compute activations again for the gradient instead of keeping them.")
@click.option("--requests", type=PATH, help="npz to learn from: what the backbone wants beside the noise, [rows, ...] each.")
@click.option("--prompts", type=PATH, help="In its place: a file with a prompt on each line, for a pipeline's text encoders.")
@click.option("--teacher", default="heun", show_default=True, help="Solver of the reference trajectories.")
@click.option("--teacher-evaluations", type=int, help="Evaluations of a reference trajectory, at least [default: about 36].")
@click.option("--share", default="none", show_default=True, help="none: a vector per site; step: a vector; time: a number.")
@click.option("--objective", default="end-to-end", show_default=True, help="end-to-end or stepwise.")
@click.option("--loss", default="pseudo-huber", show_default=True, help="pseudo-huber, squared or absolute.")
@click.option("--learn", default="", help="Of the plan, too: points, coefficients, by comma [default: neither].")
@click.option("--init", type=PATH, help="Embedding set to start from, perhaps another backbone's.")
@click.option("--cache", type=PATH, help="Directory that keeps reference trajectories, not in memory, also for the next run.")
@click.option("--reference-limit", help="The most that reference trajectories may take, e.g. 20GB, in --cache or in memory.")
@click.option("--device", help="cpu or cuda [default: what torch has].")
@click.option("--guidance-scale", type=FINITE, help="Learn under classifier-free guidance of this scale: docs/guidance.md.")
@null_class_option
@json_option
@quiet_option
def distill(
    model: Path | None,
    adapter: str | None,
    size: str | None,
    tokens: int | None,
    lora: tuple[str, ...],
    controlnet: bool,
    leave_out: tuple[str, ...],
    steps: int | None,
    solver: str,
    schedule: str | None,
    output: Path,
    requests: Path | None,
    prompts: Path | None,
    learn: str,
    keep: str,
    init: Path | None,
    cache: Path | None,
    reference_limit: str | None,
    device: str | None,
    guidance_scale: float | None,
    null_class: int | None,
    as_json: bool,
    quiet: bool,
    **recipe: Any,
) -> None:
    """Learn an embedding set for a frozen backbone.

    An interrupted run goes on where it was when called again with the same arguments. Several GPUs: accelerate launch -m
    mteo_deploy.cli distill ...; see docs/distillation.md.

    Example:  mteo-deploy distill --model my-pipeline --steps 4 -o euler-4.safetensors
    """
    from mteo_deploy import assets
    from mteo_deploy.distillation import Recipe
    from mteo_deploy.distillation import distill as run
    from mteo_deploy.distillation.parallel import is_main
    from mteo_deploy.schedules import steps_of

    result = run(
        open_backbone(model, adapter, size, tokens, lora, controlnet, leave_out=leave_out) or assets.MODEL,
        output,
        steps=steps_of(schedule, steps, 4),
        solver=solver,
        schedule=schedule,
        recipe=Recipe(**recipe, learn=tuple(split_names(learn)), keep=tuple(split_names(keep))),
        requests=requests,
        prompts=prompts,
        init=init,
        cache=cache,
        reference_limit=None if reference_limit is None else parse_bytes("--reference-limit", reference_limit),
        device=device,
        guidance_scale=guidance_scale,
        null_class=null_class,
        quiet=quiet or as_json,
    )
    if not is_main():
        return
    training = result.training
    if as_json:
        emit({"output": str(output), "sha256": result.sha256(), **training})
        return
    if note := training.get("scheduler_left_out"):
        echo(f"note: {note}", err=True)
    echo(
        f"{output}: {training['parameters']} numbers learned ({training['share_of_backbone']:.3%} of the backbone) in "
        f"{training['seconds']:.0f} s; error against the reference "
        f"{training['error_before']:.4f} -> {training['error_after']:.4f}"
    )
