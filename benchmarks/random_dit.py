"""A DiT that no download is needed for, to be measured."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def random_dit(directory: Path) -> Path:
    """Pipeline directory of a DiT-S (35 M parameters, 64 tokens of 2x2) with random weights."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=12,
        sample_size=16,
        num_embeds_ada_norm=10,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    network.save_pretrained(directory / "transformer")
    DDIMScheduler().save_pretrained(directory / "scheduler")
    index = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (directory / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **index}))
    return directory
