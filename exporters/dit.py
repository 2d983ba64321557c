"""diffusers' ``DiTTransformer2DModel``: class-conditional, each block with a timestep MLP of its own.

Sites are the modulations: ``norm1`` of every block, and the output's ``proj_out_1``, which the model feeds from block 0's MLP.
A site's embedding is the MLP's output, before the label's embedding is added to it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from mteo_deploy.exporters.base import Adapter, Site, check_channels
from mteo_deploy.requests import Request


class DiTAdapter(Adapter):
    """``DiTTransformer2DModel`` with class labels; of a network that predicts a variance too, the prediction is taken.

    The label after the last class is the one of classifier-free guidance, for no class.
    """

    family = "DiTTransformer2DModel"
    network_class = DiTTransformer2DModel
    network: DiTTransformer2DModel

    def __init__(self, network: DiTTransformer2DModel, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.network = network
        self.config = dict(network.config)
        size = int(network.config.sample_size)
        self.sample_shape = (int(network.config.in_channels), size, size)
        self.patch_size = int(network.config.patch_size)
        check_channels(self.family, self.sample_shape[0], int(network.out_channels))
        self._embedders = [block.norm1.emb for block in network.transformer_blocks]
        labels = self._embedders[0].class_embedder.embedding_table.num_embeddings
        self.requests = (Request("class_labels", "int64", high=labels, none=labels - 1),)
        self.negatives = {"class_labels": labels - 1}
        width = network.proj_out_1.in_features
        names = [*(f"transformer_blocks.{i}.norm1" for i in range(len(self._embedders))), "proj_out_1"]
        self.sites = tuple(Site(name, width) for name in names)
        self._queues: list[list[torch.Tensor]] = []
        for index, embedder in enumerate(self._embedders):
            embedder.timestep_embedder.register_forward_hook(self._give(index))

    def _give(self, index: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return self._queues[index].pop(0) if self._queues else output

        return hook

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = [embedder.timestep_embedder(embedder.time_proj(timestep)) for embedder in self._embedders]
        return (*found, found[0])

    def forward(self, state: torch.Tensor, *embeddings: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        self._queues = [[embedding] for embedding in embeddings[:-1]]
        self._queues[0].append(embeddings[-1])  # the model calls block 0's MLP again, for its output
        timestep = torch.zeros(1, dtype=torch.int64, device=state.device)
        try:
            output = self.network(state, timestep=timestep, class_labels=requests["class_labels"], return_dict=False)[0]
        finally:
            self._queues = []
        return output[:, : self.sample_shape[0]]

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep=timestep, return_dict=False, **requests)[0][:, : self.sample_shape[0]]
