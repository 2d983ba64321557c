"""The reference of a bundle: noise, and the states that the torch sampler makes of it, so that ``verify`` needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, embeddings_at
from mteo_deploy.exporters.pipeline import Pipeline
from mteo_deploy.exporters.text import TextEncoder
from mteo_deploy.files import save_tensors
from mteo_deploy.plan import Plan, default_substeps, reference_plan, run
from mteo_deploy.sampler import noise_for

FILE = "reference/reference.safetensors"
SEED, COUNT, OTHER_COUNT, DECODED_COUNT = 20260322, 4, 2, 2
"""Of the noise; images of the backbone's own size, of another, and how many of each are decoded."""
PROMPTS = ("A photograph of an astronaut riding a horse.", "", "two cats & 1 café, 日本")


def write_reference(
    adapter: Adapter, embeddings: EmbeddingSet, pipeline: Pipeline, directory: Path, size: tuple[int, ...]
) -> dict[str, Any]:
    """Run the torch sampler, and write what it took in and made.

    Noise and the states after every evaluation; some of the images where the last state is latents, and what text encoders
    make of fixed prompts.

    Args:
        directory: of the bundle.
        size: height and width to store a second trajectory of; the backbone's own for none.

    Returns:
        What the manifest says of it.
    """
    requests = adapter.draw_requests(COUNT, SEED)
    others, own = adapter.sample_shape[:-2], adapter.sample_shape[-2:]
    found = _torch_trajectory(adapter, embeddings, adapter.sample_shape, requests)
    if size != own:
        part = {name: values[:OTHER_COUNT] for name, values in requests.items()}
        other = _torch_trajectory(adapter, embeddings, (*others, *size), part, OTHER_COUNT)
        found |= {f"other/{name}": values for name, values in other.items()}
    if pipeline.decoder is not None:
        found |= _decoded(pipeline, found)
    if pipeline.text_encoder is not None:
        found |= _encoded(pipeline.text_encoder)
    found |= {f"request/{name}": values for name, values in requests.items()}
    _check_finite(found)
    path = directory / FILE
    path.parent.mkdir()
    save_tensors(save_file, {name: values.contiguous().numpy() for name, values in found.items()}, path)  # as it lies in memory
    plan = reference_plan(embeddings.plan, adapter.levels, default_substeps(embeddings.plan))
    return {"file": FILE, "seed": SEED, "count": COUNT, "prompts": list(PROMPTS), "plan": plan.to_json()}


def _check_finite(found: Mapping[str, torch.Tensor]) -> None:
    """What everything is compared with must be numbers.

    Raises:
        InputError: naming the tensor, and the evaluation where it is of a trajectory.
    """
    for name, values in found.items():
        if not values.is_floating_point() or bool(torch.isfinite(values).all()):
            continue
        first = next(i for i, one in enumerate(values) if not bool(torch.isfinite(one).all()))
        where = f"evaluation {first} of {len(values)}" if name.endswith(("states", "kept")) else f"row {first}"
        raise InputError(
            f"expected finite numbers of the torch reference; found NaN or Inf in {name}, first at {where}: the backbone, a "
            "part of its pipeline or the embedding set diverges; pass other weights, another set, or other --steps"
        )


@torch.no_grad()
def _decoded(pipeline: Pipeline, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``images`` ``[count, 3, ...]`` of the first of the last states, of each size."""
    last = {name.removesuffix("states"): values[-1] for name, values in found.items() if name.endswith("states")}
    each = {size: [pipeline.decode(one) for one in latents[:DECODED_COUNT].split(1)] for size, latents in last.items()}
    return {f"{size}images": torch.cat(images) for size, images in each.items()}


def _encoded(encoder: TextEncoder) -> dict[str, torch.Tensor]:
    """``text/<input>`` and ``text/<output>``: token ids of fixed prompts, and what torch makes of them."""
    tokens = encoder.tokenise(PROMPTS)
    return {f"text/{name}": torch.from_numpy(values) for name, values in {**tokens, **encoder.run(tokens)}.items()}


@torch.no_grad()
def _torch_trajectory(
    adapter: Adapter,
    embeddings: EmbeddingSet,
    shape: tuple[int, ...],
    requests: Mapping[str, torch.Tensor],
    count: int = COUNT,
) -> dict[str, torch.Tensor]:
    """``noise [count, *shape]``; ``states`` and ``kept`` ``[evaluations, count, *shape]`` of the torch sampler, image by image:
    what lies between the layers of a large network is much for several."""
    noise = torch.from_numpy(noise_for(shape, SEED, range(count)))
    values = [embeddings_at(adapter, embeddings.plan, i, embeddings.deltas) for i in range(len(embeddings.plan.evaluations))]
    rows = [[torch.from_numpy(one[site.name]) for site in adapter.sites] for one in values]
    found = []
    for image in range(count):
        given = {name: value[image : image + 1] for name, value in requests.items()}
        found.append(_states_and_kept(adapter, embeddings.plan, noise[image : image + 1], rows, given))
    states, kept = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return {"noise": noise, "states": states, "kept": kept}


def _states_and_kept(
    adapter: Adapter,
    plan: Plan,
    noise: torch.Tensor,
    embeddings: Sequence[Sequence[torch.Tensor]],
    requests: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    kept: list[torch.Tensor] = []

    def network(i: int, state: torch.Tensor) -> torch.Tensor:
        output = adapter(state, *embeddings[i], **requests)
        row = plan.evaluations[i]
        kept.append(row.keep_output * output + row.keep_state * state)
        return output

    states = torch.stack(list(run(plan, noise, network)))
    return states, torch.stack(kept)
