"""diffusers' ``SanaTransformer2DModel``: Sana, with linear attention.

Sites are those of :mod:`~mteo_deploy.exporters.shared_projection`; no request meets the time, so all modulation is constant.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SanaTransformer2DModel

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import check_channels
from mteo_deploy.exporters.shared_projection import SharedProjectionAdapter
from mteo_deploy.requests import Request

TOKENS = 300
"""Longest prompt that the pipeline takes by default."""


class SanaAdapter(SharedProjectionAdapter):
    """``SanaTransformer2DModel``; of a network that predicts a variance too, the prediction is taken.

    Request inputs: ``encoder_hidden_states`` ``[tokens, caption_channels]`` and ``encoder_attention_mask`` ``[tokens]`` (1: a
    token, 0: padding).
    """

    family = "SanaTransformer2DModel"
    network_class = SanaTransformer2DModel
    network: SanaTransformer2DModel

    def __init__(self, network: SanaTransformer2DModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        config, size = network.config, int(network.config.sample_size)
        if config.guidance_embeds:
            raise InputError(
                "expected a SanaTransformer2DModel without guidance_embeds; found Sana-Sprint's kind, which is few-step "
                "already and has a scheduler of its own; not supported"
            )
        self.patch_size = self.fixed_multiple = int(config.patch_size)
        self.sample_shape = (int(config.in_channels), size, size)
        check_channels(self.family, self.sample_shape[0], int(config.out_channels or config.in_channels))
        self.share(network.time_embed, network.proj_out.in_features)
        self.set_tokens(TOKENS)
        self.set_size(size, size)

    def set_tokens(self, tokens: int) -> None:
        self.tokens = tokens
        prompt = Request("encoder_hidden_states", "float32", (tokens, int(self.network.config.caption_channels)))
        self.requests = (prompt, Request("encoder_attention_mask", "int64", (tokens,), high=2, mask=True))

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().embeddings(timestep * float(self.network.config.timestep_scale))

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.native(state, torch.zeros(1, device=state.device), **requests)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        scaled = timestep * float(self.network.config.timestep_scale)
        return self.network(state, timestep=scaled, return_dict=False, **requests)[0][:, : self.sample_shape[0]]
