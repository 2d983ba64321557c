"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, equation 6): the network's output moved away from the one
without the condition, ``negative + scale * (positive - negative)``; some pipelines then give it its old length again
(``Adapter.guide``).

The network is called once, on both branches of every image. The two rows of an image are neighbours, negative first, so that
whatever is cut off such a batch is a row for each image again, with both branches in it (``exporters/branches.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.plan import Plan
from mteo_deploy.requests import GUIDANCE_SCALE, NEGATIVE, Request


class GuidedAdapter(Adapter):
    """An adapter's network under guidance: the same sites and embeddings, which both branches share.

    Request inputs beside the network's own: ``negative_<name>`` for each that the adapter's ``negatives`` does not settle, and
    ``guidance_scale``, one number per image: 1 is the network itself, 0 the negative branch.

    Args:
        inner: the adapter; loaded, frozen, of the size wanted.
        scale: what ``guidance_scale`` is where nobody gives it.
        null_class: the label of no class; None for the one that the adapter knows.

    Raises:
        InputError: for a scale that is no number, a backbone with nothing to leave out, or classes none of which is no class.
    """

    def __init__(self, inner: Adapter, scale: float, null_class: int | None = None) -> None:
        torch.nn.Module.__init__(self)  # not Adapter's: all that it finds out is taken from the inner one
        for name in ("scheduler_config", *Adapter.__annotations__):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))
        if not math.isfinite(scale):
            raise InputError(f"expected a number for --guidance-scale; found {scale}")
        self._inner, self.branches = (inner,), 2  # in a tuple: its network is this one's already
        self.negatives = {**inner.negatives, **_null_labels(inner, null_class)}
        second = [replace(r, name=NEGATIVE + r.name) for r in inner.requests if r.name not in self.negatives]
        own = [replace(r, none=self.negatives.get(r.name)) for r in inner.requests]
        self.requests = (*own, *second, Request(GUIDANCE_SCALE, "float32", default=float(scale)))

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._inner[0].embeddings(timestep)

    @contextmanager
    def recomputing_blocks(self) -> Iterator[bool]:
        with self._inner[0].recomputing_blocks() as found:
            yield found

    def compile_plan(self, *args: Any, **options: Any) -> Plan:
        return self._inner[0].compile_plan(*args, **options)

    def fingerprint(self) -> str:
        return self._inner[0].fingerprint()

    def forward(self, state: torch.Tensor, *embeddings: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        output = self._inner[0](_neighbours(state, state), *embeddings, **self._both(requests))
        return self._guide(output, state, requests)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        times = _neighbours(timestep, timestep)
        output = self._inner[0].native(_neighbours(state, state), times, **self._both(requests))
        return self._guide(output, state, requests)

    def _both(self, requests: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inner adapter's request inputs, of both branches."""
        return {r.name: _neighbours(self._negative(r.name, requests), requests[r.name]) for r in self._inner[0].requests}

    def _guide(self, output: torch.Tensor, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        """``[batch, ...]`` of the output for both branches' neighbouring rows, ``[2 * batch, ...]``."""
        scale = requests[GUIDANCE_SCALE].reshape(-1, *[1] * (state.ndim - 1))
        negative, positive = output.reshape(state.shape[0], 2, *output.shape[1:]).unbind(1)
        return self._inner[0].guide(negative, positive, scale)

    def _negative(self, name: str, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        if name not in self.negatives:
            return requests[NEGATIVE + name]
        label = self.negatives[name]
        return requests[name] if label is None else torch.full_like(requests[name], label)


def _neighbours(negative: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """``[2 * batch, ...]``: the rows of both, in turn."""
    return torch.stack([negative, positive], dim=1).flatten(0, 1)


def _null_labels(inner: Adapter, null_class: int | None) -> dict[str, int]:
    """For each input of classes that the adapter does not settle, or that the caller does, the label of no class."""
    if not inner.requests:
        raise InputError(f"expected a backbone with classes or prompts for guidance; found an unconditional {inner.family}")
    classes = [request for request in inner.requests if request.high is not None and not request.mask]
    if null_class is not None and not classes:
        raise InputError(f"expected --null-class for a backbone with classes; found a {inner.family} without; leave it out")
    for request in classes:
        if request.high == 1:
            raise InputError(
                f"expected labels beside that of no class; found a {inner.family} with 1; sample it without guidance"
            )
        if null_class is None and request.name not in inner.negatives:
            raise InputError(
                f"expected a label for no class: nothing in a {inner.family} says which of its {request.high} labels it was "
                "trained with where the class was left out; pass --null-class LABEL"
            )
        if null_class is not None and not 0 <= null_class < (request.high or 0):
            raise InputError(f"expected --null-class in [0, {request.high}); found {null_class}")
    return {} if null_class is None else {request.name: null_class for request in classes}


def guided(adapter: Adapter, scale: float | None, null_class: int | None = None) -> Adapter:
    """The adapter under guidance; itself where ``scale`` is None.

    Raises:
        InputError: as :class:`GuidedAdapter`, or for a null class without a scale.
    """
    if scale is None and null_class is not None:
        raise InputError("expected --null-class with --guidance-scale only; found no scale; pass one or leave it out")
    return adapter if scale is None else GuidedAdapter(adapter, scale, null_class).requires_grad_(False).eval()
