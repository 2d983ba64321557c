"""Networks of one's own and their adapters: the kinds of NVlabs/edm's SongUNet (Karras et al. 2022) and of OpenAI's
guided-diffusion (Dhariwal & Nichol 2021), small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import silu

from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.hooks import HookedAdapter
from mteo_deploy.requests import Request


class Block(nn.Module):
    """A residual block that takes the embedding through ``affine``, before its second norm."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm0, self.norm1 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.conv0, self.conv1 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.affine = nn.Linear(width, channels)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        hidden = self.conv0(silu(self.norm0(x))) + self.affine(emb)[:, :, None, None]
        return x + self.conv1(silu(self.norm1(hidden)))


class Song(nn.Module):
    """``F(c_in x, c_noise)`` of EDM's preconditioning."""

    def __init__(self, channels: int, width: int, blocks: int, size: int) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.map_layer0, self.map_layer1 = nn.Linear(width, width), nn.Linear(width, width)
        self.enter, self.leave = nn.Conv2d(channels, 16, 3, padding=1), nn.Conv2d(16, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Block(16, width) for _ in range(blocks))

    def embed(self, noise: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-torch.arange(self.map_layer0.in_features // 2, device=noise.device) / 4)
        angles = noise[:, None] * frequencies
        return silu(self.map_layer1(silu(self.map_layer0(torch.cat([angles.cos(), angles.sin()], dim=1)))))

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        emb, x = self.embed(noise), self.enter(x)
        for block in self.blocks:
            x = block(x, emb)
        return self.leave(x)


class SongAdapter(HookedAdapter):
    """A directory with ``config.json`` (``Song``'s arguments) and ``model.safetensors``."""

    family = "Song"

    def __init__(self, network: Song, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.sample_shape = (network.channels, network.size, network.size)
        self.size_multiple = 1
        for name, module in network.named_modules():
            if name.endswith("affine"):
                self.add_site(name, module.in_features, module, "input")

    @classmethod
    def load(cls, network_dir: Path, scheduler_config: dict[str, Any]) -> Adapter:
        network = Song(**json.loads((network_dir / "config.json").read_text()))
        network.load_state_dict(load_file(network_dir / "model.safetensors"))
        return cls(network, {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5})

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.network.embed(timestep),) * len(self.sites)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.network(state, torch.zeros(1, device=state.device))

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep)


class Residual(nn.Module):
    """As guided-diffusion's ResBlock with ``use_scale_shift_norm``."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * channels))
        self.out_norm, self.out_conv = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        return x + self.out_conv(silu(self.out_norm(self.in_layers(x)) * (1 + scale) + shift))


class Guided(nn.Module):
    """Predicts the noise and a variance, of ten classes; labels are added to the time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.label_emb = nn.Embedding(10, 16)
        self.enter, self.leave = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(8, 16) for _ in range(2))

    def sinusoids(self, timesteps: torch.Tensor) -> torch.Tensor:
        angles = timesteps[:, None] * torch.exp(-torch.arange(4, device=timesteps.device) * 2.3)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        emb, x = self.time_embed(self.sinusoids(timesteps)) + self.label_emb(y), self.enter(x)
        for block in self.blocks:
            x = block(x, emb)
        return self.leave(x)


class GuidedAdapter(HookedAdapter):
    """Of a file of weights."""

    family = "Guided"

    def __init__(self, network: Guided, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.sample_shape = (2, 8, 8)
        self.requests = (Request("class_labels", "int64", high=10),)
        self.silence(network.time_embed)
        for name, module in network.named_modules():
            if name.endswith("emb_layers"):
                self.add_site(name, module[1].in_features, module, "input")

    @classmethod
    def load(cls, network_dir: Path, scheduler_config: dict[str, Any]) -> Adapter:
        network = Guided()
        network.load_state_dict(load_file(network_dir))
        return cls(network, {"_class_name": "DDPMScheduler", "beta_schedule": "linear"})

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.network.time_embed(self.network.sinusoids(timestep)),) * len(self.sites)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.network(state, torch.zeros(1, device=state.device), requests["class_labels"])[:, :2]

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep, requests["class_labels"])[:, :2]
