"""What the verbs share: options, tables, and how a verb ends: errors as one line, signals and pipes with their exit code."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click

from mteo_deploy.errors import InputError, MteoError
from mteo_deploy.text import one_line, shown

PATH = click.Path(path_type=Path)
Number = TypeVar("Number", int, float)

BAD_INPUT, INTERNAL, INTERRUPTED, CLOSED_PIPE, TERMINATED = 2, 3, 130, 141, 143
"""Exit codes beside 0 (done) and 1, which is verify's alone. The last three are 128 and the number of the signal."""

TRAINING = {"torch", "diffusers", "transformers", "accelerate", "peft", "onnx", "onnx_ir", "onnxscript", "sentencepiece"}
"""Modules of the extra ``train``."""


class Finite(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A number as an option takes it: neither NaN nor infinite, which every comparison would let through."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


FINITE = Finite()


class Terminated(BaseException):
    """SIGTERM came: what is open is closed and swept on the way out."""


def echo(text: str = "", err: bool = False) -> None:
    """Print text that may hold words out of files, so that they cannot act on the terminal."""
    click.echo(shown(text), err=err)


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Let a verb end as the command line promises: 0, 1 of ``verify``, or one line on standard error and its exit code."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _terminable():
                function(*args, **kwargs)
                sys.stdout.flush()
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except SystemExit as verdict:
            _end_quietly_if_closed(verdict)
        except (KeyboardInterrupt, Terminated) as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            _fail(error, "interrupted" if interrupted else "terminated", INTERRUPTED if interrupted else TERMINATED)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and error.filename is None:
                _closed_pipe()
            _fail(error, *_line(error))

    option = click.option("--debug", is_flag=True, hidden=True, expose_value=False, is_eager=True, callback=set_debug)
    return option(run)


def set_debug(context: click.Context, _: click.Parameter, given: bool) -> None:
    """``--debug``, before or behind the verb: the traceback behind an error is printed too."""
    if given:
        context.meta["mteo_deploy.debug"] = True


def _debug() -> bool:
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get("mteo_deploy.debug")) or os.environ.get("MTEO_DEBUG", "0") not in ("", "0")


def _line(error: Exception) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    if isinstance(error, MteoError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in TRAINING:
        return f"this verb needs {error.name}; run: pip install 'mteo-deploy[train]'", BAD_INPUT
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "there is not enough memory for this; pass a smaller --batch or --size, or use a larger machine", BAD_INPUT
    if isinstance(error, OSError) and (error.errno is not None or error.filename is not None):
        place = error.filename if error.filename is not None else "a file"
        return f"{place}: {error.strerror or error}; {_way_out(error)}", BAD_INPUT
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    hint = "" if _debug() else "; --debug shows the traceback"
    return f"internal error, please report: {type(error).__name__}: {first}{hint}", INTERNAL


def _way_out(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "free space, or write somewhere else" if full else "check the path and the disk"


def _fail(error: BaseException, line: str, code: int) -> NoReturn:
    with contextlib.suppress(BrokenPipeError):
        if _debug():
            click.echo(shown("".join(traceback.format_exception(error))), err=True)
        click.echo(f"error: {one_line(line)}", err=True)
    sys.exit(code)


def _end_quietly_if_closed(verdict: SystemExit) -> NoReturn:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _closed_pipe()
    raise verdict


def _closed_pipe() -> NoReturn:
    """The reader of our output is gone: nothing is said, and nothing more is written when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    sys.exit(CLOSED_PIPE)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM (an evicted pod, ``timeout``) ends a verb as an exception does: what it wrote in part is swept."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked child, which this was not meant for
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def show_table(title: str, columns: list[str], rows: list[list[str]], words: int = 1) -> None:
    """Print a table whose first ``words`` columns are words; the others are numbers, aligned to the right.

    Cells are text and never markup: layers may be called ``[/x]``, and an extra ``[openvino]``.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(shown(title)) if title else None, title_justify="left", show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(shown(column)), justify="left" if i < words else "right")
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
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
    leave_out: tuple[str, ...] = (),
) -> Any:
    """What ``--model`` and the options beside it name: a path, None for the packaged backbone, or one opened as they say."""
    if adapter is None and size is None and tokens is None and not lora and not controlnet and not leave_out and weights:
        return model
    from mteo_deploy import assets
    from mteo_deploy.exporters.base import load_backbone
    from mteo_deploy.exporters.lora import Lora

    shape = None if size is None else parse_size(size)
    loras = [Lora.parse(text) for text in lora]
    return load_backbone(model or assets.MODEL, adapter, shape, tokens, weights or bool(loras), loras, controlnet, leave_out)


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
        click.option(
            "--leave-out", multiple=True, metavar="NAME", help="A part or field of the pipeline to go without; repeatable."
        ),
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
