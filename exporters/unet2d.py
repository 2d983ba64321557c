"""diffusers' ``UNet2DModel``: each ``ResnetBlock2D`` is a site, its embedding the input of ``time_emb_proj``.

A class embedding, where the model has one, is added to each site's embedding before the block's SiLU, as the model does.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, Site, noise_levels
from mteo_deploy.requests import Request


class UNet2DAdapter(Adapter):
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
        self.network = network
        if classes is not None:
            self.requests = (Request("class_labels", "int64", high=classes.num_embeddings),)
        self.config = dict(network.config)
        size = network.config.sample_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        self.sample_shape = (int(network.config.in_channels), int(height), int(width))
        self.size_multiple = 2 ** sum(bool(getattr(block, "downsamplers", None)) for block in network.down_blocks)
        self.levels, self.prediction_type = noise_levels(scheduler_config)
        blocks = [
            (name, m) for name, m in network.named_modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None
        ]
        self.sites = tuple(Site(name, module.time_emb_proj.in_features) for name, module in blocks)
        self._given: tuple[torch.Tensor, ...] = ()
        self._added: torch.Tensor | None = None
        for index, (_, module) in enumerate(blocks):
            module.register_forward_pre_hook(self._give(index), with_kwargs=True)

    def _give(self, index: int) -> Any:
        def hook(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0] if args else kwargs["input_tensor"]
            given = self._given[index]
            return (hidden, given if self._added is None else given + self._added), {}

        return hook

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        projected = self.network.time_proj(timestep)
        return (self.network.time_embedding(projected),) * len(self.sites)

    def forward(self, state: torch.Tensor, *embeddings: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        self._given = embeddings
        if self.requests:
            self._added = self.network.class_embedding(requests["class_labels"])
        return self.network(state, 0, return_dict=False, **requests)[0]
