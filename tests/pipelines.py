"""Small random parts of a text-to-image pipeline beside the UNet of ``test_unet2d_condition``."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from helpers import edit_json


def random_vae(**options: object) -> AutoencoderKL:
    """Two levels: images are twice as high and wide as latents."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        **{"latent_channels": 2, "scaling_factor": 0.5, "shift_factor": 0.1, **options},
    )


def add_part(pipeline: Path, name: str, part: object, library: str = "diffusers") -> None:
    """Save a part of a pipeline and name it in the index."""
    part.save_pretrained(pipeline / name)  # type: ignore[attr-defined]
    edit_json(pipeline / "model_index.json", lambda index: index.update({name: [library, type(part).__name__]}))
