"""Parity: a traced graph computes what its torch module does, at other sizes than the one that was traced.

A grid that a module made once, for the traced size, is a constant of the graph; it shows at another batch, height or width
only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_leaves

from mteo_deploy.errors import InputError, border
from mteo_deploy.exporters.evaluate import evaluate

TOLERANCE = 1e-3
"""Relative error between a graph and torch, both in float32: sums are taken in another order."""
BATCHES = (3, 1)
"""Sizes of the batch to compare at; the traced one is 2, and 1 is what squeezes and broadcasts by itself."""


@dataclass(frozen=True)
class Traced:
    """A graph and what it was made of.

    Attributes:
        what: the module's name in errors.
        inputs: names of the graph's inputs, in the order of the module's flattened arguments.
    """

    model: ir.Model
    program: torch.export.ExportedProgram
    module: torch.nn.Module
    inputs: Sequence[str]
    what: str


@dataclass(frozen=True)
class Case:
    """Arguments to compare on, and in words what size they are (``batch 3``) and how to export without it.

    Attributes:
        shape: that the output has to have; None for any.
    """

    args: tuple[Any, ...]
    size: str
    way_out: str
    shape: tuple[int, ...] | None = None


def check(traced: Traced, cases: Iterable[Case]) -> None:
    """Compare the graph with torch; through the traced program where the graph is too large to be run here.

    Raises:
        InputError: when torch does not take a case, or the graph computes something else.
    """
    for case in cases:
        expected = _numbers(partial(traced.module, *case.args), traced.what, case)
        if case.shape is not None and expected[0].shape != case.shape:
            raise InputError(
                f"expected {traced.what} to give an output of shape {case.shape} at {case.size}; found {expected[0].shape}; "
                "reshape it in the adapter"
            )
        names = dict(zip(traced.inputs, (value.numpy() for value in tree_leaves(case.args)), strict=True))
        found = _graph(traced, names, case)
        if found is None:
            found = _numbers(partial(traced.program.module(), *case.args), f"the trace of {traced.what}", case)
        for one, wanted in zip(found, expected, strict=True):
            if one.shape != wanted.shape or not _error(one, wanted) <= TOLERANCE:
                what = f"an output of {one.shape} for {wanted.shape}" if one.shape != wanted.shape else "other numbers"
                raise InputError(
                    f"expected the graph traced of {traced.what} to compute what torch does at {case.size}; found {what}; "
                    f"something that the network made of the traced size alone is a constant in it; {case.way_out}"
                )


def _graph(traced: Traced, feeds: dict[str, NDArray[Any]], case: Case) -> list[NDArray[Any]] | None:
    with border(f"expected the graph traced of {traced.what} to run at {case.size}", case.way_out):
        return evaluate(traced.model, feeds)


def _numbers(call: Callable[[], Any], what: str, case: Case) -> list[NDArray[Any]]:
    with border(f"expected {what} to take {case.size}", case.way_out), torch.no_grad():
        return [value.numpy() for value in tree_leaves(call())]


def _error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-12)) if b.size else 0.0
