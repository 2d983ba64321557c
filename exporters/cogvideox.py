"""diffusers' ``CogVideoXTransformer3DModel``: CogVideoX, text to video. States are ``[frames, channels, height, width]``.

Sites are ``norm1`` and ``norm2`` of every block, each of which modulates video and text, and ``norm_out``. They depend on the
time alone, so all modulation, a fifth of the network, becomes constants.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.hooks import HookedAdapter
from mteo_deploy.requests import Request


class CogVideoXAdapter(HookedAdapter):
    """``CogVideoXTransformer3DModel`` of CogVideoX 1.0: 2b, and 5b with rotary position embeddings.

    Request inputs: ``encoder_hidden_states`` ``[max_text_seq_length, text_embed_dim]``.
    """

    family = "CogVideoXTransformer3DModel"
    network_class = CogVideoXTransformer3DModel
    network: CogVideoXTransformer3DModel

    def __init__(self, network: CogVideoXTransformer3DModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        config = network.config
        taken = {
            "patch_size_t": config.patch_size_t is None,
            "ofs_embed_dim": config.ofs_embed_dim is None,
            "out_channels": config.out_channels == config.in_channels,
            "use_learned_positional_embeddings": not config.use_learned_positional_embeddings,
        }
        refused = [f"{name} {config[name]!r}" for name, fits in taken.items() if not fits]
        if refused:
            raise InputError(
                f"expected a text-to-video CogVideoXTransformer3DModel of CogVideoX 1.0; found {', '.join(refused)} (1.5, "
                "image to video), not supported yet"
            )
        self.patch_size = self.fixed_multiple = int(config.patch_size)
        frames = (int(config.sample_frames) - 1) // int(config.temporal_compression_ratio) + 1
        self.sample_shape = (frames, int(config.in_channels), int(config.sample_height), int(config.sample_width))
        for index, block in enumerate(network.transformer_blocks):
            for name in ("norm1", "norm2"):
                self.add_site(f"transformer_blocks.{index}.{name}", int(config.time_embed_dim), getattr(block, name), "temb")
        self.add_site("norm_out", int(config.time_embed_dim), network.norm_out, "temb")
        self.tokens = int(config.max_text_seq_length)
        self.requests = (Request("encoder_hidden_states", "float32", (self.tokens, int(config.text_embed_dim))),)
        self.set_size(*self.sample_shape[-2:])

    def set_size(self, height: int, width: int) -> None:
        super().set_size(height, width)
        self.turns = self._rotation() if self.network.config.use_rotary_positional_embeddings else None

    def _rotation(self) -> Any:
        """Cosines and sines as the pipeline makes them: another size is fitted into the middle of the trained one."""
        config, size = self.network.config, tuple(n // self.patch_size for n in self.sample_shape[-2:])
        own = tuple(int(n) // self.patch_size for n in (config.sample_height, config.sample_width))
        scale = min(whole / part for whole, part in zip(own, size, strict=True))
        fitted = tuple(round(part * scale) for part in size)
        start = tuple(round((whole - part) / 2) for whole, part in zip(own, fitted, strict=True))
        return get_3d_rotary_pos_embed(
            embed_dim=int(config.attention_head_dim),
            crops_coords=(start, tuple(a + b for a, b in zip(start, fitted, strict=True))),
            grid_size=size,
            temporal_size=self.sample_shape[0],
            device=torch.device("cpu"),
        )

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.network.time_embedding(self.network.time_proj(timestep)),) * len(self.sites)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.native(state, torch.zeros(1, device=state.device), **requests)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep=timestep, image_rotary_emb=self.turns, return_dict=False, **requests)[0]
