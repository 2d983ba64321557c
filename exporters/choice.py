"""Which embedding set an export takes: one that is given, a packaged one, or the pretrained embeddings; and its guidance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mteo_deploy import assets
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.schedules import steps_of
from mteo_deploy.solvers import canonical


def pretrained_set(
    adapter: Adapter, steps: int | None, solver: str, schedule: str | Sequence[float] | None = None
) -> EmbeddingSet:
    """The embedding set of zero deltas: the plain solver."""
    plan = adapter.compile_plan(steps, solver, schedule)
    deltas = {site.name: np.zeros((len(plan.evaluations), site.width), np.float32) for site in adapter.sites}
    return EmbeddingSet(deltas, plan, adapter.fingerprint())


def choose(
    model: Path | str | None,
    embeddings: Path | EmbeddingSet | None,
    steps: int | None,
    solver: str | None,
    schedule: str | Sequence[float] | None,
    plain: bool,
    adapter: Adapter,
) -> EmbeddingSet:
    """The embedding set to export, by the arguments of :func:`~mteo_deploy.exporters.export.export`.

    Raises:
        InputError: where there is none, arguments exclude each other, or the set is of other steps or another solver.
    """
    if schedule is not None and not plain:
        raise InputError("expected --schedule with --plain only; an embedding set has its own; leave it out")
    if plain and embeddings is not None:
        raise InputError("expected --embeddings FILE or --plain (nothing learned); found both; leave one out")
    if plain:
        chosen = pretrained_set(adapter, steps_of(schedule, steps, 4), solver or "euler", schedule)
    elif isinstance(embeddings, EmbeddingSet):
        chosen = embeddings
    elif embeddings is not None:
        chosen = EmbeddingSet.load(embeddings)
    elif adapter.pipeline is not None and assets.embedding_sets(adapter.pipeline.path):
        chosen = EmbeddingSet.load(assets.embeddings(4 if steps is None else steps, solver, adapter.pipeline.path))
    else:
        raise InputError(
            f"expected an embedding set for {model}; pass --embeddings FILE, make one with: mteo-deploy distill --model "
            f"{model} --steps {steps or 4} -o embeddings.safetensors; or pass --plain for the pretrained embeddings"
        )
    if steps is not None and chosen.plan.steps != steps:
        raise InputError(
            f"expected an embedding set for --steps {steps}; found one for {chosen.plan.steps}; "
            f"make one with: mteo-deploy distill --steps {steps} -o embeddings.safetensors"
        )
    if solver is not None and chosen.plan.solver != canonical(solver):
        raise InputError(
            f"expected an embedding set for --solver {solver}; found one for {chosen.plan.solver}; "
            f"make one with: mteo-deploy distill --solver {solver} -o embeddings.safetensors"
        )
    return chosen


def guidance_of(
    chosen: EmbeddingSet, plain: bool, scale: float | None, null_class: int | None
) -> tuple[float | None, int | None]:
    """Scale and null class to export with: those that a set was learned at.

    Raises:
        InputError: when others are asked for than the set's.
    """
    if plain:
        return scale, null_class
    learned = chosen.guidance
    for option, asked, own in (("--guidance-scale", scale, learned[0]), ("--null-class", null_class, learned[1])):
        if asked is not None and asked != own:
            at = "without one" if own is None else f"at {own:g}"
            raise InputError(
                f"expected {option} as the embedding set was learned, {at}; found {asked:g}; leave it out, or make a set with: "
                f"mteo-deploy distill {option} {asked:g} -o embeddings.safetensors"
            )
    return learned
