"""diffusers' UNets: each ``ResnetBlock2D`` is a site, its embedding the input of ``time_emb_proj``.

What the network adds to the time embedding once for all blocks (classes, pooled text, sizes) is added to each site's embedding
before the block's SiLU: the hooks give the network a time embedding of zero, and find in its place what was added to it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, Site
from mteo_deploy.requests import Request


class UNetAdapter(Adapter):
    """What ``UNet2DModel`` and ``UNet2DConditionModel`` have in common.

    Attributes:
        added: whether the network adds something to the time embedding.
    """

    network: Any
    added: bool

    def __init__(self, network: Any, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.network = network
        self.config = dict(network.config)
        size = network.config.sample_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.sample_shape = (int(network.config.in_channels), int(height), int(width))
        self.size_multiple = 2 ** sum(bool(getattr(block, "downsamplers", None)) for block in network.down_blocks)
        blocks = [
            (name, m) for name, m in network.named_modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None
        ]
        self.sites = tuple(Site(name, module.time_emb_proj.in_features) for name, module in blocks)
        self._given: tuple[torch.Tensor, ...] = ()
        network.time_embedding.register_forward_hook(self._silence)
        for index, (_, module) in enumerate(blocks):
            module.register_forward_pre_hook(self._give(index), with_kwargs=True)

    def _silence(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output[:1]) if self._given else output

    def _give(self, index: int) -> Any:
        def hook(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden, found = args or (kwargs["input_tensor"], kwargs["temb"])
            given = self._given[index]
            return (hidden, given + found if self.added else given), {}

        return hook

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        projected = self.network.time_proj(timestep)
        return (self.network.time_embedding(projected),) * len(self.sites)

    def forward(self, state: torch.Tensor, *embeddings: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        self._given = embeddings
        try:
            return self.network(state, 0, return_dict=False, **self.arguments(requests))[0]
        finally:
            self._given = ()

    def arguments(self, requests: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Request inputs as the network takes them."""
        return dict(requests)


class UNet2DAdapter(UNetAdapter):
    """``UNet2DModel``, unconditional or with class labels, with sinusoidal or Fourier time embedding."""

    family = "UNet2DModel"
    network_class = UNet2DModel
    network: UNet2DModel

    def __init__(self, network: UNet2DModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        classes = network.class_embedding
        if classes is not None and not isinstance(classes, torch.nn.Embedding):
            raise InputError(
                f"expected a UNet2DModel without classes or with num_class_embeds; found class_embed_type "
                f"{network.config.class_embed_type!r}, not supported yet"
            )
        self.added = classes is not None
        if classes is not None:
            self.requests = (Request("class_labels", "int64", high=classes.num_embeddings),)
