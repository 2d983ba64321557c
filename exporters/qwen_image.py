"""diffusers' ``QwenImageTransformer2DModel``: Qwen-Image.

Sites are the modulations of image and text in every block, ``img_mod`` and ``txt_mod``, and ``norm_out``. They depend on the
time alone, so all of them, a third of the network, become constants. The network sees the latents in patches of 2x2, packed
into tokens; the state stays ``[channels, height, width]``.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.hooks import HookedAdapter
from mteo_deploy.exporters.patches import as_long, pack, unpack
from mteo_deploy.exporters.rotary import RealRotations, Rotation
from mteo_deploy.requests import Request

SIZE = 128
"""Of the latents: the pipeline's own default, 1024x1024 pixels."""

TOKENS = 512
"""Longest prompt that the pipeline takes by default."""


class QwenImageAdapter(HookedAdapter):
    """``QwenImageTransformer2DModel`` for text to image.

    Request inputs: ``encoder_hidden_states`` ``[tokens, joint_attention_dim]`` and ``encoder_hidden_states_mask`` ``[tokens]``
    (1: a token, 0: padding).
    """

    family = "QwenImageTransformer2DModel"
    network_class = QwenImageTransformer2DModel
    blocks_stand_alone = False  # RealRotations lasts as long as the call
    network: QwenImageTransformer2DModel
    patch_size = fixed_multiple = 2
    tokens: int

    def __init__(self, network: QwenImageTransformer2DModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        config = network.config
        refused = [name for name in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope") if config[name]]
        if 4 * network.out_channels != config.in_channels:
            refused.append(f"{config.in_channels} input and {network.out_channels} output channels")
        if refused:
            raise InputError(
                f"expected a text-to-image QwenImageTransformer2DModel; found {', '.join(refused)} (editing, layers), not "
                "supported yet"
            )
        self.sample_shape, self.tokens = (int(network.out_channels), SIZE, SIZE), TOKENS
        for index, block in enumerate(network.transformer_blocks):
            for name in ("img_mod", "txt_mod"):
                self.add_site(f"transformer_blocks.{index}.{name}", network.inner_dim, getattr(block, name), "input")
        self.add_site("norm_out", network.inner_dim, network.norm_out, "conditioning_embedding")
        self._in_call = False
        network.pos_embed.register_forward_hook(self._turn)
        self.set_size(SIZE, SIZE)
        self.set_tokens(TOKENS)

    def set_size(self, height: int, width: int) -> None:
        super().set_size(height, width)
        self._place()

    def set_tokens(self, tokens: int) -> None:
        self.tokens = tokens
        prompt = Request("encoder_hidden_states", "float32", (tokens, int(self.network.config.joint_attention_dim)))
        self.requests = (prompt, Request("encoder_hidden_states_mask", "int64", (tokens,), high=2, mask=True))
        self._place()

    @property
    def _shapes(self) -> list[tuple[int, int, int]]:
        """As the pipeline names the picture: frames, rows and columns of patches."""
        return [(1, self.sample_shape[1] // 2, self.sample_shape[2] // 2)]

    def _place(self) -> None:
        """Positions of image and prompt, ahead of any trace."""
        with torch.no_grad():
            place = self.network.pos_embed
            found = place(self._shapes, max_txt_seq_len=self.tokens, device=place.pos_freqs.device)
        self._turns = tuple(Rotation.of(factors) for factors in found)

    def _turn(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        return self._turns if self._in_call else None

    def guide(self, negative: torch.Tensor, positive: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Each token of the output keeps the length that it has with the prompt, as in the pipeline."""
        rows, columns = positive.shape[2] // 2, positive.shape[3] // 2
        found = super().guide(pack(negative), pack(positive), scale.flatten(1).unsqueeze(-1))
        return unpack(as_long(found, pack(positive)), rows, columns)

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        embed = self.network.time_text_embed
        return (embed.timestep_embedder(embed.time_proj(timestep / 1000)),) * len(self.sites)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        (_, rows, columns), *_ = self._shapes
        given = {"timestep": torch.zeros(1, device=state.device), "img_shapes": self._shapes, **requests}
        self._in_call = True
        try:
            with RealRotations():
                output = self.network(pack(state), return_dict=False, **given)[0]
        finally:
            self._in_call = False
        return unpack(output, rows, columns)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        (_, rows, columns), *_ = self._shapes
        given = {"timestep": timestep / 1000, "img_shapes": [self._shapes] * len(state), **requests}
        return unpack(self.network(pack(state), return_dict=False, **given)[0], rows, columns)
