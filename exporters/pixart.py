"""diffusers' ``PixArtTransformer2DModel``: PixArt-alpha and PixArt-Sigma.

Sites are those of :mod:`~mteo_deploy.exporters.shared_projection`. A site's embedding is the timestep embedder's output, before
the sizes that PixArt-alpha at 1024 pixels takes are added; without sizes all modulation is constant.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel

from mteo_deploy.exporters.base import check_channels
from mteo_deploy.exporters.directory import PipelineDirectory
from mteo_deploy.exporters.shared_projection import SharedProjectionAdapter
from mteo_deploy.requests import Request

ALPHA_TOKENS, SIGMA_TOKENS = 120, 300
"""Length of a prompt in T5's tokens, padded."""


class PixArtAdapter(SharedProjectionAdapter):
    """``PixArtTransformer2DModel``; of a network that predicts a variance too, the prediction is taken.

    Request inputs: ``encoder_hidden_states`` ``[tokens, caption_channels]`` and ``encoder_attention_mask`` ``[tokens]`` (1: a
    token, 0: padding); with additional conditions ``resolution`` (height and width in pixels) and ``aspect_ratio``.
    """

    family = "PixArtTransformer2DModel"
    network_class = PixArtTransformer2DModel
    negatives = MappingProxyType({"resolution": None, "aspect_ratio": None})
    network: PixArtTransformer2DModel

    def __init__(self, network: PixArtTransformer2DModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        config, size = network.config, int(network.config.sample_size)
        self.patch_size = self.fixed_multiple = int(config.patch_size)
        self.sample_shape = (int(config.in_channels), size, size)
        check_channels(self.family, self.sample_shape[0], int(network.out_channels))
        self.share(network.adaln_single, network.inner_dim)
        if network.use_additional_conditions:
            self.silence(network.adaln_single.emb.timestep_embedder)
        self.set_tokens(ALPHA_TOKENS)
        self.set_size(size, size)

    def serve(self, pipeline: PipelineDirectory) -> None:
        if pipeline.cls == "PixArtSigmaPipeline":
            self.set_tokens(SIGMA_TOKENS)

    def set_tokens(self, tokens: int) -> None:
        self.tokens, config = tokens, self.network.config
        width = int(config.caption_channels or config.cross_attention_dim)
        prompt = Request("encoder_hidden_states", "float32", (tokens, width))
        self.requests = (prompt, Request("encoder_attention_mask", "int64", (tokens,), high=2, mask=True))
        if self.network.use_additional_conditions:
            self.requests += (Request("resolution", "float32", (2,)), Request("aspect_ratio", "float32", (1,)))

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.native(state, torch.zeros(1, device=state.device), **requests)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        prompt = {name: requests[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}
        sizes = {name: requests[name] for name in ("resolution", "aspect_ratio") if name in requests}
        output = self.network(state, timestep=timestep, added_cond_kwargs=sizes, return_dict=False, **prompt)[0]
        return output[:, : self.sample_shape[0]]
