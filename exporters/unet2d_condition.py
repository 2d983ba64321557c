"""diffusers' ``UNet2DConditionModel``: Stable Diffusion 1 and 2, and SDXL with its pooled text and sizes.

Sites are those of :mod:`~mteo_deploy.exporters.unet2d`. The prompt enters through cross-attention: its keys and values depend
on request inputs alone, so the compiler moves them to the prelude, and so it does with what SDXL adds to the time embedding.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.unet2d import UNetAdapter
from mteo_deploy.requests import Request

TOKENS = 77
"""Length of a prompt in CLIP's text encoders, padded."""

TIME_IDS = 6
"""SDXL: original size, crop and target size, two numbers each."""


class UNet2DConditionAdapter(UNetAdapter):
    """``UNet2DConditionModel`` with a prompt of 77 tokens; with pooled text and sizes where it takes them (``text_time``).

    Request inputs: ``encoder_hidden_states`` ``[77, cross_attention_dim]``; for SDXL ``text_embeds`` ``[width]`` and
    ``time_ids`` ``[6]``.
    """

    family = "UNet2DConditionModel"
    network_class = UNet2DConditionModel
    network: UNet2DConditionModel
    tokens = TOKENS
    negatives = MappingProxyType({"time_ids": None})

    def __init__(self, network: UNet2DConditionModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        config = network.config
        taken = {
            "addition_embed_type": config.addition_embed_type in (None, "text_time"),
            "class_embed_type": config.class_embed_type is None and config.num_class_embeds is None,
            "encoder_hid_dim_type": config.encoder_hid_dim_type is None,
            "time_embedding_act_fn": config.time_embedding_act_fn is None,
            "time_cond_proj_dim": config.time_cond_proj_dim is None,
            "out_channels": config.out_channels == config.in_channels,
            "cross_attention_dim": isinstance(config.cross_attention_dim, int),
        }
        refused = [f"{name} {getattr(config, name)!r}" for name, fits in taken.items() if not fits]
        if refused:
            raise InputError(
                f"expected a text-to-image UNet2DConditionModel (Stable Diffusion 1, 2, SDXL); found {', '.join(refused)}, "
                "not supported yet"
            )
        self.requests = (Request("encoder_hidden_states", "float32", (TOKENS, int(config.cross_attention_dim))),)
        if config.addition_embed_type is not None:
            self.silence(network.time_embedding)
            self.requests += self._pooled()

    def _pooled(self) -> tuple[Request, Request]:
        width = self.network.add_embedding.linear_1.in_features - TIME_IDS * int(self.network.config.addition_time_embed_dim)
        return Request("text_embeds", "float32", (width,)), Request("time_ids", "float32", (TIME_IDS,))

    def arguments(self, requests: dict[str, torch.Tensor]) -> dict[str, Any]:
        pooled = {name: requests[name] for name in ("text_embeds", "time_ids") if name in requests}
        return {"encoder_hidden_states": requests["encoder_hidden_states"], "added_cond_kwargs": pooled or None}
