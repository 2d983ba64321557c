"""The commands. Each is a thin layer over the public function of the same name; no logic of its own.

Exit codes: 0 done, 1 ``verify`` found something wrong, 2 bad input or environment (one line on standard error).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

from mteo_deploy import __version__
from mteo_deploy.errors import InputError, MteoError

PATH = click.Path(path_type=Path)


def _verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turn the package's errors into one line and their exit code."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except MteoError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:
            raise  # the reader of our output is gone: click ends quietly
        except OSError as error:
            click.echo(f"error: {error.filename or 'a file'}: {error.strerror or error}; check the path and the disk", err=True)
            sys.exit(2)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("torch", "diffusers", "onnx", "onnx_ir", "onnxscript"):
                raise
            click.echo(f"error: this verb needs {error.name}; run: pip install 'mteo-deploy[train]'", err=True)
            sys.exit(2)

    return run


def _table(title: str, columns: list[str], rows: list[list[str]], words: int = 1) -> None:
    """Print a table whose first ``words`` columns are words; the others are numbers, aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < words else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"expected {option} as integers, by comma; found {text!r}") from None


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise InputError(f"expected --size as HEIGHTxWIDTH, e.g. 32x48; found {text!r}")
    return int(found[1]), int(found[2])


def _backbone(model: Path | None, adapter: str | None, size: str | None, tokens: int | None) -> Any:
    """What ``--model`` and the options beside it name: a path, None for the packaged backbone, or one opened as they say."""
    if adapter is None and size is None and tokens is None:
        return model
    from mteo_deploy import assets
    from mteo_deploy.exporters.base import load_backbone

    return load_backbone(model or assets.MODEL, adapter, None if size is None else _size(size), tokens)


def _named(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    if wrong := [text for text in texts if "=" not in text]:
        raise InputError(f"expected {option} NAME=VALUE; found {wrong[0]!r}")
    return dict(text.split("=", 1) for text in texts)


def _emit(data: Any) -> None:
    click.echo(json.dumps(data, indent=1, default=list))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output, nothing else.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress bars.")
engine_option = click.option("--engine", default="auto", show_default=True, help="Whose built engine: auto for the newest.")
realisation_option = click.option("--realisation", help="baked, table or fused [default: what was built].")
null_class_option = click.option(
    "--null-class", type=int, help="Label of no class, for guidance [default: the backbone's own]."
)
device_option = click.option("--device", help="On which device [default: any].")


def backbone_options(function: Callable[..., None]) -> Callable[..., None]:
    """``--model`` and how to open it; a ``--revision`` becomes part of its name."""

    @wraps(function)
    def with_revision(*args: Any, model: Path | None, revision: str | None, **kwargs: Any) -> None:
        if revision is not None and model is None:
            raise InputError("expected --revision with --model ORG/NAME; found no --model")
        function(*args, model=model if revision is None else Path(f"{model}@{revision}"), **kwargs)

    wrapped = _verb(with_revision)
    for option in (
        click.option("--tokens", type=int, help="Length of a prompt, padded [default: the backbone's own]."),
        click.option("--size", help="HEIGHTxWIDTH of the states (latents) [default: the backbone's own]."),
        click.option("--adapter", metavar="MODULE:CLASS", help="An adapter of your own: docs/backbones.md."),
        click.option("--revision", help="Branch, tag or commit of ORG/NAME [default: the repository's own]."),
        click.option(
            "--model", type=PATH, help="diffusers pipeline directory, or ORG/NAME of the Hub [default: packaged MNIST]."
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mteo-deploy")
def main() -> None:
    """Ship few-step diffusion models.

    \b
    distill    learn one time embedding per step and layer     (torch)
    export     bake them into ONNX graphs: a bundle            (torch, onnx)
    build      make the bundle ready in an engine
    sample     draw images                                     (numpy + one engine)
    verify     check numbers and latency; a gate for CI
    profile    where the time goes, layer by layer
    bench      bundles, engines and precisions: error against time
    evaluate   quality of the images: Fréchet distance to real ones
    inspect    explain a bundle, an embedding set or a backbone
    push, pull a bundle to and from the Hugging Face Hub
    doctor     which engines are here, and how to install the others
    cache      list or clean the built engines of a bundle

    \b
    Example:  mteo-deploy export --steps 4 -o bundle && mteo-deploy build bundle
              mteo-deploy sample bundle --num 64 -o grid.png && mteo-deploy verify bundle
    """


@main.command()
@backbone_options
@click.option("--steps", type=int, default=4, show_default=True, help="Steps of the schedule.")
@click.option("--solver", default="euler", show_default=True, help="euler (DDIM), unipc-2, ...: docs/solvers.md.")
@click.option("--schedule", help="polynomial, logsnr, time-uniform, scheduler (the pipeline's) [default: the backbone's].")
@click.option("-o", "--output", type=PATH, required=True, help="Embedding set to write (.safetensors).")
@click.option("--trajectories", type=int, default=1024, show_default=True, help="Reference trajectories to learn from.")
@click.option("--iterations", type=int, default=400, show_default=True)
@click.option("--batch", type=int, default=64, show_default=True)
@click.option("--lr", type=float, default=0.05, show_default=True, help="Adam's learning rate, decayed by a cosine.")
@click.option("--seed", type=int, default=1_000_000, show_default=True)
@click.option("--bf16", is_flag=True, help="Train under bf16 autocast.")
@click.option("--requests", type=PATH, help="npz to learn from: what the backbone wants beside the noise, [rows, ...] each.")
@click.option("--prompts", type=PATH, help="In its place: a file with a prompt on each line, for a pipeline's text encoders.")
@click.option("--teacher", default="heun", show_default=True, help="Solver of the reference trajectories.")
@click.option("--teacher-evaluations", type=int, help="Evaluations of a reference trajectory, at least [default: about 36].")
@click.option("--share", default="none", show_default=True, help="none: a vector per site; step: a vector; time: a number.")
@click.option("--objective", default="end-to-end", show_default=True, help="end-to-end or stepwise.")
@click.option("--loss", default="squared", show_default=True, help="squared or pseudo-huber.")
@click.option("--learn", default="", help="Of the plan, too: points, coefficients, by comma [default: neither].")
@click.option("--init", type=PATH, help="Embedding set to start from, perhaps another backbone's.")
@click.option("--cache", type=PATH, help="Directory that keeps reference trajectories for the next run.")
@click.option("--device", help="cpu or cuda [default: what torch has].")
@click.option("--guidance-scale", type=float, help="Learn under classifier-free guidance of this scale: docs/guidance.md.")
@null_class_option
@json_option
@quiet_option
@_verb
def distill(
    model: Path | None,
    adapter: str | None,
    size: str | None,
    tokens: int | None,
    steps: int,
    solver: str,
    schedule: str | None,
    output: Path,
    requests: Path | None,
    prompts: Path | None,
    learn: str,
    init: Path | None,
    cache: Path | None,
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

    result = run(
        _backbone(model, adapter, size, tokens) or assets.MODEL,
        output,
        steps=steps,
        solver=solver,
        schedule=schedule,
        recipe=Recipe(**recipe, learn=tuple(_names(learn))),
        requests=requests,
        prompts=prompts,
        init=init,
        cache=cache,
        device=device,
        guidance_scale=guidance_scale,
        null_class=null_class,
        quiet=quiet or as_json,
    )
    if not is_main():
        return
    training = result.training
    if as_json:
        _emit({"output": str(output), "sha256": result.sha256(), **training})
        return
    click.echo(
        f"{output}: {training['parameters']} numbers learned ({training['share_of_backbone']:.3%} of the backbone) in "
        f"{training['seconds']:.0f} s; error against the reference "
        f"{training['error_before']:.4f} -> {training['error_after']:.4f}"
    )


@main.command()
@click.option("--steps", type=int, help="Step count [default: the embedding set's own; 4 for the packaged ones].")
@click.option("--solver", help="Which packaged set, or the plain solver [default: the set's own; euler].")
@backbone_options
@click.option("--embeddings", type=PATH, help="Embedding set made by distill [default: the packaged one].")
@click.option("--plain", is_flag=True, help="Pretrained embeddings, nothing learned: the plain solver.")
@click.option("--schedule", help="Time points of the plain solver, as in distill [default: the backbone's].")
@click.option("--guidance-scale", type=float, help="With --plain: classifier-free guidance [default: the set's own, or none].")
@null_class_option
@click.option("--realisation", "realisations", multiple=True, help="baked, table or fused; repeatable [default: all].")
@click.option("--dynamic", help="Axes left open, of batch,height,width [default: batch, unless --batch is one size].")
@click.option("--batch", help="One size: the only one. Several, by comma: the batch stays open, build compiles for these.")
@click.option("--passes", default="absorb,hoist", show_default=True, help="Optional compiler passes, by comma; '' for none.")
@click.option("--dump-after", metavar="PASS", help="Leave each step graph after PASS in OUTPUT.after-PASS/.")
@click.option("-o", "--output", type=PATH, default=Path("bundle"), show_default=True, help="Bundle directory to write.")
@json_option
@quiet_option
@_verb
def export(
    model: Path | None,
    adapter: str | None,
    size: str | None,
    tokens: int | None,
    as_json: bool,
    quiet: bool,
    output: Path,
    realisations: tuple[str, ...],
    passes: str,
    dynamic: str | None,
    batch: str | None,
    **options: Any,
) -> None:
    """Bake an embedding set into one ONNX graph per evaluation: a bundle.

    \b
    Example:  mteo-deploy export --steps 4 -o bundle
              mteo-deploy export --steps 4 --batch 1,4,16 -o bundle
              mteo-deploy export --steps 4 --dynamic batch,height,width -o bundle
    """
    from mteo_deploy.exporters.export import export as run

    options |= {"realisations": realisations} if realisations else {}
    options["dynamic"] = None if dynamic is None else _names(dynamic)
    options["batch"] = [] if batch is None else _integers("--batch", batch)
    options["model"] = _backbone(model, adapter, size, tokens)
    bundle = run(output, passes=_names(passes), quiet=quiet or as_json, **options)
    compiler = bundle.manifest["compiler"]
    if as_json:
        _emit({"bundle": str(output), "seconds": bundle.manifest["export_seconds"], "compiler": compiler})
        return
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
    _table("", ["graph", "nodes", "parameters", "bytes", "weights folded away"], rows)
    total = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    click.echo(f"sites: {_sites_line(compiler['sites'])}")
    refused = [f"{graph['graph']}: {problem}" for graph in compiler["graphs"] for problem in graph["tensorrt"]]
    click.echo(
        f"TensorRT would refuse: {'; '.join(refused)}" if refused else "TensorRT's parser has every operator and type used"
    )
    click.echo(
        f"{output}: {len(bundle.plan.evaluations)} evaluations, {', '.join(bundle.realisations)}, {total / 1e6:.2f} MB, "
        f"{bundle.manifest['export_seconds']:.1f} s"
    )
    for part, why in bundle.manifest["left_out"].items():
        click.echo(f"no {part} in the bundle: {why}")
    click.echo(f"next: mteo-deploy build {output}")


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


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--engine", default="auto", show_default=True, help="onnxruntime, openvino, tensorrt, or auto: time them.")
@click.option("--device", help="Where it runs the graphs [default: the engine's best].")
@click.option("--realisation", default="auto", show_default=True, help="baked, table, fused, or auto: time them.")
@click.option("--precision", default="fp32", show_default=True, help="fp32 or bf16: what the engine may compute in.")
@click.option("--batch", help="Batch sizes to compile for, by comma; the first is timed [default: export's, else any].")
@click.option(
    "--option",
    "given",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the engine's own; repeatable; doctor lists them.",
)
@click.option("--threads", type=int, help="Threads inside an operator [default: the engine's choice].")
@json_option
@quiet_option
@_verb
def build(bundle: Path, batch: str | None, given: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Make a bundle's graphs ready in an engine.

    \b
    Example:  mteo-deploy build bundle
              mteo-deploy build bundle --engine openvino --precision bf16 --batch 1,8
              mteo-deploy build bundle --engine onnxruntime --option spinning=off
    """
    from mteo_deploy.engines.build import build as run

    sizes = [] if batch is None else _integers("--batch", batch)
    directory = run(bundle, batch=sizes, engine_options=_named("--option", given), quiet=quiet or as_json, **options)
    record = json.loads((directory / "engine.json").read_text())
    if as_json:
        _emit(record)
        return
    measured = record["measured"]
    for loops in (measured.get("engines", {}), measured):
        for name, ratio in loops.get("loops", {}).items():
            interval = f"[{ratio['ratio_low']:.3f}, {ratio['ratio_high']:.3f}]"
            click.echo(f"{name} / {loops['against']}, whole loop at batch {loops['batch']}: {ratio['ratio']:.3f} {interval}")
    for name, problem in measured.get("engines", {}).get("refused", {}).items():
        click.echo(f"{name} left out: {problem}")
    if decoder := measured.get("decoder"):
        click.echo(
            f"decoder at batch {decoder['batch']}: {decoder['milliseconds']:.2f} ms, {decoder['share']:.0%} of a whole sampling"
        )
    if record["missed"]:
        click.echo(f"{record['missed']['name']} did not fit: {'; '.join(record['missed']['changed'])}")
    click.echo(f"built {directory}, realisation {record['realisation']}")
    click.echo(f"next: mteo-deploy sample {bundle} --num 64 -o grid.png")


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--num", type=int, default=16, show_default=True, help="How many images.")
@click.option("--seed", type=int, default=0, show_default=True, help="Image i depends on (seed, i) only.")
@click.option("--batch", type=int, default=16, show_default=True, help="Images per engine call.")
@click.option("--size", help="HEIGHTxWIDTH of the state, if the bundle leaves them open [default: the backbone's own].")
@click.option("-o", "--output", type=PATH, default=Path("grid.png"), show_default=True, help=".png (grid), .npz, or a folder.")
@engine_option
@device_option
@realisation_option
@click.option("--tables", type=PATH, help="Another bundle, whose embeddings and steps to use in this one's table engine.")
@click.option("--prompt", multiple=True, help="For all images; repeatable: one for each. Needs a bundle with a text encoder.")
@click.option("--negative-prompt", multiple=True, help="Likewise, for a bundle with guidance [default: the empty one].")
@click.option("--latents", is_flag=True, help="Leave them as they are, where the bundle could decode them.")
@click.option("--class-labels", help="For a backbone with classes: one label, or as many as images, by comma.")
@click.option("--guidance-scale", type=float, help="For a bundle with guidance [default: what it was exported with].")
@click.option(
    "--requests", "request_file", type=PATH, help="npz of request inputs (prompt embeddings): one each, or as many as images."
)
@json_option
@quiet_option
@_verb
def sample(
    bundle: Path,
    num: int,
    seed: int,
    batch: int,
    size: str | None,
    output: Path,
    latents: bool,
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
    from mteo_deploy.progress import reporter
    from mteo_deploy.sampler import Sampler

    images.check_output(output)
    requests: dict[str, Any] = {} if request_file is None else given.read(request_file)
    requests |= {} if class_labels is None else {"class_labels": _integers("--class-labels", class_labels)}
    requests |= {} if guidance_scale is None else {given.GUIDANCE_SCALE: guidance_scale}
    shape = None if size is None else _size(size)
    with Sampler.load(bundle, **options) as sampler, reporter(quiet or as_json) as report:
        images.check_output(output, sampler.bundle.image_shape_at(shape))
        clock = time.perf_counter()
        task = report.task("sampling", num)
        texts = {"prompt": list(prompt) or None, "negative_prompt": list(negative_prompt) or None}
        drawn = sampler(num, seed, batch, lambda n: report.advance(task, n), requests, shape, latents, **texts)
        seconds = time.perf_counter() - clock
    images.save(drawn, output)
    if as_json:
        _emit({"output": str(output), "num": num, "seed": seed, "batch": batch, "seconds": seconds})
        return
    click.echo(f"{output}: {num} images of {len(sampler.plan.evaluations)} evaluations each in {seconds:.2f} s")


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--engine", default="auto", show_default=True, help="auto: the newest built; all, or some by comma: compare.")
@device_option
@realisation_option
@click.option("--batch", type=int, default=1, show_default=True, help="Images per engine call in the latency part.")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Time for the latency part; 0 leaves it out.")
@click.option("--max-p50-ms", type=float, help="Budget: median time to sample one batch, in ms.")
@click.option("--max-p99-ms", type=float, help="Budget: its 99th percentile.")
@click.option("--max-overhead", type=float, help="Budget: evaluations over time-conditioned ones, e.g. 0.02.")
@click.option("--max-error", type=float, help="Budget: relative error of the images against torch's.")
@click.option("--budgets", "budget_file", type=PATH, help="TOML file of budgets, e.g. max_p50_ms = 25; options go before it.")
@click.option("--against", type=PATH, help="An older report.json: fail where this run is slower.")
@click.option("--bisect", is_flag=True, help="Where an evaluation departs, name the first layer that does.")
@click.option("--costs", is_flag=True, help="Also: per evaluation, batch and thread; start, memory, energy, limit.")
@click.option(
    "-o",
    "--output",
    "outputs",
    type=PATH,
    multiple=True,
    help="Report to write, by its ending: .json, .html, .xml (JUnit), .png.",
)
@json_option
@quiet_option
@_verb
def verify(
    bundle: Path,
    outputs: tuple[Path, ...],
    budget_file: Path | None,
    against: Path | None,
    max_p50_ms: float | None,
    max_p99_ms: float | None,
    max_overhead: float | None,
    max_error: float | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Check numbers against the stored torch reference, canaries, latency, budgets and an older report.

    Exit code 1 when something is wrong. -o may be given several times.

    \b
    Example:  mteo-deploy verify bundle --max-overhead 0.02 -o report.html -o report.json
              mteo-deploy verify bundle --budgets budgets.toml --against report.json -o junit.xml
              mteo-deploy verify bundle --engine all --bisect --costs -o report.html
    """
    from mteo_deploy.comparison import names_several, verify_engines
    from mteo_deploy.gates import Budgets
    from mteo_deploy.report import DRAWN, Report, check_outputs
    from mteo_deploy.verification import verify as verify_one

    check_outputs(outputs, several=names_several(options["engine"]))
    options["draw"] = any(output.suffix in DRAWN for output in outputs)
    budgets = (Budgets.read(budget_file) if budget_file else Budgets()).override(
        max_p50_ms=max_p50_ms, max_p99_ms=max_p99_ms, max_overhead=max_overhead, max_error=max_error
    )
    older = Report.read(against) if against else None
    run = verify_engines if names_several(options["engine"]) else verify_one
    report = run(bundle, quiet=quiet or as_json, budgets=budgets, older=older, **options)
    for output in outputs:
        report.save(output)
    if as_json:
        _emit(report.to_json())
        sys.exit(0 if report.passed else 1)
    every = [report] if isinstance(report, Report) else report.every
    for one in every:
        title = "" if one is report else f"{one.engine} on {one.device}, {one.precision}"
        _table(title, ["check", "", "found"], [[c.name, "ok" if c.passed else "FAILED", c.detail] for c in one.checks], 3)
        click.echo("")
        for line in one.latency_lines() + one.further_lines():
            click.echo(line)
    wrong = [c.name if one is report else f"{one.engine} {c.name}" for one in every for c in one.checks if not c.passed]
    click.echo("NOT verified: " + ", ".join(wrong) if wrong else "verified")
    sys.exit(0 if report.passed else 1)


@main.command()
@click.argument("bundle", type=PATH)
@engine_option
@device_option
@realisation_option
@click.option("--batch", type=int, default=1, show_default=True, help="Images per engine call.")
@click.option("--loops", type=int, default=20, show_default=True, help="Samplings to time.")
@click.option("--top", type=int, default=8, show_default=True, help="How many of the longest layers to list.")
@click.option("-o", "--output", type=PATH, help="Write JSON here; a Chrome trace for a name ending in .trace.json.")
@json_option
@quiet_option
@_verb
def profile(bundle: Path, output: Path | None, top: int, as_json: bool, quiet: bool, **options: Any) -> None:
    """Where the time of one sampling goes, by what layers do, beside ordinary time conditioning.

    Example:  mteo-deploy profile bundle -o sample.trace.json
    """
    from mteo_deploy.profiling import profile as run

    found = run(bundle, quiet=quiet or as_json, **options)
    if output:
        found.save(output)
    if as_json:
        _emit(found.to_json())
        return
    groups = found.groups()
    total = [sum(pair[i] for pair in groups.values()) for i in range(2)]
    rows = [
        [name, f"{ours:.3f}", f"{ours / total[0]:.1%}", f"{theirs:.3f}", f"{ours - theirs:+.3f}"]
        for name, (ours, theirs) in [*groups.items(), ("all", (total[0], total[1]))]
    ]
    title = f"{found.engine} on {found.device}, {found.precision}, batch {found.batch}: ms in one sampling"
    _table(title, ["layers", found.realisation, "share", "time-conditioned", ""], rows)
    graphs = found.graphs()
    _table("", ["graph", "ms in one sampling"], [[name, f"{took:.3f}"] for name, took in graphs.items()])
    longest = sorted(found.layers, key=lambda layer: -layer.milliseconds)[:top]
    rows = [[layer.name[-60:], layer.kind, layer.graph, f"{layer.milliseconds:.3f}"] for layer in longest]
    _table("", ["longest layers", "kind", "graph", "ms in one sampling"], rows)
    click.echo("times with profiling switched on: for shares and differences; for totals see: mteo-deploy verify")


@main.command()
@click.argument("bundles", type=PATH, nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--engine", default="all", show_default=True, help="Names by comma, or all that are built.")
@device_option
@click.option("--precision", default="all", show_default=True, help="Names by comma, or all that are built.")
@click.option("--batch", default="1", show_default=True, help="Images per engine call, sizes by comma.")
@click.option("--seconds", type=float, default=10.0, show_default=True, help="Time for the timing, all batch sizes together.")
@click.option("--num", type=int, default=64, show_default=True, help="Images for the error.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of their noise.")
@click.option("--plain", is_flag=True, help="Add the plain solver on the time-conditioned graph, for every bundle and engine.")
@click.option("-o", "--output", "outputs", type=PATH, multiple=True, help="To write, by its ending: .html, .json, .csv, .png.")
@json_option
@quiet_option
@_verb
def bench(bundles: tuple[Path, ...], batch: str, outputs: tuple[Path, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Compare bundles of one backbone: error of the images against time.

    The error is against the reference trajectory of the same noise. All candidates are open at once while they are timed:
    they need memory together. -o may be given several times.

    Example:  mteo-deploy bench euler-3 euler-4 euler-8 --plain -o bench.html
    """
    from mteo_deploy.benchmarking import bench as run
    from mteo_deploy.tradeoff import COLUMNS, check_tradeoff_outputs

    check_tradeoff_outputs(outputs)
    found = run(bundles, batch=_integers("--batch", batch), quiet=quiet or as_json, **options)
    for output in outputs:
        found.save(output)
    if as_json:
        _emit(found.to_json())
        return
    for size in found.batches:
        _table(f"batch {size}", COLUMNS, found.rows(size), words=2)
        click.echo("")
    for line in found.lines():
        click.echo(line)


@main.command()
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
@_verb
def evaluate(bundle: Path, data: Path, seeds: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Fréchet distance of a built bundle's images to real ones, beside the plain solver's and the reference trajectory's.

    A feature network in ONNX takes float32 images [n, channels, height, width] in [-1, 1]; its first output are the features.

    \b
    Example:  mteo-deploy evaluate bundle --data images.zip
              mteo-deploy evaluate bundle --data mnist_test.npz --features classifier.onnx --seeds 0,1,2
    """
    from mteo_deploy.evaluation import evaluate as run

    found = run(bundle, data, seeds=_integers("--seeds", seeds), quiet=quiet or as_json, **options)
    if as_json:
        _emit(found.to_json())
        return
    rows = [
        [name, f"{one.evaluations}", _spread(one.frechet, ".2f"), _spread(one.error, ".4f")]
        for name, one in found.samplers.items()
    ]
    context = found.context
    title = f"{context['num']} images against {context['data']}, features {context['features']}"
    _table(title, ["sampler", "evaluations", "Fréchet distance", "squared error"], rows)
    closed = [share for share in found.gap_closed if share is not None]
    click.echo(f"gap closed: {_spread(closed, '.1%')}" if closed else "no gap: the plain solver is as near as the reference")


def _spread(values: Sequence[float], form: str) -> str:
    """Mean, and where there are several the range they span."""
    mean = format(sum(values) / len(values), form)
    return mean if len(values) == 1 else f"{mean} [{min(values):{form}}, {max(values):{form}}]"


def _request(request: dict[str, Any]) -> str:
    return request["name"] if request["default"] is None else f"{request['name']} (default {request['default']:g})"


def _show_diff(found: list[dict[str, Any]]) -> None:
    for graph in found:
        before, after = graph["total"]
        rows = [[op, str(a), str(b), f"{b - a:+}"] for op, (a, b) in graph["operators"].items()]
        _table(f"{graph['graph']}: {before} -> {after} nodes", ["operator", "before", "after", ""], rows)
        for what in ("nodes", "constants"):
            for change, names in graph[what].items():
                if names:
                    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                    click.echo(f"{what} {change}: {', '.join(names[:8])}{more}")
        click.echo("")


def _show_backbone(found: dict[str, Any]) -> None:
    levels, baking, requests = found["levels"], found["baking"], found["requests"]
    multiple, opened = found["sizes"]["fixed"], found["sizes"]["open"]
    click.echo(f"backbone   {found['family']} ({found['source']}), {found['parameters']:,} parameters")
    sizes = f"others in multiples of {multiple}" if multiple else "no other"
    left = f"export can leave it open in multiples of {opened}" if opened else "export cannot leave it open"
    click.echo(f"samples    {'x'.join(map(str, found['sample_shape']))}; {sizes}; {left}")
    shift = "" if levels["shift"] is None else f", shift {levels['shift']:.4g}"
    click.echo(
        f"predicts   {found['prediction_type']}, noise {levels['high']:.6g} to {levels['low']:.6g}, schedule "
        f"{levels['schedule']}{shift}"
    )
    shapes = [f"{r['name']} {r['dtype']} [{', '.join(map(str, r['shape']))}]" for r in requests]
    click.echo(f"requests   {'; '.join(shapes) or 'none'}")
    counts = {time: f"{number:,} ({number / found['parameters']:.1%})" for time, number in baking.items() if time != "unknown"}
    click.echo(
        f"baking     removes {counts['removed']}, leaves {counts['prelude']} to the prelude and {counts['steps']} to the steps"
        if counts
        else f"baking     not known before export: {baking['unknown']}"
    )
    rows = [[name, str(width)] for name, width in found["sites"].items()]
    click.echo(f"sites      {len(rows)}, {sum(found['sites'].values()):,} numbers to learn for each evaluation")
    _table("", ["site", "width"], rows)


@main.command()
@click.argument("path", type=PATH, required=False)
@backbone_options
@click.option("--diff", "other", type=PATH, help="Compare PATH with this: ONNX files, bundles, or --dump-after directories.")
@json_option
@_verb
def inspect(
    path: Path | None,
    model: Path | None,
    adapter: str | None,
    size: str | None,
    tokens: int | None,
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
        from mteo_deploy.exporters.describe import describe

        backbone = describe(load_backbone(model, adapter, None if size is None else _size(size), tokens, weights=False))
        _emit(backbone) if as_json else _show_backbone(backbone)
        return
    if path is None or model is not None:
        raise InputError(f"expected PATH or --model DIR; found {'both' if path else 'neither'}")
    if other is not None:
        from mteo_deploy.exporters.diff import diff

        changes = diff(path, other)
        _emit(changes) if as_json else _show_diff(changes)
        return
    from mteo_deploy.inspection import inspect as run

    found = run(path)
    if as_json:
        _emit(found)
        return
    plan = found["plan"]
    if found["kind"] == "bundle":
        backbone, embeddings = found["backbone"], found["embeddings"]
        opened = ", ".join(found["dynamic"]) or "nothing"
        sizes = f"; batch {', '.join(map(str, found['batches']))} asked for" if found["batches"] else ""
        click.echo(f"bundle, schema {found['schema']}, made by mteo-deploy {found['versions']['mteo-deploy']}")
        click.echo(
            f"backbone   {backbone['family']} ({backbone['source']}), {backbone['parameters']:,} parameters, "
            f"samples {'x'.join(map(str, backbone['sample_shape']))}, {backbone['prediction_type']}"
        )
        click.echo(f"embeddings {embeddings['parameters']:,} numbers at {len(embeddings['sites'])} sites")
        click.echo(f"open       {opened}{sizes}")
        click.echo(f"requests   {', '.join(map(_request, found['requests'])) or 'none'}")
        for name, part in (("prompts", "text_encoder"), ("decoder", "decoder")):
            if found[part]:
                click.echo(f"{name:10} {found[part]['class']}, {found[part]['parameters']:,} parameters")
        click.echo(f"built      {', '.join(found['engines']) or 'nothing yet'}")
        total = sum(found["files"].values())
        click.echo(f"files      {len(found['files'])}, {total / 1e6:.2f} MB, all hashes right")
    else:
        click.echo(
            f"embedding set, {found['parameters']:,} numbers at {len(found['sites'])} sites, backbone {found['backbone'][:12]}"
        )
    rows = [
        [str(i), f"{e['sigma']:.4g}", f"{e['timestep']:.2f}", f"{e['carry']:.6g}", ", ".join(f"{w:.6g}" for w in e["weights"])]
        for i, e in enumerate(plan["evaluations"])
    ]
    title = f"plan: {plan['solver']}, {plan['steps']} steps, {plan['schedule']} schedule"
    _table(title, ["evaluation", "sigma", "timestep", "carry", "weights"], rows)


@main.command()
@json_option
@_verb
def doctor(as_json: bool) -> None:
    """Which engines are here, what they can do, and how to install the others.

    Example:  mteo-deploy doctor
    """
    from mteo_deploy.engines import doctor as run

    found = run()
    if as_json:
        _emit(found)
        return
    for entry in found:
        if "problem" in entry:
            click.echo(f"{entry['engine']}: {entry['problem']}")
            continue
        click.echo(f"{entry['engine']} {entry['version']}: {', '.join(entry['precisions'])}")
        for device in entry["devices"]:
            click.echo(f"  {device}: {entry['machine'][device]}")
        for name, option in entry["options"].items():
            default = "the engine's choice" if option["default"] is None else option["default"]
            click.echo(f"  --option {name}={option['takes']} [default: {default}]: {option['help']}")


@main.command()
@click.argument("bundle", type=PATH)
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option("--revision", help="Branch [default: the repository's own].")
@json_option
@_verb
def push(bundle: Path, repository: str, as_json: bool, **options: Any) -> None:
    """Upload a bundle to the Hugging Face Hub, with a model card; built engines stay here.

    Example:  mteo-deploy push bundle my-org/mnist-4-steps
    """
    from mteo_deploy.hub import push as run

    address = run(bundle, repository, **options)
    _emit({"repository": repository, "address": address}) if as_json else click.echo(f"pushed {bundle} to {address}")


@main.command()
@click.argument("repository", metavar="ORG/NAME")
@click.option("-o", "--output", type=PATH, default=Path("bundle"), show_default=True, help="Bundle directory to write.")
@click.option("--revision", help="Branch, tag or commit [default: the repository's own].")
@json_option
@_verb
def pull(repository: str, output: Path, revision: str | None, as_json: bool) -> None:
    """Download a bundle from the Hugging Face Hub and check every hash.

    Example:  mteo-deploy pull my-org/mnist-4-steps -o bundle && mteo-deploy build bundle
    """
    from mteo_deploy.hub import pull as run

    bundle = run(repository, output, revision=revision)
    size = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    if as_json:
        _emit({"bundle": str(output), "repository": repository, "bytes": size})
        return
    click.echo(f"{output}: {len(bundle.plan.evaluations)} evaluations, {size / 1e6:.2f} MB, all hashes right")
    click.echo(f"next: mteo-deploy build {output}")


@main.group()
def cache() -> None:
    """The built engines of a bundle."""


@cache.command("list")
@click.argument("bundle", type=PATH)
@json_option
@_verb
def list_(bundle: Path, as_json: bool) -> None:
    """List the built engines of a bundle, and why one does not fit it any more.

    Example:  mteo-deploy cache list bundle
    """
    from mteo_deploy.bundle import Bundle
    from mteo_deploy.engines import cache as built

    _show_built(built.entries(Bundle.open(bundle)), as_json)


@cache.command()
@click.argument("bundle", type=PATH)
@click.option("--all", "everything", is_flag=True, help="Delete those that fit too.")
@json_option
@_verb
def clean(bundle: Path, everything: bool, as_json: bool) -> None:
    """Delete the built engines that do not fit the bundle any more, and what interrupted builds left.

    Example:  mteo-deploy cache clean bundle
    """
    from mteo_deploy.bundle import Bundle
    from mteo_deploy.engines import cache as built

    _show_built(built.clean(Bundle.open(bundle), everything), as_json, "deleted ")


def _show_built(entries: list[dict[str, Any]], as_json: bool, what: str = "") -> None:
    if as_json:
        _emit(entries)
        return
    for entry in entries:
        click.echo(f"{what}{entry['name']}, {entry['bytes'] / 1e6:.2f} MB: {entry['reason'] or 'fits the bundle'}")
    if not entries:
        click.echo("nothing" if what else "no built engines; mteo-deploy build makes one")


if __name__ == "__main__":
    main()
