"""Is the adapter the network? Compared before anything is traced, learned or baked.

All that comes after (graphs, engines, ``verify``) is compared with the adapter in torch, so a mistake of the adapter would be
copied faithfully. The one thing that knows better is the network itself, called as its own pipeline calls it:
:meth:`~mteo_deploy.exporters.base.Adapter.native`. At two random times, with random states and request inputs, the adapter with
the pretrained embeddings must give what ``native`` gives; the network whose sites are given must give the same at any time; and
two equal calls must be equal. That is nine rows of the network in all, however large it is.

What is wrong is named by :mod:`~mteo_deploy.exporters.adapter_faults`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mteo_deploy.errors import InputError, border
from mteo_deploy.exporters.adapter_faults import names_of, random_layers, reached_by_the_time, why_different
from mteo_deploy.exporters.base import NATIVE, Adapter, as_json
from mteo_deploy.exporters.hooks import HookedAdapter

TOLERANCE = 1e-4
"""Relative error (norm of the difference over the norm) that adapter and network may have, in float32. The same sums in
another order differ by 1e-7 to 1e-6; a time that is scaled on its way to the network by 1e-5; a forgotten site by 1e-2."""

SAME = 1e-5
"""Relative error of two calls that should be equal: threads may add in another order."""

SEED = 20260322

SHAPE_ONLY = {
    getattr(torch.ops.aten, name)
    for name in ("empty_like", "full_like", "ones_like", "zeros_like", "new_empty", "new_full", "new_ones", "new_zeros")
}
"""Operators that read a tensor's shape and none of its numbers."""


@dataclass(frozen=True)
class Checked:
    """What was found of an adapter that is its network.

    Attributes:
        error: the largest relative error against ``native``.
        times: where they were compared, in the units of ``embeddings``.
        tolerance: what was allowed.
    """

    error: float
    times: tuple[float, ...]
    tolerance: float = TOLERANCE

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


LARGE = 100_000_000
"""Parameters up to which ``inspect`` reads the weights of a diffusers network."""


def load_to_inspect(load: Callable[[bool], Adapter]) -> tuple[Adapter, dict[str, Any]]:
    """A backbone to describe, and what the comparison found: :meth:`Checked.to_json`, or ``skipped`` and why.

    Args:
        load: gives the backbone, with its weights or without.

    Raises:
        InputError: as :func:`check_adapter`.
    """
    adapter = load(False)
    check_parts(adapter)
    if not any(parameter.is_meta for parameter in adapter.network.parameters()):
        return adapter, check_adapter(adapter).to_json()
    if adapter.parameter_count > LARGE:
        why = f"the weights of a network of more than {LARGE:,} parameters are not read here"
    elif adapter.directory is None or not any(adapter.directory.glob("*.safetensors")):
        why = "no weights are there"
    else:
        adapter = load(True)
        return adapter, check_adapter(adapter).to_json()
    return adapter, {"skipped": f"{why}; distill and export check"}


@torch.no_grad()
def check_adapter(adapter: Adapter) -> Checked:
    """Compare an adapter that has its weights with the network itself.

    Raises:
        InputError: when it is not the network, naming the sites, layers, request inputs or weights that are wrong.
    """
    check_parts(adapter)
    _check_weights(adapter)
    probe = Probe.draw(adapter)
    buffers = {name: value.clone() for name, value in adapter.network.named_buffers()}
    embeddings = _embeddings(adapter, probe.times)
    native = _native(adapter, probe)
    found = [_given(adapter, probe, i, embeddings[i]) for i in range(len(probe.times))]
    _check_equal_calls(adapter, probe, embeddings[0], found[0])
    _check_time_is_gone(adapter, probe, embeddings[0])
    for name, value in adapter.network.named_buffers():
        if name in buffers and not torch.equal(value, buffers[name]):
            raise InputError(
                f"expected a {adapter.family} that a call leaves as it is; found its buffer {name} changed by one (a cache, or "
                "batch normalisation in training mode); call network.eval(), and keep nothing between calls"
            )
    errors = [relative(one, native[i : i + 1]) for i, one in enumerate(found)]
    if max(errors) > TOLERANCE:
        worst = int(np.argmax(errors))
        raise InputError(
            f"expected {type(adapter).__name__} with the pretrained embeddings to equal its network called with the time "
            f"(native), within {TOLERANCE:g}; found a relative error of {errors[worst]:.1e} at time {probe.times[worst]:.6g}: "
            f"{why_different(adapter, probe, embeddings)}"
        )
    return Checked(max(errors), probe.times)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@dataclass(frozen=True)
class Probe:
    """Random inputs to compare at: ``state`` ``[2, ...]``, a time and a row of each request input for either."""

    state: torch.Tensor
    times: tuple[float, float]
    requests: Mapping[str, torch.Tensor]

    @classmethod
    def draw(cls, adapter: Adapter) -> Probe:
        """One time in the lower half of the backbone's range, one in the upper."""
        low, high = adapter.levels.timestep(np.array([adapter.levels.low, adapter.levels.high])).tolist()
        generator = np.random.default_rng(SEED)
        first, second = generator.uniform([0.2, 0.55], [0.45, 0.8])
        times = low + (high - low) * float(first), low + (high - low) * float(second)
        shape = (2, *adapter.sample_shape)
        state = torch.from_numpy(generator.standard_normal(shape).astype(np.float32))
        with border(f"expected request inputs that can be drawn: {adapter.requests}", "mend the adapter's requests"):
            return cls(state, times, adapter.draw_requests(2, SEED))

    def row(self, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """State ``[1, ...]`` and request inputs of one of the two."""
        return self.state[i : i + 1].clone(), {name: values[i : i + 1].clone() for name, values in self.requests.items()}


def check_parts(adapter: Adapter) -> None:
    """Whether an adapter has what the protocol asks for; it may be without weights.

    Raises:
        InputError: for the first that is missing or no such thing, with what to add.
    """
    name = type(adapter).__name__
    if type(adapter).native is Adapter.native:
        raise InputError(
            f"expected {name} to say how its network is called with a time; found no method native; add to the class: {NATIVE}"
        )
    if not adapter.scheduler_config.get("_class_name"):
        raise InputError(
            f"expected {name} to pass on the configuration of a diffusers scheduler, which says what noise and time are; found "
            f"{adapter.scheduler_config!r}; pass one with a _class_name, e.g. {{'_class_name': 'DDPMScheduler'}}"
        )
    if not adapter.sites:
        raise InputError(f"expected {name} to have one site or more; found none; call add_site for each in its __init__")
    names = [site.name for site in adapter.sites]
    if twice := sorted({one for one in names if names.count(one) > 1}):
        raise InputError(f"expected every site of {name} once; found {names_of(twice)} twice; leave out the second add_site")
    as_json(adapter.config, f"{name}.config")
    adapter.eval()
    if training := [one for one, module in adapter.network.named_modules() if module.training]:
        raise InputError(
            f"expected {name}'s network in eval mode; found {names_of(training)} in training mode after eval(); let train() "
            "and eval() reach them"
        )


def _check_weights(adapter: Adapter) -> None:
    """Float32 on the CPU, and finite."""
    weights = {name: value for name, value in adapter.network.state_dict(keep_vars=True).items() if value is not None}
    floats = {name: value for name, value in weights.items() if value.is_floating_point() or value.is_complex()}
    if not any(True for _ in adapter.network.parameters()):
        raise InputError(f"expected a network with parameters; found a {adapter.family} without; load its weights")
    for name, value in weights.items():
        if value.device.type != "cpu":
            raise InputError(
                f"expected {adapter.family}'s weights on the CPU; found {name} on {value.device}; call network.cpu() in load"
            )
    if other := {name: value.dtype for name, value in floats.items() if value.dtype not in (torch.float32, torch.complex64)}:
        kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in other.values()}))
        raise InputError(
            f"expected {adapter.family}'s weights in float32; found {kinds} in {names_of(list(other))}; call network.float() "
            "in load (export --precision chooses the types in the graphs)"
        )
    if broken := [name for name, value in floats.items() if not bool(torch.isfinite(value).all())]:
        raise InputError(
            f"expected finite weights of {adapter.family}; found NaN or Inf in {names_of(broken)} ({len(broken)} of "
            f"{len(floats)} tensors): training diverged or a conversion to half precision overflowed; pass other weights"
        )


def _embeddings(adapter: Adapter, times: Sequence[float]) -> list[list[torch.Tensor]]:
    """The pretrained embeddings of each time, ``[1, width]`` for each site, apart from one another in memory."""
    name = type(adapter).__name__
    with border(f"expected {name}.embeddings to take times of shape [2], float32", "mend the adapter"):
        both = adapter.embeddings(torch.tensor(times, dtype=torch.float32))
        alone = [adapter.embeddings(torch.tensor([t], dtype=torch.float32)) for t in times]
    for count, found in ((len(times), both), *((1, one) for one in alone)):
        _check_embeddings(adapter, found, count)
    for k, site in enumerate(adapter.sites):
        if relative(torch.cat([one[k] for one in alone]), both[k]) > TOLERANCE:
            raise InputError(
                f"expected {name}.embeddings to give each time its own row; found other values for {site.name} when two times "
                "are given at once; make each row of its time alone"
            )
    return [[embedding.clone() for embedding in one] for one in alone]


def _check_embeddings(adapter: Adapter, found: Any, count: int) -> None:
    name, sites = type(adapter).__name__, adapter.sites
    wanted = f"expected {name}.embeddings to return a tuple of {len(sites)} tensors, one for each site"
    if isinstance(found, torch.Tensor) or not isinstance(found, Sequence):
        raise InputError(f"{wanted}; found a {type(found).__name__}; return (tensor,) * len(self.sites) where they share one")
    if len(found) != len(sites):
        raise InputError(f"{wanted}; found {len(found)}; give one for each add_site, in that order")
    for site, one in zip(sites, found, strict=True):
        if not isinstance(one, torch.Tensor):
            raise InputError(f"{wanted}; found a {type(one).__name__} for {site.name}")
        if tuple(one.shape) != (count, site.width):
            raise InputError(
                f"expected the embedding of {site.name} as [times, width], {[count, site.width]}; found {list(one.shape)}; "
                "mend the width in add_site, or the adapter's embeddings"
            )
        if one.dtype != torch.float32 or one.requires_grad:
            kind = "a gradient" if one.requires_grad else str(one.dtype).removeprefix("torch.")
            raise InputError(f"expected the embedding of {site.name} as plain float32; found {kind}; add .float().detach()")
        if not bool(torch.isfinite(one).all()):
            raise InputError(f"expected a finite embedding of {site.name}; found NaN or Inf; mend the adapter's embeddings")


def _native(adapter: Adapter, probe: Probe) -> torch.Tensor:
    """The network's own output for both rows at once, each at its time."""
    state, requests = probe.state.clone(), {name: values.clone() for name, values in probe.requests.items()}
    times = torch.tensor(probe.times, dtype=torch.float32)
    what = f"expected {type(adapter).__name__}.native to take a state {list(state.shape)}, times [2] and {_listed(requests)}"
    with border(what, "mend native, sample_shape or requests"), _apart(adapter):
        output = adapter.native(state, times, **requests)
    _check_output(adapter, "native", output, probe, state, requests)
    norm = float(output.norm())
    if norm == 0:
        raise InputError(
            f"expected an output of {adapter.family} to compare with; found zero everywhere: a last layer that was never "
            "trained; pass trained weights"
        )
    return output


@contextmanager
def _apart(adapter: Adapter) -> Iterator[None]:
    """While it lasts, the adapter's own way to call the network is closed: ``native`` must not be compared with itself."""

    def closed(*args: Any, **options: Any) -> Any:
        raise InputError(
            f"expected {type(adapter).__name__}.native to call the network with the time; found that it calls the adapter's "
            f"own forward, which would compare it with itself; write {NATIVE}"
        )

    adapter.__dict__["forward"] = closed
    try:
        yield
    finally:
        del adapter.__dict__["forward"]


def _given(adapter: Adapter, probe: Probe, i: int, embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
    """The adapter's output for one row; every tensor that it is given must be read, and none written to."""
    state, requests = probe.row(i)
    given = [embedding.clone() for embedding in embeddings]
    what = (
        f"expected {type(adapter).__name__} to take a state {list(state.shape)}, {len(given)} embeddings and "
        f"{_listed(requests)}"
    )
    with border(what, "mend the adapter's call, its sites or its requests"), _Reads() as reads:
        output = adapter(state, *given, **requests)
    row = Probe(probe.state[i : i + 1], probe.times, {name: values[i : i + 1] for name, values in probe.requests.items()})
    _check_output(adapter, "the adapter", output, row, state, requests)
    if idle := [site.name for site, one in zip(adapter.sites, given, strict=True) if not reads.of(one)]:
        raise InputError(
            f"expected every site to take its embedding; found that nothing reads that of {names_of(idle)}: the network does "
            "not call its module, or two sites share one; leave it out of the sites"
        )
    if idle := [name for name, values in requests.items() if not reads.of(values)]:
        raise InputError(
            f"expected the network to use every request input; found that nothing reads {names_of(idle)}; pass it on in call, "
            "or leave it out of requests"
        )
    if not reads.of(state):
        raise InputError(
            f"expected {adapter.family} to depend on its state; found that nothing reads it; pass it on in the adapter's call"
        )
    return output


def _check_output(
    adapter: Adapter,
    who: str,
    output: Any,
    probe: Probe,
    state: torch.Tensor,
    requests: Mapping[str, torch.Tensor],
) -> None:
    """A finite tensor of the state's shape, by a call that left ``state`` and ``requests`` as ``probe`` has them."""
    if not isinstance(output, torch.Tensor):
        raise InputError(
            f"expected {who} of {type(adapter).__name__} to return one tensor; found a {type(output).__name__}; return its "
            "first element ([0], or .sample)"
        )
    if output.shape != probe.state.shape:
        channels = adapter.sample_shape[0]
        raise InputError(
            f"expected {who} of {type(adapter).__name__} to return the state's shape {list(probe.state.shape)}; found "
            f"{list(output.shape)}; where a variance is predicted too, return output[:, :{channels}]; else mend sample_shape"
        )
    if output.dtype != torch.float32:
        raise InputError(f"expected {who} of {type(adapter).__name__} in float32; found {output.dtype}; call .float()")
    if not bool(torch.isfinite(output).all()):
        raise InputError(
            f"expected a finite output of {who} of {type(adapter).__name__}; found NaN or Inf for random inputs; pass trained "
            "weights, or mend how the network is called"
        )
    changed = [name for name, values in requests.items() if not torch.equal(values, probe.requests[name])]
    if changed or not torch.equal(state, probe.state):
        raise InputError(
            f"expected {who} of {type(adapter).__name__} to leave its inputs alone; found {names_of(changed or ['state'])} "
            "changed in place; compute on a copy"
        )


def _check_equal_calls(adapter: Adapter, probe: Probe, embeddings: Sequence[torch.Tensor], before: torch.Tensor) -> None:
    """The first row once more, after the second: nothing random, nothing kept from call to call."""
    state, requests = probe.row(0)
    again = relative(adapter(state, *embeddings, **requests), before)
    if again > SAME:
        layers = random_layers(adapter, lambda: adapter(*[state, *embeddings], **requests))
        raise InputError(
            f"expected two equal calls of {adapter.family} to give one output; found a difference of {again:.1e}, which "
            f"begins in {layers}; leave out what is random in eval mode or kept from call to call"
        )


def _check_time_is_gone(adapter: Adapter, probe: Probe, embeddings: Sequence[torch.Tensor]) -> None:
    """The network with its sites given, called at both times."""
    if not isinstance(adapter, HookedAdapter):
        return

    def call(time: int, row: int) -> torch.Tensor:
        state, requests = probe.row(row)
        with adapter.giving(embeddings):
            return adapter.native(state, torch.tensor([probe.times[time]], dtype=torch.float32), **requests)

    try:
        outputs = [call(0, 0), call(1, 0)]
    except Exception:
        return  # hooks of a subclass's own may need its call; the comparison with native decides then
    off = relative(outputs[1], outputs[0])
    if off > SAME:
        raise InputError(
            f"expected {adapter.family} not to depend on the time once its sites are given; found a difference of {off:.1e} "
            f"between two times, which enters at {reached_by_the_time(adapter, call)}"
        )


class _Reads(TorchDispatchMode):
    """Which tensors any operator reads the numbers of, by their storage."""

    def __init__(self) -> None:
        super().__init__()
        self._read: set[int] = set()

    def of(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in SHAPE_ONLY:
            leaves = tree_leaves((args, kwargs))
            self._read |= {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def _listed(requests: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {list(values.shape)}" for name, values in requests.items()) or "no request inputs"
