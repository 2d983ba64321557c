"""Capture: ``torch.export`` of a module, and in one line what stands in its way.

A network that makes a Python number of an axis (``len(x)``, ``for one in x``, ``int(x.shape[0])``, a grid of one size) is
traced for that one number. ``torch.onnx.export`` then takes the axis as fixed without a word; here it is an error that names
the axis and the line. torch tells neither: its log of guards says what becomes a number while it traces, and the Python stack
at that moment says where.
"""

from __future__ import annotations

import io
import linecache
import logging
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

import diffusers
import numpy as np
import sympy
import torch
import transformers

import mteo_deploy
from mteo_deploy.errors import InputError

GUARDS = "torch.fx.experimental.symbolic_shapes"
"""Logger of torch that tells of every symbol and guard; its levels and words may change, and then no line is named."""


def _places(*modules: Any) -> tuple[str, ...]:
    return tuple(str(Path(module.__file__).resolve().parent) for module in modules)


MACHINERY = (*_places(torch, np, sympy, mteo_deploy), str(Path(__file__).resolve().parent))
"""Where no line of a network lies: torch and what it uses, and this project."""
LIBRARIES = _places(diffusers, transformers)
STANDARD = sysconfig.get_path("stdlib")


class FixedAxisError(InputError):
    """A dynamic axis became a number."""


class _Watch(logging.Handler):
    """Collects what torch's log says of the symbols of axes, and the line of the network's code that it came from."""

    def __init__(self, capture: FrameType) -> None:
        super().__init__(logging.INFO)
        self.capture = capture
        self.axes: dict[str, int] = {}  # symbol -> which axis of its tensor
        self.numbers: list[tuple[str, str, str | None]] = []  # symbol, number, where
        self.guards: list[tuple[str, str | None]] = []  # condition, where

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if found := re.match(r"create_symbol (\w+) = .*? for .*?\.size\(\)\[(\d+)\]", text):
            self.axes[found[1]] = int(found[2])
        elif found := re.match(r"set_replacement (\w+) = (\d+)\b", text):
            self.numbers.append((found[1], found[2], self._place()))
        elif found := re.match(r"\S+ (.*) \[guard added\]", text):
            self.guards.append((found[1], self._place()))

    def _place(self) -> str | None:
        frames = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.capture:
            frames.append((frame, frame.f_lineno))
            frame = frame.f_back
        return _line(frames)


def _line(frames: Iterable[tuple[FrameType, int]]) -> str | None:
    """The innermost line of the user's own code, else of diffusers' or transformers'; ``frames`` from the inside out."""
    own, library = None, None
    for frame, number in frames:
        path = str(Path(frame.f_code.co_filename).resolve())
        installed = "site-packages" in path or "dist-packages" in path
        standard = path.startswith(STANDARD) and not installed
        if frame.f_code.co_filename.startswith("<") or standard or path.startswith(MACHINERY):
            continue
        text = linecache.getline(path, number).strip()
        where = f"{path}:{number}, in {frame.f_code.co_name}" + (f": {text}" if text else "")
        if installed or path.startswith(LIBRARIES):
            library = library or where
        else:
            own = own or where
    return own or library


@contextmanager
def _watching(frame: FrameType) -> Iterator[_Watch]:
    """Read torch's log of guards, and keep it and what torch prints to itself."""
    logger, watch = logging.getLogger(GUARDS), _Watch(frame)
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.handlers, logger.propagate = [watch], False
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield watch
    finally:
        logger.handlers = before[2]
        logger.propagate = before[1]
        logger.setLevel(before[0])


@contextmanager
def _as_it_was(module: torch.nn.Module) -> Iterator[None]:
    """Undo what a network keeps while it is traced: a grid that it caches would be one without numbers."""
    parts = [(part, dict(part.__dict__), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes, buffers in parts:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)


def capture(module: torch.nn.Module, args: tuple[Any, ...], shapes: Any, what: str) -> torch.export.ExportedProgram:
    """The module as ``torch.export`` has it, with every axis of ``shapes`` dynamic.

    Args:
        shapes: the dynamic axes, as :func:`torch.export.export` takes them.
        what: the module's name in errors.

    Raises:
        FixedAxisError: when the module makes a number of a dynamic axis; names the axis and the line.
        InputError: when it cannot be traced, with torch's reason.
    """
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]  # as torch.onnx
    with _watching(sys._getframe()) as watch, _as_it_was(module), oblivious:
        try:
            return torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            if "Constraints violated" in str(error) or "L['" in str(error):
                raise _fixed(watch, _names(shapes), str(error), what) from error
            raise InputError(_untraceable(error, what)) from error


def _names(shapes: Any) -> dict[int, str]:
    """Axis -> name of its dimension: ``batch``, ``height``, ``width``."""
    found: dict[int, str] = {}
    leaves = shapes if isinstance(shapes, (list, tuple)) else ()
    for leaf in leaves:
        axes = leaf if isinstance(leaf, Mapping) else _names(leaf)
        for axis, dim in axes.items():
            name = dim if isinstance(dim, str) else re.sub(r"[^a-z]", "", dim.__name__)
            found.setdefault(axis, name)
    return found


def _fixed(watch: _Watch, names: dict[int, str], text: str, what: str) -> FixedAxisError:
    """What the log says of the axes that torch's error names."""
    named = [name for name in dict.fromkeys(names.values()) if re.search(rf"\b\d*\*?{name}\b", text)]
    for symbol, number, where in watch.numbers:
        axis = names.get(watch.axes.get(symbol, -1))
        if axis is not None:
            return FixedAxisError(_fixed_line(what, axis, f"makes the number {number} of it", where))
    axis = named[0] if named else next(iter(names.values()), "batch")
    reason = next((line.strip(" -") for line in text.splitlines() if "satisfy" in line or "specialized" in line), "")
    reason = reason.partition("Specializations unexpectedly")[0]
    reason = re.sub(r"L\[.*?\.size\(\)\[\d+\]", "it", reason.replace(" = L['", " L['"))
    places = [where for condition, where in watch.guards if where and any(symbol in condition for symbol in watch.axes)]
    return FixedAxisError(_fixed_line(what, axis, f"takes some sizes only ({_short(reason)})", places[0] if places else None))


def _fixed_line(what: str, axis: str, why: str, where: str | None) -> str:
    way_out = "--batch 1" if axis == "batch" else "--dynamic batch"
    return (
        f"expected {what} to leave {axis} dynamic; it {why} at {where or 'a line that torch does not tell'}; take the tensor's "
        f"shape there, or export with a fixed {axis}: {way_out}"
    )


def _short(text: str) -> str:
    return " ".join(text.split())[:200]


def _untraceable(error: BaseException, what: str) -> str:
    """One line for an exception of a trace: torch's reason, and the network's line."""
    where = _line(reversed([(frame, number) for frame, number in walk_tb(error.__traceback__)]))
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    hint = (
        "take Python's if, for and .item() off tensors' values"
        if "data-dependent" in reason
        else "change it there, or export with one size of the batch: --batch 1"
    )
    at = f" at {where}" if where else ""
    return f"expected {what} to be traced by torch.export; {type(error).__name__}{at}: {_short(reason)}; {hint}"


def conversion_reason(error: BaseException) -> str:
    """The first line of the innermost cause of an error of ``torch.onnx``."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _short(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__))
