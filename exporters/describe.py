"""What a backbone is, before anything is trained: its sites and request inputs, and what baking will take out of it.

The network is called on the meta device, where nothing is computed, and each tensor is followed from when it is known, as
:mod:`~mteo_deploy.exporters.passes.binding_time` follows a graph's values: a parameter stays in the step graphs where something
known at each step meets it. It is called for two images and for three: an operator whose sizes differ depends on the batch.
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
FREE = {
    getattr(torch.ops.aten, name)
    for name in (
        "alias",
        "clone",
        "detach",
        "expand",
        "reshape",
        "squeeze",
        "unsqueeze",
        "view",
        "_reshape_alias",
        "_unsafe_view",
    )
}
"""Operators that compute nothing, as :mod:`~mteo_deploy.exporters.passes.hoist` leaves them to the steps."""


@dataclass(frozen=True, eq=False)
class _Known:
    """When a tensor is known, and of which parameters it is made where it is made of nothing else.

    Attributes:
        used: parameters that its operator meets at that time.
        made_of: what the operator took in.
    """

    time: BindingTime = BindingTime.COMPILE
    parameters: frozenset[str] = frozenset()
    embedding: bool = False
    used: frozenset[str] = frozenset()
    made_of: tuple[_Known, ...] = ()


_Call = tuple[Any, list[int], list[torch.Size]]  # an operator, the numbers among its arguments, its outputs' shapes


class _Calls(TorchDispatchMode):
    """Notes the operators that a network calls, and their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.alive: list[Any] = []  # as _Follow does: torch calls one operator more for a new tensor that is held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.calls.append(_call(func, (args, kwargs), outputs))
        self.alive.append(outputs)
        return outputs


def _call(func: Any, arguments: Any, outputs: Any) -> _Call:
    numbers = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, int)]
    return func.overloadpacket, numbers, [tensor.shape for tensor in _tensors(outputs)]


class _Follow(TorchDispatchMode):
    """Notes when each tensor is known, and which parameters are used at that time.

    A tensor is known by its storage, which its views share: what is written into a view is written into the whole. A view that
    the batch decides the size of is later than the whole by itself.

    Args:
        others: the calls of the network at another batch.
        numbers: when numbers that depend on the batch are known: request time, where a request has the batch.
    """

    def __init__(self, inputs: dict[torch.Tensor, _Known], others: list[_Call], numbers: BindingTime) -> None:
        super().__init__()
        self.others, self.numbers = iter(others), numbers
        self.known: dict[int, _Known] = {}
        self.views: dict[int, _Known] = {}
        self.alive: list[torch.Tensor] = []  # a storage that is freed would give its place to another
        for tensor, known in inputs.items():
            self._note(tensor, known)

    def _note(self, tensor: torch.Tensor, known: _Known) -> None:
        storage = tensor.untyped_storage()._cdata
        if known.time == BindingTime.BATCH and storage in self.known:
            self.views[id(tensor)] = known
        else:
            self.known[storage] = known
        self.alive.append(tensor)

    def _of(self, tensor: torch.Tensor) -> _Known:
        whole = self.known.get(tensor.untyped_storage()._cdata, _Known())
        return max(whole, self.views.get(id(tensor), whole), key=lambda known: known.time)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [self._of(tensor) for tensor in _tensors((args, kwargs))]
        outputs = func(*args, **(kwargs or {}))
        known = self._when(found, _call(func, (args, kwargs), outputs), outputs)
        for tensor in _tensors(outputs):
            self._note(tensor, known)
        return outputs

    def _when(self, found: list[_Known], call: _Call, outputs: Any) -> _Known:
        """When an operator's outputs are known; its parameters are used at that time, unless it is early: then with them."""
        other = next(self.others, None)
        if other is None or other[0] != call[0]:
            raise RuntimeError("the operators that it calls depend on the size of the batch")
        if call[0] in SHAPE_ONLY:
            return _Known(BindingTime.BATCH if call[2] != other[2] else BindingTime.COMPILE)
        time = max((one.time for one in found), default=BindingTime.COMPILE)
        if call[1] != other[1]:
            time = max(time, BindingTime.BATCH)
        if time == BindingTime.BATCH and call[0] not in FREE and any(t.is_floating_point() for t in _tensors(outputs)):
            time = self.numbers
        parameters = frozenset[str]().union(*(one.parameters for one in found))
        embedding = any(one.embedding for one in found)
        if time > BindingTime.BATCH:
            return _Known(time, used=parameters, made_of=tuple(found))
        return _Known(time, frozenset() if embedding else parameters, embedding, made_of=tuple(found))

    def used(self, output: torch.Tensor) -> dict[BindingTime, set[str]]:
        """Time -> the parameters that are used then for an output: what nothing comes of is in no graph either."""
        used: dict[BindingTime, set[str]] = {time: set() for time in BindingTime}
        waiting, seen = [self._of(output)], set[_Known]()
        used[BindingTime.STEP] |= waiting[0].parameters
        while waiting:
            known = waiting.pop()
            if known not in seen:
                seen.add(known)
                used[known.time] |= known.used
                waiting.extend(known.made_of)
        return used


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
        embeddings = [torch.empty(1, site.width) for site in adapter.sites]

        def arguments(count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            requests = {name: values.to("meta") for name, values in adapter.draw_requests(count, 0).items()}
            return torch.empty(count, *adapter.sample_shape), requests

        state, requests = arguments(3)
        functional_call(adapter, weights | buffers, (state, *embeddings), requests)  # fills what a network keeps: positions
        with _Calls() as at_another_batch:
            functional_call(adapter, weights | buffers, (state, *embeddings), requests)
        state, requests = arguments(2)
        inputs = {value: _Known(parameters=frozenset([name])) for name, value in weights.items()}
        inputs |= {value: _Known(embedding=True) for value in embeddings} | {state: _Known(BindingTime.STEP)}
        inputs |= {value: _Known(BindingTime.REQUEST) for value in requests.values()}
        with _Follow(inputs, at_another_batch.calls, BindingTime.REQUEST if requests else BindingTime.STEP) as follow:
            used = follow.used(functional_call(adapter, weights | buffers, (state, *embeddings), requests))
    steps, prelude = used[BindingTime.STEP], used[BindingTime.REQUEST] - used[BindingTime.STEP]
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
