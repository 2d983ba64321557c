"""Where an adapter departs from its network: the layers, sites and request inputs to name in the error.

Nothing here runs while adapter and network agree (:mod:`~mteo_deploy.exporters.check_adapter`). The network's layers are
watched while it is called, and what each takes in and gives is kept as a few numbers: of tensors, a large network has
gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.hooks import HookedAdapter

NAMED = 6
"""How many names an error lists."""

NEAR = 1e-4
"""Relative difference of values that were computed in two ways."""


class Inputs(Protocol):
    """What to call adapter and network with: see :class:`~mteo_deploy.exporters.check_adapter.Probe`."""

    @property
    def state(self) -> torch.Tensor: ...
    @property
    def times(self) -> tuple[float, float]: ...
    @property
    def requests(self) -> Mapping[str, torch.Tensor]: ...
    def row(self, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """State and request inputs of one of the rows."""


Print = tuple[Any, ...]
"""A tensor in short: shape, mean, norm, and its product with a fixed wave."""


@dataclass(frozen=True)
class Call:
    """One call of a layer: its name in the network, and what went in and came out."""

    name: str
    inputs: tuple[Print, ...]
    outputs: tuple[Print, ...]


def names_of(names: Sequence[str]) -> str:
    """In words, the first few."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def random_layers(adapter: Adapter, call: Callable[[], Any]) -> str:
    """The innermost layers that give two outputs for the same input, the first of them."""
    first, second = (_watched(adapter.network, call) for _ in range(2))
    if [one.name for one in first] != [one.name for one in second]:
        return "which layers are called"
    wrong = [a.name for a, b in zip(first, second, strict=True) if a.inputs == b.inputs and a.outputs != b.outputs]
    return _innermost(wrong)[0] if _innermost(wrong) != [""] and wrong else _forward(adapter)


def reached_by_the_time(adapter: Adapter, call: Callable[[int, int], Any]) -> str:
    """The layers where the time still enters: what they take depends on the time and not on the state, what they give on both.

    Args:
        call: the network with its sites given, for a time and a row of the state, each by its index.
    """
    here, later, other = (_watched(adapter.network, partial(call, *at)) for at in ((0, 0), (1, 0), (0, 1)))
    if not [one.name for one in here] == [one.name for one in later] == [one.name for one in other]:
        return f"{_forward(adapter)}, which calls other layers at another time"
    found, first = [], []
    for a, b, c in zip(here, later, other, strict=True):
        of_time = any(x != y and x == z for x, y, z in zip(a.inputs, b.inputs, c.inputs, strict=False))
        if of_time and a.outputs not in (b.outputs, c.outputs):
            found.append(a.name)
            if any(x == y and x != z for x, y, z in zip(a.inputs, b.inputs, c.inputs, strict=False)):
                first.append(a.name)  # its state is the same at both times, its output is not: the time enters here
    inner = [name for name in _innermost(found) if name]
    kinds = {type(adapter.network.get_submodule(name)) for name in inner if name in first}
    named = [name for name in inner if type(adapter.network.get_submodule(name)) in kinds]
    sites = tuple(f"{site.name}." for site in adapter.sites)
    named = [name for name in named if not any(one.startswith(f"{name}.") for one in sites)] or named
    if not named:
        return f"{_forward(adapter)}; what is no layer's input cannot be given: make it a module's, or refuse the network"
    return f"{names_of(named)}; make a site of each (add_site), or refuse the network"


def why_different(adapter: Adapter, inputs: Inputs, embeddings: Sequence[Sequence[torch.Tensor]]) -> str:
    """The most telling of: requests that one of both ignores, sites whose embedding is another, rows that meet, layers."""
    try:
        return (
            _requests(adapter, inputs, embeddings[0])
            or _sites(adapter, inputs, embeddings[0])
            or _rows(adapter, inputs, embeddings)
            or _layers(adapter, inputs, embeddings[0])
        )
    except Exception as error:  # in a search for words only: the difference itself is known
        return f"what differs could not be found ({type(error).__name__}); compare call and native"


def _requests(adapter: Adapter, inputs: Inputs, embeddings: Sequence[torch.Tensor]) -> str:
    ignored: dict[str, list[str]] = {"the adapter": [], "native": []}
    state, given = inputs.row(0)
    before = _native(adapter, state, inputs.times[0], given), adapter(state, *embeddings, **given)
    for name, values in given.items():
        other = inputs.requests[name][1:2]
        changed = {**given, name: values + 1 if torch.equal(other, values) and values.is_floating_point() else other}
        after = _native(adapter, state, inputs.times[0], changed), adapter(state, *embeddings, **changed)
        moves = [not _near(a, b) for a, b in zip(after, before, strict=True)]
        if moves == [True, False]:
            ignored["the adapter"].append(name)
        if moves == [False, True]:
            ignored["native"].append(name)
    if ignored["the adapter"]:
        return (
            f"{names_of(ignored['the adapter'])} changes the network's output and not the adapter's: it enters before a module "
            "that silence() switches off, or call leaves it out; make what the time and it meet in request time's part (meet), "
            "or refuse such networks"
        )
    return f"native leaves out {names_of(ignored['native'])}; pass it on" if ignored["native"] else ""


def _sites(adapter: Adapter, inputs: Inputs, embeddings: Sequence[torch.Tensor]) -> str:
    """Sites whose module gets something else from the network itself than ``embeddings`` says."""
    if not isinstance(adapter, HookedAdapter):
        return ""
    state, given = inputs.row(0)
    with adapter.watching() as taken:
        _native(adapter, state, inputs.times[0], given)
    wrong = [
        site.name
        for k, (site, one) in enumerate(zip(adapter.sites, embeddings, strict=True))
        if k in taken and taken[k].shape == one.shape and not _near(one, taken[k])
    ]
    if not wrong:
        return ""
    return (
        f"embeddings gives another value than the network itself has at the time for {names_of(wrong)} ({len(wrong)} of "
        f"{len(adapter.sites)} sites); compute it as the network's forward does, in the order of the sites"
    )


def _rows(adapter: Adapter, inputs: Inputs, embeddings: Sequence[Sequence[torch.Tensor]]) -> str:
    """Whether the network alone, row by row, is what the adapter is."""
    for i, t in enumerate(inputs.times):
        state, given = inputs.row(i)
        if not _near(adapter(state, *embeddings[i], **given), _native(adapter, state, t, given)):
            return ""
    return (
        "row by row they are equal, so rows of a batch depend on one another, or native takes one time for all; give the whole "
        "timestep [batch] to the network"
    )


def _layers(adapter: Adapter, inputs: Inputs, embeddings: Sequence[torch.Tensor]) -> str:
    """The first layers whose input is another in the adapter's call, those of the time alone apart."""
    state, given = inputs.row(0)
    own = _watched(adapter.network, lambda: _native(adapter, state, inputs.times[0], given))
    later = _watched(adapter.network, lambda: _native(adapter, inputs.state[1:2], inputs.times[0], given))
    found = _watched(adapter.network, lambda: adapter(state, *embeddings, **given))
    by_name = {one.name: one for one in reversed(found)}
    of_state = {a.name for a, b in zip(own, later, strict=False) if a.inputs != b.inputs}
    wrong = [
        one.name
        for one in own
        if one.name in of_state and one.name in by_name and not _alike(one.inputs, by_name[one.name].inputs)
    ]
    if not wrong:
        return "call does something else than native before the first layer or behind the last; compare call and native"
    return f"the first layers that take in something else are {names_of(_innermost(wrong))}; compare call and native"


def _native(adapter: Adapter, state: torch.Tensor, t: float, requests: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return adapter.native(state, torch.tensor([t], dtype=torch.float32), **requests)


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found.double() - expected.double()).norm()) <= NEAR * float(expected.double().norm())


def _alike(found: Sequence[Print], expected: Sequence[Print]) -> bool:
    pairs = list(zip(found, expected, strict=False))
    return all(abs(a - b) <= NEAR * max(abs(b), 1e-3) for x, y in pairs for a, b in zip(x[1:], y[1:], strict=True))


def _forward(adapter: Adapter) -> str:
    return f"{type(adapter.network).__name__}.forward itself, outside of its layers"


def _innermost(names: Sequence[str]) -> list[str]:
    """Those that no other is part of, each once, in order."""
    once = list(dict.fromkeys(names))
    return [name for name in once if not any(other.startswith(f"{name}." if name else "") and other != name for other in once)]


def _watched(network: torch.nn.Module, call: Callable[[], Any]) -> list[Call]:
    """Every call of a layer, in the order in which they begin."""
    found: list[Call | None] = []
    open_calls: list[tuple[int, tuple[Print, ...]]] = []

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        open_calls.append((len(found), _prints((args, kwargs))))
        found.append(None)

    def leave(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            place, inputs = open_calls.pop()
            found[place] = Call(name, inputs, _prints(output))

        return hook

    with _hooks() as handles, torch.no_grad():
        for name, module in network.named_modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name)))
        call()
    return [one for one in found if one is not None]


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _prints(values: Any) -> tuple[Print, ...]:
    return tuple(_print(leaf) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and not leaf.is_complex())


def _print(tensor: torch.Tensor) -> Print:
    flat = tensor.detach().double().flatten()
    wave = torch.cos(torch.arange(flat.numel(), dtype=torch.float64, device=flat.device))
    return tuple(tensor.shape), float(flat.mean()) if flat.numel() else 0.0, float(flat.norm()), float(flat @ wave)
