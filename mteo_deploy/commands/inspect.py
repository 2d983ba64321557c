"""``mteo-deploy inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mteo_deploy.commands.common import PATH, backbone_options, echo, emit, json_option, open_backbone, show_table
from mteo_deploy.errors import InputError


def _request(request: dict[str, Any]) -> str:
    return request["name"] if request["default"] is None else f"{request['name']} (default {request['default']:g})"


def _show_diff(found: list[dict[str, Any]]) -> None:
    for graph in found:
        before, after = graph["total"]
        rows = [[op, str(a), str(b), f"{b - a:+}"] for op, (a, b) in graph["operators"].items()]
        show_table(f"{graph['graph']}: {before} -> {after} nodes", ["operator", "before", "after", ""], rows)
        for what in ("nodes", "constants"):
            for change, names in graph[what].items():
                if names:
                    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                    echo(f"{what} {change}: {', '.join(names[:8])}{more}")
        echo("")


def _show_loras(loras: list[dict[str, Any]]) -> None:
    named = [f"{one['file']} ({one['scale']:g})" for one in loras]
    if named:
        echo(f"lora       {', '.join(named)}, fused")


def _show_pipeline(pipeline: dict[str, Any] | None, left_out: dict[str, str]) -> None:
    if pipeline is not None:
        echo(f"pipeline   {pipeline['class']}" + ("" if pipeline["checked"] else ", not checked: the adapter answers for it"))
    for part, why in left_out.items():
        echo(f"left out   {part}: {why}")


def adapter_line(checked: dict[str, Any]) -> str:
    """What became of the comparison of adapter and network."""
    return (
        f"not checked: {checked['skipped']}"
        if "skipped" in checked
        else f"equals the network's own forward: {checked['error']:.0e} at {len(checked['times'])} times"
    )


def _show_backbone(found: dict[str, Any]) -> None:
    levels, baking, requests = found["levels"], found["baking"], found["requests"]
    multiple, opened = found["sizes"]["fixed"], found["sizes"]["open"]
    echo(f"backbone   {found['family']} ({found['source']}), {found['parameters']:,} parameters")
    _show_pipeline(found["pipeline"], found["left_out"])
    _show_loras(found["loras"])
    sizes = f"others in multiples of {multiple}" if (multiple or 0) > 1 else "any other" if multiple else "no other"
    left = f"export can leave it open in multiples of {opened}" if opened else "export cannot leave it open"
    echo(f"samples    {'x'.join(map(str, found['sample_shape']))}; {sizes}; {left}")
    shift = "" if levels["shift"] is None else f", shift {levels['shift']:.4g}"
    echo(
        f"predicts   {found['prediction_type']}, noise {levels['high']:.6g} to {levels['low']:.6g}, schedule "
        f"{levels['schedule']}{shift}"
    )
    own = f"; no plan of another solver has its {' and '.join(found['scheduler']['own'])}" if found["scheduler"]["own"] else ""
    echo(f"scheduler  {found['scheduler']['class']}{own}")
    shapes = [f"{r['name']} {r['dtype']} [{', '.join(map(str, r['shape']))}]" for r in requests]
    echo(f"requests   {'; '.join(shapes) or 'none'}")
    counts = {time: f"{number:,} ({number / found['parameters']:.1%})" for time, number in baking.items() if time != "unknown"}
    echo(
        f"baking     removes {counts['removed']}, leaves {counts['prelude']} to the prelude and {counts['steps']} to the steps"
        if counts
        else f"baking     not known before export: {baking['unknown']}"
    )
    echo(f"adapter    {adapter_line(found['adapter'])}")
    rows = [[name, str(width)] for name, width in found["sites"].items()]
    echo(f"sites      {len(rows)}, {sum(found['sites'].values()):,} numbers to learn for each evaluation")
    show_table("", ["site", "width"], rows)


@click.command()
@click.argument("path", type=PATH, required=False)
@backbone_options
@click.option("--diff", "other", type=PATH, help="Compare PATH with this: ONNX files, bundles, or --dump-after directories.")
@json_option
def inspect(
    path: Path | None,
    model: Path | None,
    adapter: str | None,
    size: str | None,
    tokens: int | None,
    lora: tuple[str, ...],
    controlnet: bool,
    leave_out: tuple[str, ...],
    other: Path | None,
    as_json: bool,
) -> None:
    """Explain a bundle, an embedding set or a backbone, or what differs between two graphs.

    \b
    Example:  mteo-deploy inspect bundle
              mteo-deploy inspect --model my-pipeline
              mteo-deploy inspect bundle.after-update --diff bundle.after-absorb
    """
    if path is None and model is not None:
        from mteo_deploy.exporters.base import load_backbone
        from mteo_deploy.exporters.check_adapter import load_to_inspect
        from mteo_deploy.exporters.describe import describe

        def load(weights: bool) -> Any:
            found = open_backbone(model, adapter, size, tokens, lora, controlnet, weights=weights, leave_out=leave_out)
            return load_backbone(found) if isinstance(found, Path) else found

        loaded, checked = load_to_inspect(load)
        backbone = {**describe(loaded), "adapter": checked}
        emit(backbone) if as_json else _show_backbone(backbone)
        return
    if path is None or model is not None:
        raise InputError(f"expected PATH or --model DIR; found {'both' if path else 'neither'}")
    if other is not None:
        from mteo_deploy.exporters.diff import diff

        changes = diff(path, other)
        emit(changes) if as_json else _show_diff(changes)
        return
    from mteo_deploy.inspection import inspect as run

    found = run(path)
    if as_json:
        emit(found)
        return
    plan = found["plan"]
    if found["kind"] == "bundle":
        backbone, embeddings = found["backbone"], found["embeddings"]
        opened = ", ".join(found["dynamic"]) or "nothing"
        sizes = f"; batch {', '.join(map(str, found['batches']))} asked for" if found["batches"] else ""
        echo(f"bundle, schema {found['schema']}, made by mteo-deploy {found['versions']['mteo-deploy']}")
        echo(
            f"backbone   {backbone['family']} ({backbone['source']}), {backbone['parameters']:,} parameters, "
            f"samples {'x'.join(map(str, backbone['sample_shape']))}, {backbone['prediction_type']}"
        )
        _show_pipeline(backbone.get("pipeline"), found["left_out"])
        _show_loras(backbone.get("loras", []))
        echo(f"embeddings {embeddings['parameters']:,} numbers at {len(embeddings['sites'])} sites")
        echo(f"open       {opened}{sizes}")
        echo(f"requests   {', '.join(map(_request, found['requests'])) or 'none'}")
        for name, part in (("prompts", "text_encoder"), ("decoder", "decoder")):
            if found[part]:
                echo(f"{name:10} {found[part]['class']}, {found[part]['parameters']:,} parameters")
        echo(f"built      {', '.join(found['engines']) or 'nothing yet'}")
        total = sum(found["files"].values())
        echo(f"files      {len(found['files'])}, {total / 1e6:.2f} MB, all hashes right")
    else:
        echo(
            f"embedding set, {found['parameters']:,} numbers at {len(found['sites'])} sites, backbone {found['backbone'][:12]}"
        )
        if parts := found["training"].get("merged"):
            terms = [f"{part['weight']:g} * {part['sha256'][:12]}" for part in parts]
            echo(f"merged from {' + '.join(terms)}")
    rows = [
        [str(i), f"{e['sigma']:.4g}", f"{e['timestep']:.2f}", f"{e['carry']:.6g}", ", ".join(f"{w:.6g}" for w in e["weights"])]
        for i, e in enumerate(plan["evaluations"])
    ]
    echo(f"plan: {plan['summary']}")
    show_table("", ["evaluation", "sigma", "timestep", "carry", "weights"], rows)
