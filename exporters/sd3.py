"""diffusers' ``SD3Transformer2DModel``: Stable Diffusion 3, and 3.5 with dual attention and normalised queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.directory import CLIP_TOKENS, PipelineDirectory
from mteo_deploy.exporters.modulated import ModulatedAdapter

T5_TOKENS = 256
"""Of T5, behind those of the CLIP encoders: the pipeline's own default."""


class SD3Adapter(ModulatedAdapter):
    """``SD3Transformer2DModel``; sizes up to the one its position embeddings were made for."""

    family = "SD3Transformer2DModel"
    network_class = SD3Transformer2DModel
    network: SD3Transformer2DModel

    def __init__(self, network: SD3Transformer2DModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        config, size = network.config, int(network.config.sample_size)
        if network.out_channels != config.in_channels:
            raise InputError(
                f"expected a text-to-image SD3Transformer2DModel; found {config.in_channels} input and "
                f"{network.out_channels} output channels, not supported yet"
            )
        self.patch_size = self.fixed_multiple = int(config.patch_size)
        self.sample_shape = (int(config.in_channels), size, size)
        self.set_tokens(CLIP_TOKENS + T5_TOKENS)
        self.set_size(size, size)

    def serve(self, pipeline: PipelineDirectory) -> None:
        self.set_tokens(pipeline.prompt_length() + T5_TOKENS)

    def set_size(self, height: int, width: int) -> None:
        largest = self.patch_size * int(self.network.config.pos_embed_max_size)
        if max(height, width) > largest:
            raise InputError(f"expected a --size of up to {largest}x{largest} for this network; found {height}x{width}")
        super().set_size(height, width)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.native(state, torch.zeros(1, device=state.device), **requests)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep=timestep, return_dict=False, **requests)[0]
