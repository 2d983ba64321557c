"""``export``: backbone and embedding set to a bundle."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import mteo_deploy
from mteo_deploy import assets
from mteo_deploy.bundle import MANIFEST, SCHEMA, Bundle, whole_directory, write_manifest
from mteo_deploy.directories import check_directory
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.adapter_faults import names_of
from mteo_deploy.exporters.base import Adapter, embeddings_at, load_backbone, site_dict
from mteo_deploy.exporters.check_adapter import check_adapter
from mteo_deploy.exporters.choice import choose, guidance_of
from mteo_deploy.exporters.compiler import Compiled, compile_bundle
from mteo_deploy.exporters.guidance import guided
from mteo_deploy.exporters.options import AXES, OPTIONAL, Options
from mteo_deploy.exporters.pipeline import Pipeline, load_pipeline
from mteo_deploy.exporters.reference import write_reference
from mteo_deploy.exporters.trace import other_size
from mteo_deploy.progress import reporter


def _versions(adapter: Adapter, pipeline: Pipeline) -> dict[str, str]:
    packages = ["torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "numpy", "safetensors"]
    packages += ["transformers", "tokenizers"] if pipeline.text_encoder else []
    packages += ["peft"] if adapter.loras.files else []
    return {
        "mteo-deploy": mteo_deploy.__version__,
        "python": platform.python_version(),
        **{p: metadata.version(p) for p in packages},
    }


def _weights(adapter: Adapter, pipeline: Pipeline) -> dict[str, Any]:
    """How the weights of each part were stored, where we read them: types, variant, names converted or passed over."""
    parts = {"backbone": [adapter.network]}
    parts |= {"decoder": [pipeline.decoder.vae]} if pipeline.decoder else {}
    parts |= {"text_encoder": list(pipeline.text_encoder.encoders)} if pipeline.text_encoder else {}
    found = {name: [getattr(one, "weights_report", None) for one in networks] for name, networks in parts.items()}
    return {name: [one for one in reports if one is not None] for name, reports in found.items()}


def _manifest(
    adapter: Adapter,
    embeddings: EmbeddingSet,
    pipeline: Pipeline,
    compiled: Compiled,
    source: str,
    reference: dict[str, Any],
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
            "pipeline": None if adapter.pipeline is None else adapter.pipeline.to_json(),
            "loras": adapter.loras.to_json(),
            "parameters": adapter.parameter_count,
            "sample_shape": list(adapter.sample_shape),
            "size_multiple": adapter.size_multiple,
            "prediction_type": adapter.prediction_type,
            "scheduler": {
                "class": adapter.scheduler_config["_class_name"],
                "left_out": adapter.scheduler_left_out(plan.solver),
            },
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
        "weights": _weights(adapter, pipeline),
        "reference": reference,
        "compiler": compiled.to_json(),
    }


def _check_embeddings(rows: Callable[[int], dict[str, np.ndarray]], evaluations: int) -> None:
    """Refuse what cannot be baked: an embedding, with what was learned, that is no number."""
    for index in range(evaluations):
        if broken := [name for name, values in rows(index).items() if not np.isfinite(values).all()]:
            raise InputError(
                f"expected finite embeddings; found NaN or Inf at evaluation {index} for {names_of(broken)}; mend the "
                "adapter's embeddings at that time, or learn the set again"
            )


def export(
    output: Path | str,
    *,
    model: Path | str | Adapter | None = None,
    embeddings: Path | str | EmbeddingSet | None = None,
    steps: int | None = None,
    solver: str | None = None,
    schedule: str | Sequence[float] | None = None,
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
    leave_out: Sequence[str] = (),
    latents: bool = False,
    quiet: bool = False,
) -> Bundle:
    """Bake an embedding set into per-evaluation ONNX graphs and write a bundle.

    Args:
        output: directory to write; an older bundle there is replaced, anything else is refused.
        model: diffusers pipeline directory, or a backbone that :func:`~mteo_deploy.exporters.base.load_backbone` gave; None for
            the packaged backbone.
        embeddings: embedding set or its file; None for the packaged set of ``steps`` and ``solver``.
        steps: step count; None for the set's own (4 for the packaged sets).
        solver: which packaged set, or the plain solver, ``scheduler`` for the pipeline's own; None for the set that there is,
            or plain Euler.
        schedule: of the plain solver's time points: a name, or ``steps + 1`` noise levels; None for the backbone's default.
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
        leave_out: parts of the pipeline, and fields of its configurations, to go without, where ``model`` is a directory.
        latents: leave the pipeline's VAE out: the bundle's samples are latents.

    Returns:
        The bundle, opened.

    Raises:
        InputError: for a model that is not supported, an adapter that is not its network (see
            :func:`~mteo_deploy.exporters.check_adapter.check_adapter`), an embedding set that does not fit, axes that cannot be
            open, or a precision that the backbone has no layers for.
        MissingPackageError: for int8 and fp8 without ONNX Runtime, which calibrates, or without the engine's package.
        EngineError: for an ``engine`` that does not take the graphs.
    """
    output = Path(output)
    place = check_directory(output, MANIFEST)
    named = output if output.name else place  # of "." the directory itself has one
    dump = named.with_name(f"{named.name}.after-{dump_after}") if dump_after else None
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
    if isinstance(model, Adapter) and leave_out:
        raise InputError("expected leave_out with a directory; found a backbone; give it to load_backbone")
    adapter = loaded = model if isinstance(model, Adapter) else load_backbone(model or assets.MODEL, leave_out=leave_out)
    name = adapter.source if isinstance(model, Adapter) else model
    chosen = choose(name, embeddings, steps, solver, schedule, plain, adapter)
    learned_against, kept = chosen.precision
    options = options_for(learned_against, keep or kept) if precision is None else options_for(precision, keep)
    size = other_size(adapter, options.dynamic)
    adapter = guided(adapter, *guidance_of(chosen, plain, guidance_scale, null_class))
    sites: Mapping[str, int] = site_dict(adapter.sites)
    chosen.check(adapter.fingerprint(), sites)
    checked = check_adapter(loaded)
    pipeline = load_pipeline(adapter, tile, latents)
    clock = time.monotonic()

    def rows(index: int) -> dict[str, np.ndarray]:
        return embeddings_at(adapter, chosen.plan, index, chosen.deltas)

    _check_embeddings(rows, len(chosen.plan.evaluations))
    with reporter(quiet) as report, whole_directory(output, replace=MANIFEST) as directory:
        parts = pipeline.traces(adapter, options.dynamic, options.fixed_batch)
        compiled = compile_bundle(adapter, chosen.plan, rows, directory, options, report, size, parts)
        if pipeline.text_encoder is not None:
            pipeline.text_encoder.save_tokenizers(directory)
        chosen.save(directory / "embeddings.safetensors")
        reference = write_reference(adapter, chosen, pipeline, directory, size)
        source = "packaged" if model is None else adapter.source
        manifest = {**_manifest(adapter, chosen, pipeline, compiled, source, reference), "adapter": checked.to_json()}
        manifest["export_seconds"] = round(time.monotonic() - clock, 2)
        write_manifest(directory, manifest)
    return Bundle.open(output)
