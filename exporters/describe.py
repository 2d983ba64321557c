"""What a backbone is, before anything is trained: its sites and request inputs, and what baking will take out of it.

The network is called once on the meta device, where nothing is computed, and each tensor is followed from when it is known, as
:mod:`~mteo_deploy.exporters.passes.binding_time` follows a graph's values: a parameter stays in the step graphs where something
known at each step meets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mteo_deploy.exporters.base import Adapter, site_dict
from mteo_deploy.exporters.passes.binding_time import BindingTime
from mteo_deploy.exporters.scheduler_options import left_out
from mteo_deploy.schedules import FlowLevels

SHAPE_ONLY = {
    getattr(torch.ops.aten, name)
    for name in ("empty_like", "full_like", "ones_like", "zeros_like", "new_empty", "new_full", "new_ones", "new_zeros")
}
"""Operators that read a tensor's shape and none of its numbers."""


@dataclass(frozen=True)
class _Known:
    """When a tensor is known, and of which parameters it is made where it is made of nothing else."""

    time: BindingTime = BindingTime.COMPILE
    parameters: frozenset[str] = frozenset()
    embedding: bool = False


class _Follow(TorchDispatchMode):
    """Notes at which time each parameter is used: in the prelude, in the steps.

    A tensor is known by its storage, which its views share: what is written into a view is written into the whole.
    """

    def __init__(self, inputs: dict[torch.Tensor, _Known]) -> None:
        super().__init__()
        self.known: dict[int, _Known] = {}
        self.alive: list[torch.Tensor] = []  # a storage that is freed would give its place to another
        self.used: dict[BindingTime, set[str]] = {time: set() for time in BindingTime}
        for tensor, known in inputs.items():
            self._note(tensor, known)

    def _note(self, tensor: torch.Tensor, known: _Known) -> None:
        self.known[tensor.untyped_storage()._cdata] = known
        self.alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [self.known.get(t.untyped_storage()._cdata, _Known()) for t in _tensors((args, kwargs))]
        outputs = func(*args, **(kwargs or {}))
        time = max((one.time for one in found), default=BindingTime.COMPILE)
        parameters = frozenset[str]().union(*(one.parameters for one in found))
        embedding = any(one.embedding for one in found)
        early = time == BindingTime.COMPILE
        if func.overloadpacket in SHAPE_ONLY:
            parameters = frozenset()
        if not early:
            self.used[time] |= parameters
        known = _Known(time, parameters if early and not embedding else frozenset(), early and embedding)
        for tensor in _tensors(outputs):
            self._note(tensor, known)
        return outputs


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


@torch.no_grad()
def parameter_times(adapter: Adapter) -> dict[str, set[str]]:
    """Names of the parameters by the last time they are needed at.

    Returns:
        ``removed``: baked, in no graph; ``prelude``: used once per request; ``steps``: in every step graph.
    """
    with torch.device("meta"):
        weights = {name: torch.empty_like(value, device="meta") for name, value in adapter.named_parameters()}
        buffers = {name: torch.empty_like(value, device="meta") for name, value in adapter.named_buffers()}
        state = torch.empty(2, *adapter.sample_shape)
        embeddings = [torch.empty(1, site.width) for site in adapter.sites]
        requests = {name: values.to("meta") for name, values in adapter.draw_requests(2, 0).items()}
        inputs = {value: _Known(parameters=frozenset([name])) for name, value in weights.items()}
        inputs |= {value: _Known(embedding=True) for value in embeddings} | {state: _Known(BindingTime.STEP)}
        inputs |= {value: _Known(BindingTime.REQUEST) for value in requests.values()}
        with _Follow(inputs) as follow:
            functional_call(adapter, weights | buffers, (state, *embeddings), requests)
    steps, prelude = follow.used[BindingTime.STEP], follow.used[BindingTime.REQUEST] - follow.used[BindingTime.STEP]
    return {"removed": set(weights) - steps - prelude, "prelude": prelude, "steps": steps}


def _counts(adapter: Adapter) -> dict[str, Any]:
    try:
        times = parameter_times(adapter)
    except (NotImplementedError, RuntimeError) as error:  # a network may ask for a value, and there are none
        return {"unknown": str(error).splitlines()[0]}
    sizes = {name: parameter.numel() for name, parameter in adapter.named_parameters()}
    return {time: sum(sizes[name] for name in names) for time, names in times.items()}


def describe(adapter: Adapter) -> dict[str, Any]:
    """A backbone in plain data.

    Returns:
        ``family``, ``source``, ``loras``, ``parameters``; ``pipeline``, its class and whether that was checked, and which of
        its parts are ``left_out`` of a bundle, and why; ``baking``: how many of them are ``removed``, used once per request
        (``prelude``), and left in the ``steps``, or why that is ``unknown``; ``sites`` with their widths, and how many
        ``pretrained`` embeddings they share; ``requests``; ``prediction_type`` and ``levels``, the noise (flow matching: time)
        that sampling runs through; ``scheduler``: its class, and what only it does (its ``own``); ``sample_shape``, and what
        other ``sizes`` are multiples of, ``fixed`` by export or left ``open``.
    """
    levels, device = adapter.levels, next(adapter.parameters()).device
    with torch.no_grad():
        distinct = {id(tensor) for tensor in adapter.embeddings(torch.zeros(1, device=device))}
    return {
        "kind": "backbone",
        "family": adapter.family,
        "source": adapter.source,
        "pipeline": None if adapter.pipeline is None else adapter.pipeline.to_json(),
        "left_out": {} if adapter.pipeline is None else adapter.pipeline.left_out(),
        "loras": adapter.loras.to_json(),
        "parameters": adapter.parameter_count,
        "baking": _counts(adapter),
        "sites": site_dict(adapter.sites),
        "pretrained": len(distinct),
        "requests": [request.to_json() for request in adapter.requests],
        "tokens": adapter.tokens,
        "prediction_type": adapter.prediction_type,
        "scheduler": {"class": adapter.scheduler_config["_class_name"], "own": left_out(adapter.scheduler_config)},
        "levels": {
            "low": levels.low,
            "high": levels.high,
            "trained": list(levels.limits),
            "schedule": levels.default_schedule,
            "shift": levels.shift if isinstance(levels, FlowLevels) else None,
        },
        "sample_shape": list(adapter.sample_shape),
        "sizes": {"fixed": adapter.fixed_multiple or adapter.size_multiple, "open": adapter.size_multiple},
    }
