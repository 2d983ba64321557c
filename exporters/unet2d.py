"""diffusers' UNets: each ``ResnetBlock2D`` is a site, its embedding the input of ``time_emb_proj``.

What the network adds to the time embedding once for all blocks (classes, pooled text, sizes) is added to each site's embedding
before the block's SiLU.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import check_channels
from mteo_deploy.exporters.hooks import HookedAdapter
from mteo_deploy.requests import Request


class UNetAdapter(HookedAdapter):
    """What ``UNet2DModel`` and ``UNet2DConditionModel`` have in common.

    Of a network that predicts a variance too, as its scheduler says, the prediction is taken.
    """

    def __init__(self, network: Any, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        config = network.config
        height, width = config.sample_size if isinstance(config.sample_size, (tuple, list)) else (config.sample_size,) * 2
        self.sample_shape = (int(config.in_channels), int(height or 0), int(width or 0))
        learned = scheduler_config.get("variance_type") in ("learned", "learned_range")
        check_channels(self.family, self.sample_shape[0], int(config.out_channels), cut=learned)
        self.size_multiple = 2 ** sum(bool(getattr(block, "downsamplers", None)) for block in network.down_blocks)
        for name, module in network.named_modules():
            if isinstance(module, ResnetBlockCondNorm2D):
                raise InputError(
                    f"expected a {self.family} whose blocks are of ResnetBlock2D; found {name}, which normalises by the time "
                    "(the K blocks of diffusers' upscalers), not supported"
                )
            if isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
                self.add_site(name, module.time_emb_proj.in_features, module, "temb")

    def set_size(self, height: int, width: int) -> None:
        multiple = self.fixed_multiple or self.size_multiple
        if (height, width) == (0, 0) and not all(self.sample_shape[-2:]):
            takes = f"in multiples of {multiple}" if multiple and multiple > 1 else "of any size"
            raise InputError(
                f"expected a --size: the configuration of this {self.family} names no sample_size; pass --size HEIGHTxWIDTH, "
                f"{takes}"
            )
        if multiple is not None and (height % multiple or width % multiple):  # its own sample_size may be one that cannot run
            raise InputError(self.size_error(height, width, multiple))
        super().set_size(height, width)

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        projected = self.network.time_proj(timestep)
        return (self.network.time_embedding(projected),) * len(self.sites)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.native(state, torch.zeros((), dtype=torch.int64, device=state.device), **requests)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        output = self.network(state, timestep, return_dict=False, **self.arguments(requests))[0]
        return output[:, : self.sample_shape[0]] if output.shape[1] > self.sample_shape[0] else output

    def arguments(self, requests: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Request inputs as the network takes them."""
        return dict(requests)


class UNet2DAdapter(UNetAdapter):
    """``UNet2DModel``, unconditional or with class labels, with sinusoidal time embedding."""

    family = "UNet2DModel"
    network_class = UNet2DModel
    network: UNet2DModel

    def __init__(self, network: UNet2DModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        if network.config.time_embedding_type != "positional":
            raise InputError(
                f"expected a UNet2DModel with time_embedding_type 'positional'; found {network.config.time_embedding_type!r} "
                "(fourier divides the output by the time, learned knows whole times only), not supported"
            )
        classes = network.class_embedding
        if classes is not None and not isinstance(classes, torch.nn.Embedding):
            raise InputError(
                f"expected a UNet2DModel without classes or with num_class_embeds; found class_embed_type "
                f"{network.config.class_embed_type!r}, not supported yet"
            )
        if classes is not None:
            self.silence(network.time_embedding)
            self.requests = (Request("class_labels", "int64", high=classes.num_embeddings),)
