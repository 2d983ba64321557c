"""``export``: backbone and embedding set to a bundle."""

from __future__ import annotations

import platform
import time
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

import mteo_deploy
from mteo_deploy import assets
from mteo_deploy.bundle import MANIFEST, SCHEMA, Bundle, whole_directory, write_manifest
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, embeddings_at, load_backbone, site_dict
from mteo_deploy.exporters.compiler import Compiled, compile_bundle
from mteo_deploy.exporters.guidance import guided
from mteo_deploy.exporters.options import AXES, OPTIONAL, Options
from mteo_deploy.exporters.pipeline import Pipeline, load_pipeline
from mteo_deploy.exporters.text import TextEncoder
from mteo_deploy.plan import Plan, default_substeps, reference_plan, run
from mteo_deploy.progress import reporter
from mteo_deploy.sampler import noise_for
from mteo_deploy.solvers import canonical

REFERENCE_SEED, REFERENCE_COUNT, OTHER_COUNT, DECODED_COUNT = 20260322, 4, 2, 2
REFERENCE_PROMPTS = ("A photograph of an astronaut riding a horse.", "", "two cats & 1 café, 日本")


def pretrained_set(adapter: Adapter, steps: int, solver: str, schedule: str | None = None) -> EmbeddingSet:
    """The embedding set of zero deltas: the plain solver."""
    plan = adapter.compile_plan(steps, solver, schedule)
    deltas = {site.name: np.zeros((len(plan.evaluations), site.width), np.float32) for site in adapter.sites}
    return EmbeddingSet(deltas, plan, adapter.fingerprint())


def _reference(adapter: Adapter, embeddings: EmbeddingSet, pipeline: Pipeline, path: Path, size: tuple[int, ...]) -> None:
    """Store noise and the torch sampler's states, and some of its images where the last state is latents, for verification
    without torch; of another size too, where it is open."""
    requests = adapter.draw_requests(REFERENCE_COUNT, REFERENCE_SEED)
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
    path.parent.mkdir()
    save_file({name: values.contiguous().numpy() for name, values in found.items()}, path)  # it writes what lies in memory
    path.chmod(0o644)  # safetensors writes for the owner only


@torch.no_grad()
def _decoded(pipeline: Pipeline, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``images`` ``[count, 3, ...]`` of the first of the last states, of each size."""
    last = {name.removesuffix("states"): values[-1] for name, values in found.items() if name.endswith("states")}
    each = {size: [pipeline.decode(one) for one in latents[:DECODED_COUNT].split(1)] for size, latents in last.items()}
    return {f"{size}images": torch.cat(images) for size, images in each.items()}


def _encoded(encoder: TextEncoder) -> dict[str, torch.Tensor]:
    """``text/<input>`` and ``text/<output>``: token ids of fixed prompts, and what torch makes of them."""
    tokens = encoder.tokenise(REFERENCE_PROMPTS)
    return {f"text/{name}": torch.from_numpy(values) for name, values in {**tokens, **encoder.run(tokens)}.items()}


@torch.no_grad()
def _torch_trajectory(
    adapter: Adapter,
    embeddings: EmbeddingSet,
    shape: tuple[int, ...],
    requests: Mapping[str, torch.Tensor],
    count: int = REFERENCE_COUNT,
) -> dict[str, torch.Tensor]:
    """``noise [count, *shape]``; ``states`` and ``kept`` ``[evaluations, count, *shape]`` of the torch sampler, image by image:
    what lies between the layers of a large network is much for several."""
    noise = torch.from_numpy(noise_for(shape, REFERENCE_SEED, range(count)))
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


def _other_size(adapter: Adapter, dynamic: Collection[str]) -> tuple[int, ...]:
    """A height and width to check beside the backbone's own: larger where they are open, and not by the same.

    Raises:
        InputError: when the backbone takes no other.
    """
    height, width = adapter.sample_shape[-2:]
    opened = [axis for axis in ("height", "width") if axis in dynamic]
    if not opened:
        return height, width
    if adapter.size_multiple is None:
        raise InputError(
            f"expected a backbone that takes other sizes with --dynamic {','.join(opened)}; {adapter.family} takes "
            f"{height}x{width} only (its position embeddings are of that size); leave height and width out"
        )
    steps = [adapter.size_multiple * (axis in dynamic) for axis in ("height", "width")]
    return height + steps[0], width + 2 * steps[1]


def _versions(adapter: Adapter, pipeline: Pipeline) -> dict[str, str]:
    packages = ["torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "numpy", "safetensors"]
    packages += ["transformers", "tokenizers"] if pipeline.text_encoder else []
    packages += ["peft"] if adapter.loras.files else []
    return {
        "mteo-deploy": mteo_deploy.__version__,
        "python": platform.python_version(),
        **{p: metadata.version(p) for p in packages},
    }


def _manifest(
    adapter: Adapter, embeddings: EmbeddingSet, pipeline: Pipeline, compiled: Compiled, source: str
) -> dict[str, Any]:
    plan = embeddings.plan
    return {
        "schema": SCHEMA,
        "kind": "mteo-deploy bundle",
        "versions": _versions(adapter, pipeline),
        "backbone": {
            "source": source,
            "license": adapter.license,
            "family": adapter.family,
            "fingerprint": embeddings.backbone,
            "loras": adapter.loras.to_json(),
            "parameters": adapter.parameter_count,
            "sample_shape": list(adapter.sample_shape),
            "size_multiple": adapter.size_multiple,
            "prediction_type": adapter.prediction_type,
        },
        "embeddings": {
            "file": "embeddings.safetensors",
            "sha256": embeddings.sha256(),
            "parameters": embeddings.parameters,
            "sites": site_dict(adapter.sites),
            "training": embeddings.training,
        },
        "plan": plan.to_json(),
        "precision": compiled.options.precision,
        "batch": compiled.options.fixed_batch or "dynamic",
        "batches": list(compiled.options.batch),
        "dynamic": [axis for axis in AXES if axis in compiled.options.dynamic],
        "realisations": compiled.realisations,
        "conditioned": compiled.conditioned.entry,
        "requests": [request.to_json() for request in adapter.requests],
        "prelude": compiled.prelude.entry if compiled.prelude else None,
        "decoder": {**compiled.parts["decoder"].entry, **pipeline.decoder_json(compiled.options.dynamic)}
        if pipeline.decoder
        else None,
        "text_encoder": {**compiled.parts["text_encoder"].entry, **pipeline.text_encoder.to_json()}
        if pipeline.text_encoder
        else None,
        "left_out": pipeline.left_out,
        "reference": {
            "file": "reference/reference.safetensors",
            "seed": REFERENCE_SEED,
            "count": REFERENCE_COUNT,
            "prompts": list(REFERENCE_PROMPTS),
            "plan": _reference_plan(adapter, plan).to_json(),
        },
        "compiler": compiled.to_json(),
    }


def _reference_plan(adapter: Adapter, plan: Plan) -> Plan:
    return reference_plan(plan, adapter.levels, default_substeps(plan))


def _choose(
    model: Path | str | None,
    embeddings: Path | EmbeddingSet | None,
    steps: int | None,
    solver: str | None,
    schedule: str | None,
    plain: bool,
    adapter: Adapter,
) -> EmbeddingSet:
    if schedule is not None and not plain:
        raise InputError("expected --schedule with --plain only; an embedding set has its own; leave it out")
    if plain and embeddings is not None:
        raise InputError("expected --embeddings FILE or --plain (nothing learned); found both; leave one out")
    if plain:
        chosen = pretrained_set(adapter, 4 if steps is None else steps, solver or "euler", schedule)
    elif isinstance(embeddings, EmbeddingSet):
        chosen = embeddings
    elif embeddings is not None:
        chosen = EmbeddingSet.load(embeddings)
    elif adapter.pipeline is not None and assets.embedding_sets(adapter.pipeline):
        chosen = EmbeddingSet.load(assets.embeddings(4 if steps is None else steps, solver, adapter.pipeline))
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


def _guidance(
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


def export(
    output: Path | str,
    *,
    model: Path | str | Adapter | None = None,
    embeddings: Path | str | EmbeddingSet | None = None,
    steps: int | None = None,
    solver: str | None = None,
    schedule: str | None = None,
    plain: bool = False,
    guidance_scale: float | None = None,
    null_class: int | None = None,
    realisations: Sequence[str] | None = None,
    passes: Sequence[str] = OPTIONAL,
    dynamic: Sequence[str] | None = None,
    batch: Sequence[int] = (),
    tile: int | None = None,
    dump_after: str | None = None,
    precision: str | None = None,
    keep: Sequence[str] = (),
    calibration: int = 16,
    max_error: float | None = None,
    full_range: bool = False,
    engine: str | None = None,
    quiet: bool = False,
) -> Bundle:
    """Bake an embedding set into per-evaluation ONNX graphs and write a bundle.

    Args:
        output: directory to write; an older bundle there is replaced, anything else is refused.
        model: diffusers pipeline directory, or a backbone that :func:`~mteo_deploy.exporters.base.load_backbone` gave; None for
            the packaged backbone.
        embeddings: embedding set or its file; None for the packaged set of ``steps`` and ``solver``.
        steps: step count; None for the set's own (4 for the packaged sets).
        solver: which packaged set, or the plain solver; None for the set that there is, or plain Euler.
        schedule: of the plain solver's time points; None for the backbone's default.
        plain: use the pretrained embeddings unchanged (the plain solver).
        guidance_scale: of classifier-free guidance, where a request names no other; None for what the embedding set was learned
            at, or for no guidance with ``plain``.
        null_class: the label of no class, for guidance of a backbone that does not know its own; None for the set's.
        realisations: which to write, of ``baked``, ``table`` and ``fused``; they share their weights. None for all that the
            precision has.
        passes: optional compiler passes to run.
        dynamic: axes of the state to leave open, of ``batch``, ``height`` and ``width``; None for the batch, unless ``batch``
            is one size.
        batch: one size is the only one of every graph; with several the batch stays open, and ``build`` compiles for these.
        tile: height and width of the tiles of latents that larger images are decoded in, by a decoder that takes any size; None
            for images decoded whole.
        dump_after: a pass after which to leave each step graph, whole, in ``<output>.after-<pass>/``.
        precision: types in the graphs, of :data:`mteo_deploy.precision.NAMES`; states and requests are float32 in all of them.
            None for what the embedding set was learned against, with the layers that it kept: fp32, unless it says otherwise.
        keep: layers to leave in float32, as patterns of their names (``conv_in``, ``*.attn1.*``). None given, int8 and fp8
            leave those that make much of the error and do little of the work.
        calibration: images whose trajectories the scales of int8 and fp8 are chosen on.
        max_error: relative error of the median image against float32 that int8 and fp8 may make: where they make more, layers
            are left in float32, at the evaluations where that helps most (:mod:`mteo_deploy.exporters.search`).
        full_range: int8 weights in all of their range: a little more exact, and wrong on x86 processors without VNNI, which
            add two products in 16 bits.
        engine: for int8 and fp8, the engine in which the time that each layer saves is measured
            (:mod:`mteo_deploy.exporters.timing`): layers that save none are left in float32, and ``max_error`` is met at the
            least time. None for operations in the place of time, and every layer quantised.

    Returns:
        The bundle, opened.

    Raises:
        InputError: for a model that is not supported, an embedding set that does not fit, axes that cannot be open, or a
            precision that the backbone has no layers for.
        MissingPackageError: for int8 and fp8 without ONNX Runtime, which calibrates, or without the engine's package.
        EngineError: for an ``engine`` that does not take the graphs.
    """
    output = Path(output)
    dump = output.with_name(f"{output.name}.after-{dump_after}") if dump_after else None
    if dynamic is None:
        dynamic = () if len(batch) == 1 else ("batch",)

    def options_for(precision: str, keep: Sequence[str]) -> Options:
        which = Options.possible(precision) if realisations is None else realisations
        common = which, passes, dynamic or (), batch, dump_after, dump
        return Options(*common, precision, keep, calibration, max_error, full_range, engine)

    if precision is not None:
        options_for(precision, keep)  # a clear error before the model is loaded
    if steps is not None and steps < 1:
        raise InputError(f"expected --steps of 1 or more; found {steps}")
    model = Path(model) if isinstance(model, str) else model
    if isinstance(embeddings, str):
        embeddings = Path(embeddings)
    if model is None and embeddings is None and not plain:
        assets.embeddings(4 if steps is None else steps, solver)  # a clear error before the model is loaded
    adapter = model if isinstance(model, Adapter) else load_backbone(assets.MODEL if model is None else model)
    name = adapter.source if isinstance(model, Adapter) else model
    chosen = _choose(name, embeddings, steps, solver, schedule, plain, adapter)
    learned_against, kept = chosen.precision
    options = options_for(learned_against, keep or kept) if precision is None else options_for(precision, keep)
    size = _other_size(adapter, options.dynamic)
    adapter = guided(adapter, *_guidance(chosen, plain, guidance_scale, null_class))
    sites: Mapping[str, int] = site_dict(adapter.sites)
    chosen.check(adapter.fingerprint(), sites)
    pipeline = load_pipeline(adapter, tile)
    clock = time.monotonic()
    with reporter(quiet) as report, whole_directory(output, replace=MANIFEST) as directory:

        def rows(index: int) -> dict[str, np.ndarray]:
            return embeddings_at(adapter, chosen.plan, index, chosen.deltas)

        parts = pipeline.traces(adapter, options.dynamic)
        compiled = compile_bundle(adapter, chosen.plan, rows, directory, options, report, size, parts)
        if pipeline.text_encoder is not None:
            pipeline.text_encoder.save_tokenizers(directory)
        chosen.save(directory / "embeddings.safetensors")
        _reference(adapter, chosen, pipeline, directory / "reference" / "reference.safetensors", size)
        manifest = _manifest(adapter, chosen, pipeline, compiled, "packaged" if model is None else adapter.source)
        manifest["export_seconds"] = round(time.monotonic() - clock, 2)
        write_manifest(directory, manifest)
    return Bundle.open(output)
