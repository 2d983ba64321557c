"""diffusers' ``FluxTransformer2DModel``: FLUX.1-schnell, and FLUX.1-dev with its guidance scale as a request input.

The network sees the latents in patches of 2x2, packed into tokens with a position each; the state stays
``[channels, height, width]``.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.modulated import ModulatedAdapter
from mteo_deploy.exporters.patches import pack, unpack
from mteo_deploy.requests import Request

SIZE = 128
"""Of the latents: FLUX's configuration names none, its pipeline draws 1024x1024 pixels."""

TOKENS = 512
"""Of T5: the pipeline's own default. FLUX.1-schnell was trained with 256, which ``--tokens`` says."""

GUIDANCE = 3.5
"""Of FLUX.1-dev, where nobody says another: the pipeline's own default."""


class FluxAdapter(ModulatedAdapter):
    """``FluxTransformer2DModel``; with ``guidance_embeds`` it takes ``guidance``, the scale that it was distilled at."""

    family = "FluxTransformer2DModel"
    network_class = FluxTransformer2DModel
    negatives = MappingProxyType({"guidance": None})
    network: FluxTransformer2DModel
    patch_size = fixed_multiple = 2

    def __init__(self, network: FluxTransformer2DModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        config = network.config
        if network.out_channels != config.in_channels or config.patch_size != 1:
            raise InputError(
                f"expected a text-to-image FluxTransformer2DModel; found {config.in_channels} input and "
                f"{network.out_channels} output channels, patch_size {config.patch_size}, not supported yet"
            )
        self.sample_shape = (int(config.in_channels) // 4, SIZE, SIZE)
        self.set_tokens(TOKENS)
        self.set_size(SIZE, SIZE)

    def set_tokens(self, tokens: int) -> None:
        super().set_tokens(tokens)
        if self.network.config.guidance_embeds:
            self.requests += (Request("guidance", "float32", default=GUIDANCE),)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.native(state, torch.zeros(1, device=state.device), **requests)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        rows, columns = state.shape[2] // 2, state.shape[3] // 2
        output = self.network(
            pack(state),
            timestep=timestep / 1000,
            img_ids=_positions(rows, columns, state.device),
            txt_ids=torch.zeros(self.tokens, 3, device=state.device),
            return_dict=False,
            **requests,
        )[0]
        return unpack(output, rows, columns)


def _positions(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """``[rows * columns, 3]``: nothing, row, column, as diffusers' pipeline gives them."""
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()
