"""What the verbs share: options, tables, and errors as one line with their exit code."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from mteo_deploy.errors import InputError, MteoError

PATH = click.Path(path_type=Path)
Number = TypeVar("Number", int, float)


def verb(function: Callable[..., None]) -> Callable[..., None]:
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


def show_table(title: str, columns: list[str], rows: list[list[str]], words: int = 1) -> None:
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


def split_numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """``kind`` is int or float."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        wanted = "integers" if kind is int else "numbers"
        raise InputError(f"expected {option} as {wanted}, by comma; found {text!r}") from None


def split_names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise InputError(f"expected --size as HEIGHTxWIDTH, e.g. 32x48; found {text!r}")
    return int(found[1]), int(found[2])


def parse_bytes(option: str, text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if found is None:
        raise InputError(f"expected {option} as a number of bytes, e.g. 20GB or 500MB; found {text!r}")
    return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))


def open_backbone(
    model: Path | None,
    adapter: str | None,
    size: str | None,
    tokens: int | None,
    lora: tuple[str, ...],
    controlnet: bool,
    weights: bool = True,
) -> Any:
    """What ``--model`` and the options beside it name: a path, None for the packaged backbone, or one opened as they say."""
    if adapter is None and size is None and tokens is None and not lora and not controlnet and weights:
        return model
    from mteo_deploy import assets
    from mteo_deploy.exporters.base import load_backbone
    from mteo_deploy.exporters.lora import Lora

    shape = None if size is None else parse_size(size)
    loras = [Lora.parse(text) for text in lora]
    return load_backbone(model or assets.MODEL, adapter, shape, tokens, weights or bool(loras), loras, controlnet)


def named_values(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    if wrong := [text for text in texts if "=" not in text]:
        raise InputError(f"expected {option} NAME=VALUE; found {wrong[0]!r}")
    return dict(text.split("=", 1) for text in texts)


def emit(data: Any) -> None:
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

    wrapped = verb(with_revision)
    for option in (
        click.option("--controlnet", is_flag=True, help="Take a ControlNet's residuals as request inputs: docs/backbones.md."),
        click.option("--lora", multiple=True, metavar="PATH[:SCALE]", help="LoRA weights (.safetensors) to fuse; repeatable."),
        click.option("--tokens", type=int, help="Length of a prompt, padded [default: the backbone's own]."),
        click.option("--size", help="HEIGHTxWIDTH of the states (latents) [default: the backbone's own]."),
        click.option("--adapter", metavar="MODULE:CLASS", help="An adapter of your own: docs/backbones.md."),
        click.option("--revision", help="Branch, tag or commit of ORG/NAME [default: the repository's own]."),
        click.option(
            "--model", type=PATH, help="diffusers pipeline directory, ORG/NAME of the Hub, or packaged [default: mnist]."
        ),
    ):
        wrapped = option(wrapped)
    return wrapped
