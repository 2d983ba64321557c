"""The VAE's decoder of a pipeline directory, from latents as the backbone gives them to images.

Pipelines divide latents by the VAE's ``scaling_factor`` before they decode them; some add its ``shift_factor``, SDXL's
multiplies by ``latents_std`` and adds ``latents_mean`` where the VAE has both. Here that is part of the graph, as the pipeline
does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.directory import INDEX, read_json
from mteo_deploy.exporters.taken import CENTRED, SHIFTED, check_fields
from mteo_deploy.exporters.weights import check_finite, load_network

CLASSES = ("AutoencoderKL", "AutoencoderTiny")
WITHOUT = "for a bundle that gives latents pass --latents to export"

UNUSED = ("encoder.", "quant_conv.")
"""Beginnings of the names of a VAE's layers that only images to latents need."""


class Decoder(torch.nn.Module):
    """A frozen VAE's decoder: latents ``[batch, channels, h, w]`` to images ``[batch, 3, height, width]``, nominally in
    [-1, 1]."""

    mean: torch.Tensor | None
    std: torch.Tensor | None

    def __init__(self, vae: Any, latents: str | None = None) -> None:
        """
        Args:
            vae: of diffusers.
            latents: what is undone, as :mod:`mteo_deploy.exporters.taken` has it; None for all that the VAE says.
        """
        super().__init__()
        self.vae = vae.requires_grad_(False).eval()
        config = vae.config
        shift = config.shift_factor if latents in (None, SHIFTED) else None
        self.scale, self.shift = float(config.scaling_factor), float(shift or 0.0)
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        given = latents in (None, CENTRED) and mean is not None and std is not None
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


def load_decoder(directory: Path, cls: str, channels: int, latents: str | None = None) -> Decoder:
    """The decoder of a VAE's directory, in float32.

    Args:
        cls: its class in diffusers, out of :data:`CLASSES`.
        channels: of the backbone's latents.
        latents: as :class:`Decoder` takes it.

    Raises:
        InputError: for weights that do not fit, a configuration of another class or with fields that are not known, or latents
            of another number of channels.
    """
    path = directory / "config.json"
    config = read_json(path, f"the configuration of a {cls}", WITHOUT)
    if config.get("_class_name", cls) != cls:
        raise InputError(f"expected a {cls} in {path}, as {INDEX} says; found {config['_class_name']}; {WITHOUT}")
    check_fields(getattr(diffusers, cls), config, str(path))
    vae = load_network(getattr(diffusers, cls), directory, unused=UNUSED)
    used = (pair for pair in vae.named_parameters() if not pair[0].startswith(UNUSED))
    check_finite(cls, directory, used)
    if vae.config.latent_channels != channels:
        raise InputError(
            f"expected a VAE of {channels} latent channels, as the backbone has; {directory} has {vae.config.latent_channels}; "
            f"{WITHOUT}"
        )
    return Decoder(vae, latents)
