"""What PixArt and Sana have in common: one projection of the time embedding makes six vectors for all blocks.

Each block adds a table of its own to them (adaLN-single, Chen et al. 2024, section 2.3). Sites are the blocks and the output's
``norm_out``. A site's embedding is the timestep embedder's output and goes through the shared projection for each block apart.
So embedder and projection are gone from a step graph.
"""

from __future__ import annotations

from typing import Any

import torch

from mteo_deploy.exporters.base import Site
from mteo_deploy.exporters.hooks import Broadcast, HookedAdapter


class SharedProjectionAdapter(HookedAdapter):
    """A subclass calls :meth:`share` with the network's ``AdaLayerNormSingle``."""

    def share(self, shared: Any, width: int) -> None:
        """Make the blocks and the output's norm sites."""
        self._shared = (shared,)  # in a tuple: it is the network's
        for index, block in enumerate(self.network.transformer_blocks):
            self.add_site(f"transformer_blocks.{index}", width, block, "timestep")
        self.sites = (*self.sites, Site("norm_out", width))
        shared.register_forward_hook(self._separate)

    def _separate(self, module: torch.nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """The blocks get what requests add to the embedding, instead of a projection that all share; the output its own."""
        return (output[1], super().meet(len(self.sites) - 1, output[1])) if self._given else None

    def meet(self, index: int, found: torch.Tensor) -> Any:
        shared = self._shared[0]
        modulation = shared.linear(shared.silu(super().meet(index, found)))
        return modulation if self._silenced else Broadcast(modulation)

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        embed = self._shared[0].emb
        return (embed.timestep_embedder(embed.time_proj(timestep)),) * len(self.sites)
