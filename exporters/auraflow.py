"""diffusers' ``AuraFlowTransformer2DModel``: AuraFlow.

Sites are the adaptive norms: ``norm1`` and ``norm1_context`` of the joint blocks, ``norm1`` of the single blocks, ``norm_out``.
They depend on the time alone, so all modulation, a third of the network, becomes constants.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AuraFlowTransformer2DModel

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import check_channels
from mteo_deploy.exporters.hooks import HookedAdapter
from mteo_deploy.exporters.modulated import ARGUMENTS
from mteo_deploy.requests import Request

TOKENS = 256
"""Longest prompt that the pipeline takes, padded."""


class AuraFlowAdapter(HookedAdapter):
    """``AuraFlowTransformer2DModel``; sizes up to the one its position embeddings were made for.

    Request inputs: ``encoder_hidden_states`` ``[tokens, joint_attention_dim]``, zero where the prompt is padded.
    """

    family = "AuraFlowTransformer2DModel"
    network_class = AuraFlowTransformer2DModel
    network: AuraFlowTransformer2DModel

    def __init__(self, network: AuraFlowTransformer2DModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        config, size = network.config, int(network.config.sample_size)
        self.patch_size = self.fixed_multiple = int(config.patch_size)
        self.sample_shape = (int(config.in_channels), size, size)
        check_channels(self.family, self.sample_shape[0], int(network.out_channels), cut=False)
        for name, module in network.named_modules():
            if type(module) in ARGUMENTS:
                self.add_site(name, network.inner_dim, module, ARGUMENTS[type(module)])
        self.add_site("norm_out", network.inner_dim, network.norm_out, "conditioning_embedding")
        self.set_tokens(TOKENS)
        self.set_size(size, size)

    def set_size(self, height: int, width: int) -> None:
        largest = self.patch_size * math.isqrt(int(self.network.config.pos_embed_max_size))
        if max(height, width) > largest:
            raise InputError(f"expected a --size of up to {largest}x{largest} for this network; found {height}x{width}")
        super().set_size(height, width)

    def set_tokens(self, tokens: int) -> None:
        self.tokens = tokens
        width = int(self.network.config.joint_attention_dim)
        self.requests = (Request("encoder_hidden_states", "float32", (tokens, width)),)

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        network = self.network
        return (network.time_step_proj(network.time_step_embed(timestep / 1000)),) * len(self.sites)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.native(state, torch.zeros(1, device=state.device), **requests)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep=timestep / 1000, return_dict=False, **requests)[0]
