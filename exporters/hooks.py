"""Hooks: how a site is given its embedding in an unmodified network.

Most networks call a layer of each block with the time embedding as an argument. A hook before the layer puts another in its
place, while the adapter runs; at any other time the network is what it was. What requests add to the time embedding (a class,
pooled text, sizes) is added by the network itself: the hooks make the time's part zero there, and find the rest in the
argument.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, Site


class Broadcast:
    """Stands for a ``[1, width]`` tensor in a block that would have it ``[batch, ...]``, and lets it broadcast instead.

    Repeated for a batch that is open, it could not be folded (see :mod:`~mteo_deploy.exporters.trace`).
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def reshape(self, batch: Any, *shape: int) -> torch.Tensor:
        return self.values.reshape(1, *shape)


def config_of(network: Any) -> dict[str, Any]:
    """A network's configuration as a mapping, whether it is one, an object with ``to_dict`` or a plain object; empty for none.

    Raises:
        InputError: for anything else.
    """
    config = getattr(network, "config", None)
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if hasattr(config, "__dict__") and not callable(config):
        return dict(vars(config))
    raise InputError(
        f"expected {type(network).__name__}.config as a mapping or an object with attributes; found a {type(config).__name__}; "
        "set self.config in the adapter's __init__ to a dict"
    )


class HookedAdapter(Adapter):
    """An adapter whose sites are modules that are called with the time embedding.

    A subclass calls :meth:`add_site` for each, and :meth:`silence` where requests add to the embedding; it says what the
    pretrained embeddings are (``embeddings``) and how the network is called (:meth:`call`).

    Attributes:
        blocks_stand_alone: a block can be computed again after the network was called; not where :meth:`call` changes how.
    """

    network: Any
    blocks_stand_alone: bool = True

    def __init__(self, network: Any, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.network, self.sites = network, ()
        self.config = config_of(network)
        self._given: tuple[torch.Tensor, ...] = ()
        self._silenced: tuple[torch.nn.Module, ...] = ()  # in a tuple, as below: they are the network's already
        self._places: list[tuple[torch.nn.Module, str, int]] = []

    def add_site(self, name: str, width: int, module: torch.nn.Module, argument: str) -> None:
        """Make a site of a module, whose ``forward`` takes the embedding ``[batch, width]`` under the name ``argument``.

        Raises:
            InputError: for an argument that its ``forward`` does not have, or a module that is a site already.
        """
        arguments = list(inspect.signature(module.forward).parameters)
        if argument not in arguments:
            raise InputError(
                f"expected add_site with the argument under which {type(module).__name__}.forward takes the embedding; found "
                f"{argument!r} for {name}; it takes {', '.join(arguments)}"
            )
        if any(module is one for one, _, _ in self._places):
            raise InputError(f"expected every module to be a site once; found {name} again; leave out the second add_site")
        index, position = len(self.sites), arguments.index(argument)
        self.sites = (*self.sites, Site(name, width))
        self._places.append((module, argument, position))

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._given:
                return None
            if argument in kwargs:
                return args, {**kwargs, argument: self.meet(index, kwargs[argument])}
            return (*args[:position], self.meet(index, args[position]), *args[position + 1 :]), kwargs

        module.register_forward_pre_hook(hook, with_kwargs=True)

    def silence(self, module: torch.nn.Module) -> None:
        """Make a time embedder give zero while the adapter runs: what reaches a site beside it is the requests' part."""
        self._silenced += (module,)

        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            return torch.zeros_like(output[:1]) if self._given else None

        module.register_forward_hook(hook)

    def meet(self, index: int, found: torch.Tensor) -> Any:
        """What a site's module gets in the place of ``found``: the given embedding, and what requests add to it."""
        return self._given[index] + found if self._silenced else self._given[index]

    def forward(self, state: torch.Tensor, *embeddings: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        with self.giving(embeddings):
            return self.call(state, requests)

    @contextmanager
    def giving(self, embeddings: Sequence[torch.Tensor]) -> Iterator[None]:
        """While it lasts, the sites get these, one ``[1, width]`` each, however the network is called."""
        before, self._given = self._given, tuple(embeddings)
        try:
            yield
        finally:
            self._given = before

    @contextmanager
    def watching(self) -> Iterator[dict[int, Any]]:
        """While it lasts, what the network itself hands to each site is noted, by its index: what ``embeddings`` should be.

        Where a module is silenced its output is noted, for all sites: what reaches them is that and what requests add.
        """
        taken: dict[int, Any] = {}

        def enter(index: int, argument: str, position: int) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                taken[index] = kwargs[argument] if argument in kwargs else args[position]

            return hook

        def leave(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            taken.update(dict.fromkeys(range(len(self.sites)), output))

        if self._silenced:
            handles = [one.register_forward_hook(leave) for one in self._silenced]
        else:
            handles = [
                module.register_forward_pre_hook(enter(i, argument, position), with_kwargs=True)
                for i, (module, argument, position) in enumerate(self._places)
            ]
        try:
            yield taken
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recomputing_blocks(self) -> Iterator[bool]:
        if not (self.blocks_stand_alone and getattr(self.network, "_supports_gradient_checkpointing", False)):
            yield False
            return
        self.network.enable_gradient_checkpointing(self._checkpoint)
        try:
            yield True
        finally:
            self.network.disable_gradient_checkpointing()

    def _checkpoint(self, block: Callable[..., Any], *args: Any) -> Any:
        """Call a block, and again for its gradient, when the adapter's call is over: with the same embeddings at its sites."""
        given = self._given

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self.giving(given)

        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)

    @abstractmethod
    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        """The network's output at any timestep: the sites do not read it."""
