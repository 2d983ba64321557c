"""The VAE's decoder of a pipeline directory, from latents as the backbone gives them to images.

Pipelines divide latents by the VAE's ``scaling_factor`` and add its ``shift_factor`` before they decode them (SDXL's multiplies
by ``latents_std`` and adds ``latents_mean`` where the VAE has both); here that is part of the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.weights import load_network

CLASSES = ("AutoencoderKL", "AutoencoderTiny")

UNUSED = ("encoder.", "quant_conv.")
"""Beginnings of the names of a VAE's layers that only images to latents need."""


class Decoder(torch.nn.Module):
    """A frozen VAE's decoder: latents ``[batch, channels, h, w]`` to images ``[batch, 3, height, width]``, nominally in
    [-1, 1]."""

    mean: torch.Tensor | None
    std: torch.Tensor | None

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False).eval()
        config = vae.config
        self.scale, self.shift = float(config.scaling_factor), float(config.shift_factor or 0.0)
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        given = mean is not None and std is not None
        per_channel = (torch.tensor(values).reshape(1, -1, 1, 1) if given else None for values in (mean, std))
        for name, values in zip(("mean", "std"), per_channel, strict=True):
            self.register_buffer(name, values, persistent=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        if self.mean is None or self.std is None:
            unscaled = latents / self.scale + self.shift
        else:
            unscaled = latents * self.std / self.scale + self.mean
        found: torch.Tensor = self.vae.decode(unscaled, return_dict=False)[0]
        return found

    @torch.no_grad()
    def to_json(self) -> dict[str, Any]:
        """Its ``class``; ``channels`` of an image, and by how much the ``scale`` of its height and width is larger than the
        latents'; ``parameters`` of the decoding side alone, since the graph has no encoder."""
        side = 8
        latents = torch.zeros(1, self.vae.config.latent_channels, side, side)
        _, channels, height, _ = self(latents).shape
        sizes = [p.numel() for name, p in self.vae.named_parameters() if name.startswith(("decoder", "post_quant_conv"))]
        return {"class": type(self.vae).__name__, "channels": channels, "scale": height // side, "parameters": sum(sizes)}


def load_decoder(directory: Path, cls: str, channels: int) -> Decoder:
    """The decoder of a VAE's directory, in float32.

    Args:
        cls: its class in diffusers, out of :data:`CLASSES`.
        channels: of the backbone's latents.

    Raises:
        InputError: for weights that do not fit, or latents of another number of channels.
    """
    vae = load_network(getattr(diffusers, cls), directory, unused=UNUSED)
    if vae.config.latent_channels != channels:
        raise InputError(
            f"expected a VAE of {channels} latent channels, as the backbone has; {directory} has {vae.config.latent_channels}; "
            "take it out of model_index.json for a bundle without a decoder"
        )
    return Decoder(vae)
