"""``mteo-deploy export``."""

from __future__ import annotations

from collections.abc import Sequence
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
    quiet_option,
    show_table,
    split_names,
    split_numbers,
)
from mteo_deploy.inspection import KINDS, TRIED, kind_rows, layer_fates, tried_rows
from mteo_deploy.text import command


@click.command()
@click.option("--steps", type=int, help="Step count [default: the embedding set's own; 4 for the packaged ones].")
@click.option(
    "--solver", help="Which packaged set, or the plain solver, scheduler for the pipeline's [default: the set's; euler]."
)
@backbone_options
@click.option("--embeddings", type=PATH, help="Embedding set made by distill [default: the packaged one].")
@click.option("--plain", is_flag=True, help="Pretrained embeddings, nothing learned: the plain solver.")
@click.option("--schedule", help="Time points of the plain solver, a name or a list as in distill [default: the backbone's].")
@click.option("--guidance-scale", type=FINITE, help="With --plain: classifier-free guidance [default: the set's own, or none].")
@null_class_option
@click.option("--realisation", "realisations", multiple=True, help="baked, table or fused; repeatable [default: all].")
@click.option("--dynamic", help="Axes left open, of batch,height,width [default: batch, unless --batch is one size].")
@click.option("--batch", help="One size: the only one. Several, by comma: the batch stays open, build compiles for these.")
@click.option("--tile", type=int, help="Decode larger images in tiles of so many latents [default: whole].")
@click.option("--passes", default="absorb,hoist", show_default=True, help="Optional compiler passes, by comma; '' for none.")
@click.option(
    "--precision", help="Types in the graphs: fp32, fp16, bf16, int8, fp8, int4 or auto [default: the set's own, or fp32]."
)
@click.option("--engine", help="Measure in it: which precision is fastest (auto), which layers gain (int8, fp8).")
@click.option("--keep", metavar="PATTERNS", help="Layers left in fp32, by comma: conv_in,*.attn1.* [default: by sensitivity].")
@click.option(
    "--calibration", default=16, show_default=True, help="Images whose trajectories int8 and fp8 scales are chosen on."
)
@click.option(
    "--max-error", type=FINITE, help="Of the median image, met by leaving layers of int8 or fp8 in fp32 [with auto: 0.05]."
)
@click.option("--full-range", is_flag=True, help="int8 weights in 8 bits, not 7; x86 processors need VNNI for it.")
@click.option("--dump-after", metavar="PASS", help="Leave each step graph after PASS in OUTPUT.after-PASS/.")
@click.option("--latents", is_flag=True, help="Leave the pipeline's VAE out: the bundle's samples are latents.")
@click.option("-o", "--output", type=PATH, default=Path("bundle"), show_default=True, help="Bundle directory to write.")
@json_option
@quiet_option
def export(
    model: Path | None,
    adapter: str | None,
    size: str | None,
    tokens: int | None,
    lora: tuple[str, ...],
    controlnet: bool,
    leave_out: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    output: Path,
    realisations: tuple[str, ...],
    passes: str,
    dynamic: str | None,
    batch: str | None,
    keep: str | None,
    precision: str | None,
    engine: str | None,
    **options: Any,
) -> None:
    """Bake an embedding set into one ONNX graph per evaluation: a bundle.

    \b
    Example:  mteo-deploy export --steps 4 -o bundle
              mteo-deploy export --steps 4 --batch 1,4,16 -o bundle
              mteo-deploy export --steps 4 --dynamic batch,height,width -o bundle
              mteo-deploy export --steps 4 --precision int8 -o bundle-int8
              mteo-deploy export --steps 4 --precision auto --max-error 0.02 -o bundle
    """
    from mteo_deploy.engines import AUTO
    from mteo_deploy.exporters.auto import export_fastest
    from mteo_deploy.exporters.export import export as run

    options |= {"realisations": realisations} if realisations else {}
    options["dynamic"] = None if dynamic is None else split_names(dynamic)
    options["batch"] = [] if batch is None else split_numbers("--batch", batch, int)
    options["keep"] = [] if keep is None else split_names(keep)
    options["model"] = open_backbone(model, adapter, size, tokens, lora, controlnet, leave_out=leave_out)
    common: dict[str, Any] = {**options, "passes": split_names(passes), "quiet": quiet or as_json}
    if precision == AUTO:
        bundle = export_fastest(output, engine=engine or AUTO, **common)
    else:
        bundle = run(output, precision=precision, engine=engine, **common)
    compiler = bundle.manifest["compiler"]
    note = bundle.manifest["backbone"]["scheduler"]["left_out"]
    if as_json:
        emit(
            {
                "bundle": str(output),
                "seconds": bundle.manifest["export_seconds"],
                "scheduler_left_out": note,
                "compiler": compiler,
            }
        )
        return
    if note:
        echo(f"note: {note}", err=True)
    before = compiler["time_conditioned"]
    rows = [["time-conditioned", f"{before['nodes']}", f"{before['parameters']:,}", f"{before['bytes']:,}", ""]]
    for graph in compiler["graphs"]:
        after = graph["passes"][-1]["after"]
        rows.append(
            [
                graph["graph"],
                f"{after['nodes']}",
                f"{after['parameters']:,}",
                f"{after['bytes']:,}",
                f"{len(graph['removed_weights'])}",
            ]
        )
    show_table("", ["graph", "nodes", "parameters", "bytes", "weights folded away"], rows)
    total = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    echo(f"sites: {_sites_line(compiler['sites'])}")
    for line in precision_lines(compiler.get("precision", {})):
        echo(line)
    if kinds := kind_rows(compiler.get("precision", {})):
        show_table("", list(KINDS), kinds)
    if tried := compiler.get("auto"):
        show_table("", list(TRIED), tried_rows(tried))
    refused = _facts(compiler["graphs"], "tensorrt")
    echo(f"TensorRT would refuse: {'; '.join(refused)}" if refused else "TensorRT's parser has every operator and type used")
    if unknown := _facts(compiler["graphs"], "tensorrt_unchecked"):
        echo(f"not checked, what TensorRT restricts: {'; '.join(unknown)}")
    echo(
        f"{output}: {len(bundle.plan.evaluations)} evaluations, {', '.join(bundle.realisations)}, {total / 1e6:.2f} MB, "
        f"{bundle.manifest['export_seconds']:.1f} s"
    )
    pipeline = bundle.manifest["backbone"]["pipeline"]
    if pipeline is not None and not pipeline["checked"]:
        echo(
            f"a {pipeline['class']} is not known to sample from noise and these request inputs alone: the adapter answers for "
            "it"
        )
    for part, why in bundle.manifest["left_out"].items():
        echo(f"no {part} in the bundle: {why}")
    echo(f"next: {command('mteo-deploy', 'build', output)}{_as_measured(compiler)}")


def _facts(graphs: Sequence[dict[str, Any]], key: str) -> list[str]:
    """Each fact of the graphs once, and in how many graphs it is beside the first."""
    found: dict[str, list[str]] = {}
    for graph in graphs:
        for fact in graph.get(key, []):
            found.setdefault(fact, []).append(graph["graph"])
    return [f"{fact} ({names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)})" for fact, names in found.items()]


def _as_measured(compiler: dict[str, Any]) -> str:
    """Options of ``build`` for the engine, and what it may compute in, that a precision was chosen in."""
    if found := compiler.get("auto"):
        chosen = found["tried"][found["chosen"]]
        return f" --engine {chosen['engine']}" + ("" if chosen["hint"] == "fp32" else f" --precision {chosen['hint']}")
    engine = compiler.get("precision", {}).get("engine")
    return f" --engine {engine}" if engine else ""


def precision_lines(found: dict[str, Any]) -> list[str]:
    """What lowering did and what it costs, in words; nothing in float32."""
    if not found:
        return []
    lines = [f"{found['name']}: {layer_fates(found)}"]
    for what, errors in (("", found.get("errors")), ("; one scale for all evaluations", found.get("pooled"))):
        if errors:
            each = ", ".join(f"{error:.1e}" for error in errors["evaluations"])
            lines.append(
                f"error against fp32{what}: evaluations {each} (worst {errors['worst']}); images {errors['images']:.1e}, the "
                f"median one {errors['median_image']:.1e}"
            )
    return lines


ABSORBED = ("rule", "merged")
"""How a detail of the site report begins where the constant is part of a layer now."""


def _sites_line(sites: list[dict[str, Any]]) -> str:
    """Per realisation, how many sites' constants are in a layer's own parameters, and why the others are not."""
    parts = []
    for kind in sorted({kind for site in sites for where in site["constants"].values() for kind in where}):
        details = [[where[kind] for where in site["constants"].values()] for site in sites]
        absorbed = sum(all(text.startswith(ABSORBED) for text in one) for one in details)
        left = {text for one in details for text in one if not text.startswith(ABSORBED)}
        reason = f" ({'; '.join(sorted(left))})" if left else ""
        parts.append(f"{kind}: {absorbed} of {len(sites)} absorbed{reason}")
    return "; ".join(parts)
