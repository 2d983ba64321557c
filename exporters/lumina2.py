"""diffusers' ``Lumina2Transformer2DModel``: Lumina-Image 2.0.

Sites are ``norm1`` of the blocks that see the image, and ``norm_out``. They depend on the time alone, so all modulation becomes
constants: scales go into the RMS norms, and so do the gates.

The network's own ``forward`` loops over the images of a batch, with the lengths of their prompts as Python numbers, to put each
image's tokens right behind its prompt's. That can be neither traced nor baked. The adapter calls the network's parts in the
same order with a place for every token of the longest prompt instead, masks those that a prompt does not have, and takes
positions from its length: attention does not care for the order, only for positions and masks.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.models.normalization import LuminaRMSNormZero

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.hooks import HookedAdapter
from mteo_deploy.exporters.patches import as_long, pack, unpack
from mteo_deploy.exporters.rotary import RealRotations, Rotation
from mteo_deploy.requests import Request

TOKENS = 256
"""Longest prompt that the pipeline takes by default."""


class Lumina2Adapter(HookedAdapter):
    """``Lumina2Transformer2DModel``.

    Request inputs: ``encoder_hidden_states`` ``[tokens, cap_feat_dim]`` and ``encoder_attention_mask`` ``[tokens]`` (1: a
    token, 0: padding behind them; the first is taken for a token whatever the mask says).

    Its time runs from noise to image and its output with it: both are turned around here.
    """

    family = "Lumina2Transformer2DModel"
    network_class = Lumina2Transformer2DModel
    blocks_stand_alone = False  # RealRotations lasts as long as the call
    network: Lumina2Transformer2DModel
    tokens: int

    def __init__(self, network: Lumina2Transformer2DModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        config, size = network.config, int(network.config.sample_size)
        if network.out_channels != config.in_channels:
            raise InputError(
                f"expected a text-to-image Lumina2Transformer2DModel; found {config.in_channels} input and "
                f"{network.out_channels} output channels, not supported yet"
            )
        self.patch_size = self.fixed_multiple = int(config.patch_size)
        self.sample_shape, self.tokens = (int(config.in_channels), size, size), TOKENS
        for name, module in network.named_modules():
            if isinstance(module, LuminaRMSNormZero):
                self.add_site(name, module.linear.in_features, module, "emb")
        self.add_site("norm_out", network.norm_out.linear_1.in_features, network.norm_out, "conditioning_embedding")
        self.set_tokens(min(TOKENS, int(config.axes_lens[0]) - 1))
        self.set_size(size, size)

    def set_size(self, height: int, width: int) -> None:
        largest = [self.patch_size * int(length) for length in self.network.config.axes_lens[1:]]
        if height > largest[0] or width > largest[1]:
            raise InputError(f"expected a --size of up to {largest[0]}x{largest[1]} for this network; found {height}x{width}")
        super().set_size(height, width)
        self._place()

    def set_tokens(self, tokens: int) -> None:
        longest = int(self.network.config.axes_lens[0]) - 1
        if tokens > longest:
            raise InputError(
                f"expected --tokens of up to {longest} for this network, whose positions end there; found {tokens}"
            )
        self.tokens = tokens
        prompt = Request("encoder_hidden_states", "float32", (tokens, int(self.network.config.cap_feat_dim)))
        self.requests = (prompt, Request("encoder_attention_mask", "int64", (tokens,), high=2, mask=True))
        self._place()

    def _place(self) -> None:
        """Positions, ahead of any trace: of a prompt's tokens one after the other, of the image's by row and column."""
        along, *inside = (Rotation.of(factors) for factors in self.network.rope_embedder.freqs_cis)
        rows, columns = (size // self.patch_size for size in self.sample_shape[1:])
        places, token = (torch.arange(count, device=along.cos.device) for count in (rows * columns, self.tokens))
        self._along = along
        self._prompt = Rotation.joined([along.at(token), *(axis.at(0 * token) for axis in inside)], -1)
        self._image = Rotation.joined([inside[0].at(places // columns), inside[1].at(places % columns)], -1)

    def _turns(self, length: torch.Tensor) -> tuple[Rotation, Rotation]:
        """Of prompt and image, ``[batch, tokens, ...]``: an image's tokens all come after its prompt."""
        along, prompt, image = (turn.to(length.device) for turn in (self._along, self._prompt, self._image))
        batch, places = length.shape[0], image.cos.shape[0]
        after = along.at(length).unsqueeze(1).expand(batch, places, -1)
        return prompt.expand(batch, self.tokens, -1), Rotation.joined([after, image.expand(batch, places, -1)], -1)

    def guide(self, negative: torch.Tensor, positive: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Each row of the output keeps the length that it has with the prompt (the pipeline's ``cfg_normalization``)."""
        return as_long(super().guide(negative, positive, scale), positive)

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        embed = self.network.time_caption_embed
        return (embed.timestep_embedder(embed.time_proj(1 - timestep / 1000)),) * len(self.sites)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        network, mask = self.network, requests["encoder_attention_mask"]
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)  # attention to nothing at all is no number
        length = mask.sum(1)
        prompt = network.time_caption_embed.caption_embedder(requests["encoder_hidden_states"])
        image = network.x_embedder(pack(state, self.patch_size, channels_last=True))
        at_prompt, at_image = self._turns(length)
        there = torch.arange(self.tokens, device=mask.device) < length[:, None]
        there = torch.cat([there, torch.ones(image.shape[:2], dtype=torch.bool, device=mask.device)], 1)
        with RealRotations():
            for layer in network.context_refiner:
                prompt = layer(prompt, mask, at_prompt)
            for layer in network.noise_refiner:
                image = layer(image, None, at_image, None)
            joint, turn = torch.cat([prompt, image], 1), Rotation.joined([at_prompt, at_image], 1)
            for layer in network.layers:
                joint = layer(joint, there, turn, None)
        rows, columns = (size // self.patch_size for size in self.sample_shape[1:])
        output = network.norm_out(joint[:, self.tokens :], None)
        return -unpack(output, rows, columns, self.patch_size, channels_last=True)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return -self.network(state, timestep=1 - timestep / 1000, return_dict=False, **requests)[0]
