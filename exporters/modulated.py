"""What SD3 and FLUX have in common: joint attention over prompt and image, and adaptive norms.

Sites are the adaptive norms (``norm1``, ``norm1_context``, the single blocks' ``norm``, ``norm_out``). A site's embedding is
the timestep embedder's output, before pooled text and FLUX's guidance are added to it; so all modulation is known once the
request is, and the compiler moves it to the prelude.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)

from mteo_deploy.exporters.hooks import HookedAdapter
from mteo_deploy.requests import Request

ARGUMENTS = {
    AdaLayerNormZero: "emb",
    AdaLayerNormZeroSingle: "emb",
    SD35AdaLayerNormZeroX: "emb",
    AdaLayerNormContinuous: "conditioning_embedding",
}
"""Adaptive norm -> what it calls the time embedding."""


class ModulatedAdapter(HookedAdapter):
    """Request inputs: ``encoder_hidden_states`` ``[tokens, joint_attention_dim]``, ``pooled_projections`` ``[width]``."""

    tokens: int

    def __init__(self, network: Any, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        for name, module in network.named_modules():
            if type(module) in ARGUMENTS:
                self.add_site(name, module.linear.in_features, module, ARGUMENTS[type(module)])
        self.silence(network.time_text_embed.timestep_embedder)

    def set_tokens(self, tokens: int) -> None:
        self.tokens, config = tokens, self.network.config
        prompt = Request("encoder_hidden_states", "float32", (tokens, int(config.joint_attention_dim)))
        self.requests = (prompt, Request("pooled_projections", "float32", (int(config.pooled_projection_dim),)))

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        embed = self.network.time_text_embed
        return (embed.timestep_embedder(embed.time_proj(timestep)),) * len(self.sites)
