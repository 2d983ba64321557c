"""The adapter protocol: everything the rest of the project needs to know about a backbone family.

An adapter wraps an unmodified network. It finds the sites from the module graph and replaces each site's embedding by
a given one through hooks, so no model code is forked. A new family is one file beside this one and a line
in ``families()``.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.schedulers import noise_levels, scheduler_points
from mteo_deploy.plan import Plan, compile_plan
from mteo_deploy.requests import Arrays, Request, draw_all
from mteo_deploy.schedules import SCHEDULER, Levels


@dataclass(frozen=True)
class Site:
    """One place where a layer takes in the time embedding: the layer's module path and the embedding's width."""

    name: str
    width: int


class Adapter(ABC, torch.nn.Module):
    """A frozen backbone whose sites can be given their embeddings.

    Attributes:
        family: the name of the network class this adapter serves, e.g. ``UNet2DModel``.
        network_class: that class; :meth:`load` reads it with its ``from_pretrained``.
        sites: in the order the embeddings are passed.
        sample_shape: ``(channels, height, width)``.
        size_multiple: the network takes other heights and widths too, multiples of this; None: it takes its own only.
        requests: what is given once per request beside the noise, such as class labels.
        negatives: what the negative branch of classifier-free guidance gets for a request input: a number (the label of no
            class), or None for what the positive branch gets. One that is not here is given again, as ``negative_<name>``.
        branches: how many rows of the network's batch an image takes.
    """

    family: str
    network_class: type[Any]
    network: torch.nn.Module
    sites: tuple[Site, ...]
    sample_shape: tuple[int, ...]
    size_multiple: int | None = None
    requests: tuple[Request, ...] = ()
    negatives: Mapping[str, int | None] = MappingProxyType({})
    branches: int = 1
    prediction_type: str
    levels: Levels
    config: dict[str, Any]

    @abstractmethod
    def __init__(self, network: Any, scheduler_config: dict[str, Any]) -> None:
        super().__init__()
        self.scheduler_config = scheduler_config
        self.levels, self.prediction_type = noise_levels(scheduler_config)

    @classmethod
    def load(cls, network_dir: Path, scheduler_config: dict[str, Any]) -> Adapter:
        """Load the network of a diffusers model directory, in float32.

        Raises:
            InputError: when there are no weights as safetensors that fit it.
        """
        try:
            network = cls.network_class.from_pretrained(network_dir, use_safetensors=True, torch_dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"expected {cls.family} weights as safetensors in {network_dir}; {str(error).splitlines()[0]}"
            ) from None
        return cls(network, scheduler_config)

    @abstractmethod
    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The pretrained embedding of each site at continuous timesteps: ``[count]`` -> ``[count, width]`` per site.

        Sites that share an embedding give the same tensor.
        """

    @abstractmethod
    def forward(self, state: torch.Tensor, *embeddings: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        """The network's output for a unit-variance state ``[batch, ...]`` and one ``[1, width]`` embedding per site.

        The embeddings are the time's alone: what a request adds to them (a class embedding, pooled text) is added here.
        """

    def compile_plan(self, steps: int, solver: str = "euler", schedule: str | None = None) -> Plan:
        """A plan for this backbone.

        Args:
            schedule: a curve of :data:`mteo_deploy.schedules.SCHEDULES`, or ``scheduler`` for the time points of the pipeline's
                own scheduler; None for the backbone's default.

        Raises:
            InputError: for arguments no plan can be made of.
        """
        points = scheduler_points(self.scheduler_config, steps) if schedule == SCHEDULER else None
        return compile_plan(
            self.levels, steps=steps, solver=solver, schedule=schedule, prediction_type=self.prediction_type, points=points
        )

    def at_timestep(self, state: torch.Tensor, timestep: float, **requests: torch.Tensor) -> torch.Tensor:
        """The network with its own, ordinary time conditioning."""
        return self(state, *self.embeddings(torch.tensor([timestep], dtype=state.dtype)), **requests)

    def draw_requests(self, count: int, seed: int, given: Arrays | None = None) -> dict[str, torch.Tensor]:
        """Request inputs for ``count`` images, to learn from and to compare with: rows of ``given``, or random ones."""
        drawn = draw_all(self.requests, count, seed, given)
        return {name: torch.from_numpy(values) for name, values in drawn.items()}

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def fingerprint(self) -> str:
        """SHA-256 over the configuration and every weight in float32, independent of how the file stored them."""
        config = {k: v for k, v in self.config.items() if not k.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def families() -> dict[str, type[Adapter]]:
    """Network class name -> adapter."""
    from mteo_deploy.exporters.dit import DiTAdapter
    from mteo_deploy.exporters.unet2d import UNet2DAdapter
    from mteo_deploy.exporters.unet2d_condition import UNet2DConditionAdapter

    adapters: tuple[type[Adapter], ...] = (UNet2DAdapter, UNet2DConditionAdapter, DiTAdapter)
    return {adapter.family: adapter for adapter in adapters}


def _read_json(path: Path, what: str, way_out: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"expected {what} at {path}; found nothing there; {way_out}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"expected {what} at {path}; it cannot be read ({error}); {way_out}") from None
    if not isinstance(data, dict):
        raise InputError(f"expected {what} at {path}; found another JSON value; {way_out}")
    return data


def load_backbone(model: Path) -> Adapter:
    """Load the denoising network of a diffusers pipeline directory, frozen, in float32 on the CPU.

    Raises:
        InputError: for a directory that is no diffusers pipeline, or a network class without an adapter.
    """
    way_out = "pass a directory written by `DDPMPipeline.save_pretrained`"
    if not model.is_dir():
        raise InputError(
            f"expected a diffusers pipeline directory at {model}; found {'a file' if model.exists() else 'nothing'}; {way_out}"
        )
    index = _read_json(model / "model_index.json", "a diffusers pipeline's model_index.json", way_out)
    parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    known = families()
    network = next((name for name, cls in parts.items() if cls in known), None)
    if network is None:
        found = ", ".join(f"{name}: {cls}" for name, cls in parts.items() if cls) or "no networks"
        raise InputError(f"expected a backbone of class {', '.join(known)}; {model} has {found}")
    scheduler = _read_json(model / "scheduler" / "scheduler_config.json", "the noise schedule", way_out)
    adapter = known[parts[network]].load(model / network, scheduler)
    return adapter.requires_grad_(False).eval()


def site_dict(sites: Sequence[Site]) -> dict[str, int]:
    return {site.name: site.width for site in sites}
