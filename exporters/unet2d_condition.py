"""diffusers' ``UNet2DConditionModel``: Stable Diffusion 1 and 2, and SDXL with its pooled text and sizes.

Sites are those of :mod:`~mteo_deploy.exporters.unet2d`. The prompt enters through cross-attention: its keys and values depend
on request inputs alone, so the compiler moves them to the prelude, and so it does with what SDXL adds to the time embedding.

A ControlNet (Zhang et al. 2023, arXiv 2302.05543) adds a residual to what each down block hands across, and to the middle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.directory import CLIP_TOKENS, PipelineDirectory
from mteo_deploy.exporters.unet2d import UNetAdapter
from mteo_deploy.requests import Request

RESIDUAL = "block_additional_residual"
"""In the names of a ControlNet's residuals, after diffusers' arguments: ``down_..._0``, ``mid_...``."""

TIME_IDS, REFINER_TIME_IDS = 6, 5
"""SDXL: original size, crop and target size, two numbers each; its refiner has an aesthetic score in place of the last two."""


class UNet2DConditionAdapter(UNetAdapter):
    """``UNet2DConditionModel`` with a prompt, of the length that the pipeline's tokenizer pads to; with pooled text and sizes
    where it takes them (``text_time``).

    Request inputs: ``encoder_hidden_states`` ``[tokens, cross_attention_dim]``; for SDXL ``text_embeds`` ``[width]`` and
    ``time_ids`` ``[6]`` (its refiner ``[5]``); with a ControlNet
    ``down_block_additional_residual_0`` ... and ``mid_block_additional_residual``, each
    as the network has it at the states' size. They are the same at every evaluation and for both branches of guidance.
    """

    family = "UNet2DConditionModel"
    network_class = UNet2DConditionModel
    network: UNet2DConditionModel
    negatives: Mapping[str, int | None] = MappingProxyType({"time_ids": None})
    residuals: tuple[Request, ...] = ()
    time_ids = TIME_IDS

    def __init__(self, network: UNet2DConditionModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.fixed_multiple = 1  # it says to its upsamplers what sizes they go back to
        config = network.config
        taken = {
            "addition_embed_type": config.addition_embed_type in (None, "text_time"),
            "class_embed_type": config.class_embed_type is None,
            "num_class_embeds": config.num_class_embeds is None,
            "class_embeddings_concat": not config.class_embeddings_concat,
            "dual_cross_attention": not config.dual_cross_attention,
            "encoder_hid_dim_type": config.encoder_hid_dim_type is None,
            "time_embedding_act_fn": config.time_embedding_act_fn is None,
            "time_cond_proj_dim": config.time_cond_proj_dim is None,
            "cross_attention_dim": isinstance(config.cross_attention_dim, int),
        }
        refused = [f"{name} {getattr(config, name)!r}" for name, fits in taken.items() if not fits]
        if refused:
            raise InputError(
                f"expected a text-to-image UNet2DConditionModel (Stable Diffusion 1, 2, SDXL); found {', '.join(refused)}, "
                "not supported yet"
            )
        if config.addition_embed_type is not None:
            self.silence(network.time_embedding)
        self.set_tokens(CLIP_TOKENS)

    def serve(self, pipeline: PipelineDirectory) -> None:
        self.time_ids = REFINER_TIME_IDS if pipeline.fields.get("requires_aesthetics_score") else TIME_IDS
        self.set_tokens(pipeline.prompt_length())

    def set_tokens(self, tokens: int) -> None:
        self.tokens, config = tokens, self.network.config
        self.requests = (Request("encoder_hidden_states", "float32", (tokens, int(config.cross_attention_dim))),)
        if config.addition_embed_type is not None:
            self.requests += self._pooled()

    def _pooled(self) -> tuple[Request, Request]:
        sizes = self.time_ids * int(self.network.config.addition_time_embed_dim)
        width = self.network.add_embedding.linear_1.in_features - sizes
        return Request("text_embeds", "float32", (width,)), Request("time_ids", "float32", (self.time_ids,))

    def take_residuals(self) -> None:
        """Take a ControlNet's residuals as request inputs; the size of the states is then fixed."""
        self.size_multiple = None
        own, self.residuals = self.requests, tuple(self._residuals())
        self.requests = (*own, *self.residuals)
        self.negatives = {**self.negatives, **{request.name: None for request in self.residuals}}

    def _residuals(self) -> Iterator[Request]:
        """One for the first convolution, each layer of a down block and what makes it smaller, and the middle."""
        network, (_, height, width) = self.network, self.sample_shape
        shapes = [(network.conv_in.out_channels, height, width)]
        for block in network.down_blocks:
            channels = block.resnets[0].out_channels
            shapes += [(channels, height, width)] * len(block.resnets)
            if block.downsamplers:
                height, width = (height + 1) // 2, (width + 1) // 2
                shapes.append((channels, height, width))
        for i, shape in enumerate(shapes):
            yield Request(f"down_{RESIDUAL}_{i}", "float32", shape)
        yield Request(f"mid_{RESIDUAL}", "float32", shapes[-1])

    def arguments(self, requests: dict[str, torch.Tensor]) -> dict[str, Any]:
        pooled = {name: requests[name] for name in ("text_embeds", "time_ids") if name in requests}
        found = {"encoder_hidden_states": requests["encoder_hidden_states"], "added_cond_kwargs": pooled or None}
        if not self.residuals:
            return found
        *down, middle = (requests[request.name] for request in self.residuals)
        return {**found, "down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
