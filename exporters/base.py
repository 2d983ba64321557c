"""The adapter protocol: everything the rest of the project needs to know about a backbone family.

An adapter wraps an unmodified network. It finds the sites from the module graph and replaces each site's embedding by
a given one through hooks, so no model code is forked. A new family is one file beside this one and a line
in ``families()``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mteo_deploy.errors import InputError, border
from mteo_deploy.exporters.checkpoint import refuse_quantised
from mteo_deploy.exporters.directory import INDEX, WAY_OUT, PipelineDirectory
from mteo_deploy.exporters.lora import Lora, Loras
from mteo_deploy.exporters.scheduler_options import left_out
from mteo_deploy.exporters.scheduler_plan import scheduler_plan
from mteo_deploy.exporters.schedulers import noise_levels, scheduler_points
from mteo_deploy.exporters.taken import check_fields, current_class
from mteo_deploy.exporters.weights import SAVE_AGAIN, load_network, network_outline
from mteo_deploy.hub import is_repository, license_of, model_directory
from mteo_deploy.plan import Plan, compile_plan
from mteo_deploy.requests import Arrays, Request, draw_all
from mteo_deploy.schedules import SCHEDULER, Levels, given_points, steps_of

NATIVE = (
    "def native(self, state, timestep, **requests): return self.network(state, timestep, **requests)  "
    "# one output as large as the state; timestep is [batch], as in embeddings"
)
"""What an adapter lacks that does not say how its network is called with a time, for a network that takes its arguments so."""


LARGEST_SIDE = 4096
"""Of a state's height and width."""


def check_channels(family: str, given: int, found: int, cut: bool = True) -> None:
    """Refuse a network whose output is no prediction for its input.

    Args:
        cut: twice as many output channels are a prediction and a learned variance, which the pipeline cuts off.

    Raises:
        InputError: for other output channels than input channels.
    """
    if found != given and not (cut and found == 2 * given):
        raise InputError(
            f"expected a {family} whose output is of its input's channels{', or twice as many (a learned variance)' * cut}; "
            f"found in_channels {given}, out_channels {found} (inpainting, editing, super-resolution), not supported yet"
        )


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
        sample_shape: ``(channels, height, width)``; of videos ``(frames, channels, height, width)``.
        size_multiple: the graph can leave height and width open, for multiples of this; None: it cannot.
        fixed_multiple: a graph can be made for another height and width, multiples of this; None: for its own only, or for
            those of ``size_multiple``.
        patch_size: along an axis, how much of the state becomes one token; 1 for networks without tokens.
        tokens: the length of a prompt, padded; None for networks without one.
        requests: what is given once per request beside the noise, such as class labels.
        source: where it was loaded from, by name.
        directory: where its network's own files are; None for one that was made otherwise.
        license: what its card says, e.g. ``apache-2.0``; None where it says nothing.
        pipeline: the diffusers pipeline directory that it is part of; None for one that was made otherwise.
        loras: LoRA weights that were fused into it, and are for its pipeline's text encoders too.
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
    fixed_multiple: int | None = None
    patch_size: int = 1
    tokens: int | None = None
    requests: tuple[Request, ...] = ()
    negatives: Mapping[str, int | None] = MappingProxyType({})
    branches: int = 1
    prediction_type: str
    levels: Levels
    config: dict[str, Any]
    source: str = "given"
    directory: Path | None = None
    license: str | None = None
    pipeline: PipelineDirectory | None = None
    loras: Loras = Loras()

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
        return cls(load_network(cls.network_class, network_dir), scheduler_config)

    def set_size(self, height: int, width: int) -> None:
        """Take states of this size; noise levels that depend on it follow.

        Raises:
            InputError: for a size that the network does not take.
        """
        multiple, others, own = self.fixed_multiple or self.size_multiple, self.sample_shape[:-2], self.sample_shape[-2:]
        fits = multiple is not None and height % multiple == width % multiple == 0
        fits = fits and min(height, width) > 0 and max(height, width) <= LARGEST_SIDE
        own_fits = (height, width) == own and min(own) > 0
        if not (fits or own_fits) or height % self.patch_size or width % self.patch_size:
            raise InputError(self.size_error(height, width, multiple))
        self.sample_shape = (*others, height, width)
        self.levels, self.prediction_type = noise_levels(self.scheduler_config, self.image_tokens)

    def size_error(self, height: int, width: int, multiple: int | None) -> str:
        """The line that refuses a size, with one that would do."""
        own = "x".join(map(str, self.sample_shape[-2:]))
        if multiple is None:
            patches = f", in patches of {self.patch_size}" if self.patch_size > 1 else ""
            return f"expected a --size that {self.family} takes: {own} only{patches}; found {height}x{width}"
        near = "x".join(str(min(max(1, round(n / multiple)), LARGEST_SIDE // multiple) * multiple) for n in (height, width))
        takes = f"multiples of {multiple}" if multiple > 1 else "1x1 and more"
        takes += f" up to {LARGEST_SIDE}" * (max(height, width) > LARGEST_SIDE)
        return f"expected a --size that {self.family} takes: {takes}; found {height}x{width}; pass --size {near}, say"

    @property
    def image_tokens(self) -> int:
        """How many tokens the network makes of one state."""
        return math.prod(self.sample_shape[-2:]) // self.patch_size**2

    def set_tokens(self, tokens: int) -> None:
        """Take prompts of this length, padded.

        Raises:
            InputError: for a network whose prompts have one length, or that takes none.
        """
        length = "no prompt" if self.tokens is None else f"prompts of {self.tokens} tokens"
        raise InputError(f"expected no --tokens for {self.family}, which takes {length}; found {tokens}")

    def take_residuals(self) -> None:
        """Take a ControlNet's residuals as request inputs.

        Raises:
            InputError: for a network that takes none.
        """
        raise InputError(f"expected --controlnet with a UNet2DConditionModel; found a {self.family}; leave it out")

    @classmethod
    def outline(cls, network_dir: Path, scheduler_config: dict[str, Any]) -> Adapter:
        """The network of a diffusers model directory without its weights, on the meta device.

        Raises:
            InputError: when there is no configuration that fits it.
        """
        if not hasattr(cls, "network_class"):
            return cls.load(network_dir, scheduler_config)
        refuse_quantised(network_dir, cls.family)
        with border(f"expected {cls.family}'s config.json in {network_dir}", SAVE_AGAIN):
            network = network_outline(cls.network_class, network_dir)
        return cls(network, scheduler_config)

    def serve(self, pipeline: PipelineDirectory) -> None:
        """Take on what the pipeline says beyond the network's configuration, such as the length of a prompt."""

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

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        """The unmodified network's output at times of its own, without any site being given: what this adapter must equal.

        It calls the network as its pipeline does, with its ordinary conditioning, and shares nothing with :meth:`forward`.
        ``inspect``, ``distill`` and ``export`` compare both (:mod:`~mteo_deploy.exporters.check_adapter`).

        Args:
            state: unit variance, ``[batch, ...]``.
            timestep: float, ``[batch]``, in the units of :meth:`embeddings`.

        Returns:
            ``[batch, ...]``, of the state's shape.

        Raises:
            InputError: for an adapter that does not say it.
        """
        raise InputError(
            f"expected {type(self).__name__} to say how its network is called with a time; found no method native; add to it: "
            f"{NATIVE}"
        )

    def guide(self, negative: torch.Tensor, positive: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance as the family's pipeline does it, of the outputs of both branches ``[batch, ...]``.

        Args:
            scale: ``[batch, 1, ...]``.
        """
        return negative + scale * (positive - negative)

    @contextmanager
    def recomputing_blocks(self) -> Iterator[bool]:
        """While it lasts, the network keeps nothing of what it computes inside its blocks, and computes it again for the
        gradient (Chen et al. 2016, arXiv 1604.06174). Gives whether it does so: some networks cannot."""
        yield False

    def compile_plan(
        self, steps: int | None = None, solver: str = "euler", schedule: str | Sequence[float] | None = None
    ) -> Plan:
        """A plan for this backbone.

        Args:
            steps: step count; None for that of a ``schedule`` of noise levels.
            solver: out of :data:`mteo_deploy.solvers.SOLVERS`, or ``scheduler`` for the update of the pipeline's own scheduler,
                with its options, on its time points.
            schedule: a curve of :data:`mteo_deploy.schedules.SCHEDULES`, ``scheduler`` for the time points of the pipeline's
                own scheduler, or ``steps + 1`` noise levels; None for the backbone's default.

        Raises:
            InputError: for arguments no plan can be made of.
        """
        points, count = given_points(schedule), steps_of(schedule, steps)
        if count is None:
            raise InputError(
                "expected --steps, or --schedule with a list of noise levels; found neither; pass for example --steps 4"
            )
        pipeline = "" if self.pipeline is None else self.pipeline.cls
        if solver == SCHEDULER:
            if schedule not in (None, SCHEDULER):
                raise InputError(
                    f"expected --solver scheduler on the scheduler's own time points; found --schedule {schedule}; leave it "
                    "out, or pass --solver euler, or another of docs/solvers.md"
                )
            own = self.scheduler_config, count, self.levels, self.prediction_type
            return scheduler_plan(*own, self.image_tokens, pipeline)
        if schedule == SCHEDULER:
            points = scheduler_points(self.scheduler_config, count, self.image_tokens, pipeline)
        return compile_plan(
            self.levels,
            steps=count,
            solver=solver,
            schedule=schedule if isinstance(schedule, str) and (points is None or schedule == SCHEDULER) else None,
            prediction_type=self.prediction_type,
            points=points,
        )

    def scheduler_left_out(self, solver: str) -> str | None:
        """What the pipeline's own scheduler does and a plan of ``solver`` does not, in words; None for nothing."""
        found = [] if solver == SCHEDULER else left_out(self.scheduler_config)
        name = self.scheduler_config["_class_name"]
        return f"not in the plan of {solver}: {' and '.join(found)}, as {name} has it" if found else None

    def at_timestep(self, state: torch.Tensor, timestep: float, **requests: torch.Tensor) -> torch.Tensor:
        """The network with its own, ordinary time conditioning."""
        return self(state, *self.embeddings(torch.tensor([timestep], dtype=state.dtype, device=state.device)), **requests)

    def draw_requests(self, count: int, seed: int, given: Arrays | None = None) -> dict[str, torch.Tensor]:
        """Request inputs for ``count`` images, to learn from and to compare with: rows of ``given``, or random ones."""
        drawn = draw_all(self.requests, count, seed, given)
        return {name: torch.from_numpy(values) for name, values in drawn.items()}

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def fingerprint(self) -> str:
        """SHA-256 over the configuration and every weight in float32, independent of how the file stored them."""
        digest = hashlib.sha256(as_json(self.config, f"{type(self).__name__}.config").encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def as_json(config: Mapping[str, Any], what: str) -> str:
    """A configuration in JSON, keys in order, private ones apart; types and numbers of torch and numpy by what they are.

    Raises:
        InputError: for a value that has no such form, named under ``what``.
    """
    found = {str(key): value for key, value in config.items() if not str(key).startswith("_")}
    for key, value in found.items():
        try:
            json.dumps(value, sort_keys=True, default=_plain)
        except (TypeError, ValueError, RecursionError):
            raise InputError(
                f"expected {what} of values that JSON can hold; found a {type(value).__name__} as {key!r}; set self.config in "
                "the adapter's __init__ to a dict of plain values"
            ) from None
    return json.dumps(found, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype | torch.device | os.PathLike):
        return str(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value)


def families() -> dict[str, type[Adapter]]:
    """Network class name -> adapter."""
    from mteo_deploy.exporters.auraflow import AuraFlowAdapter
    from mteo_deploy.exporters.cogvideox import CogVideoXAdapter
    from mteo_deploy.exporters.dit import DiTAdapter
    from mteo_deploy.exporters.flux import FluxAdapter
    from mteo_deploy.exporters.lumina2 import Lumina2Adapter
    from mteo_deploy.exporters.pixart import PixArtAdapter
    from mteo_deploy.exporters.qwen_image import QwenImageAdapter
    from mteo_deploy.exporters.sana import SanaAdapter
    from mteo_deploy.exporters.sd3 import SD3Adapter
    from mteo_deploy.exporters.unet2d import UNet2DAdapter
    from mteo_deploy.exporters.unet2d_condition import UNet2DConditionAdapter

    adapters: tuple[type[Adapter], ...] = (
        UNet2DAdapter,
        UNet2DConditionAdapter,
        DiTAdapter,
        PixArtAdapter,
        SD3Adapter,
        FluxAdapter,
        QwenImageAdapter,
        AuraFlowAdapter,
        Lumina2Adapter,
        CogVideoXAdapter,
        SanaAdapter,
    )
    return {adapter.family: adapter for adapter in adapters}


def embeddings_at(
    adapter: Adapter, plan: Plan, index: int, deltas: Mapping[str, NDArray[np.float32]] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Pretrained embedding at the time of evaluation ``index`` and the learned delta on it: site -> ``[1, width]``.

    Args:
        deltas: site -> ``[evaluations, width]``; None for the pretrained embedding alone.
    """
    with torch.no_grad():
        base = adapter.embeddings(torch.tensor([plan.evaluations[index].timestep], dtype=torch.float32))
    named = {site.name: one.numpy() for site, one in zip(adapter.sites, base, strict=True)}
    return named if deltas is None else {name: one + deltas[name][index : index + 1] for name, one in named.items()}


GROUP = "mteo_deploy.adapters"
"""Entry points of other packages' adapters: network class name -> ``package.module:Class``."""


def _registered() -> dict[str, str]:
    return {entry.name: entry.value for entry in importlib.metadata.entry_points(group=GROUP)}


def _named(spec: str) -> type[Adapter]:
    """The adapter that ``package.module:Class`` names; modules in the working directory are found too."""
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module does when it is imported
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ImportError | AttributeError) else str(error)
        raise InputError(
            f"expected an adapter as package.module:Class that can be imported; found {spec!r} "
            f"({' '.join(reason.split()) or 'no message'})"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Adapter)):
        raise InputError(f"expected a subclass of mteo_deploy.exporters.base.Adapter; {spec} is {found!r}")
    return found


@dataclass(frozen=True)
class _Options:
    """How :func:`load_backbone` loads a network."""

    weights: bool
    loras: tuple[Lora, ...]
    controlnet: bool


def load_backbone(
    model: Path,
    adapter: str | None = None,
    size: tuple[int, int] | None = None,
    tokens: int | None = None,
    weights: bool = True,
    loras: Sequence[Lora] = (),
    controlnet: bool = False,
    leave_out: Collection[str] = (),
) -> Adapter:
    """Load a backbone, frozen, in float32 on the CPU: the denoising network of a diffusers pipeline directory, or what an
    adapter of yours reads.

    Args:
        model: its directory, the name of a packaged one, or a repository of the Hugging Face Hub: ``org/name``,
            ``org/name@revision``.
        adapter: ``package.module:Class``, a subclass of :class:`Adapter`; None for the one that serves the pipeline's network,
            ours or one that an installed package registers.
        size: height and width of the states; None for the backbone's own.
        tokens: length of a prompt, padded; None for the backbone's own.
        weights: without them a diffusers network is on the meta device: its structure alone, whatever its size.
        loras: LoRA weights to fuse into it, in order.
        controlnet: take a ControlNet's residuals as request inputs.
        leave_out: parts of the pipeline, and fields of its configurations, to go without.

    Raises:
        InputError: for a directory that is no diffusers pipeline, a pipeline class that is not known to sample from noise with
            its network and these request inputs alone (unless ``adapter`` answers for it), a network class without an adapter,
            or LoRA weights that do not fit.
    """
    cls = None if adapter is None else _named(adapter)
    source = str(model) if is_repository(model) else Path(os.path.abspath(model)).name or str(model)
    model = model_directory(model)
    if not model.is_dir() and (cls is None or not model.exists()):
        raise InputError(
            f"expected a diffusers pipeline directory at {model}; found {'a file' if model.exists() else 'nothing'}; {WAY_OUT}"
        )
    own = cls is not None and not (model / INDEX).exists()
    if own and loras:
        raise InputError(
            f"expected --lora with a diffusers pipeline directory, whose loader reads it; {model} is none; leave it out"
        )
    if cls is not None and own:
        found = _loaded(cls, model, {}, True)
    else:
        options = _Options(weights, tuple(loras), controlnet)
        found = _load_part(cls, PipelineDirectory.read(model, leave_out), options)
    found.source, found.license = source, license_of(model)
    if tokens is not None and tokens < 1:
        raise InputError(f"expected --tokens of 1 or more; found {tokens}")
    with border(f"expected {type(found).__name__} to take the size, the tokens and the residuals asked for", MEND):
        found.set_size(*(size or found.sample_shape[-2:]))
        if tokens is not None:
            found.set_tokens(tokens)
        if controlnet:
            found.take_residuals()
    return found.requires_grad_(False).eval()


ATTRIBUTES = ("family", "network", "sites", "sample_shape", "config", "levels", "prediction_type")
"""What every adapter has when its ``__init__`` is through."""
MEND = "mend the adapter, or pass another --model"


def _loaded(cls: type[Adapter], path: Path, scheduler_config: dict[str, Any], weights: bool) -> Adapter:
    """What an adapter's ``load`` (without weights: ``outline``) makes of the network's directory, or of a file.

    Raises:
        InputError: for whatever it raises, and for what is no whole adapter.
    """
    name = cls.__name__
    with border(f"expected {name}.load to read {path}", MEND):
        found = (cls.load if weights else cls.outline)(path, scheduler_config)
    if not isinstance(found, Adapter):
        raise InputError(f"expected {name}.load to return an adapter; found a {type(found).__name__}; return cls(network, ...)")
    if missing := [one for one in ATTRIBUTES if not hasattr(found, one)]:
        raise InputError(
            f"expected {name}.__init__ to set {', '.join(ATTRIBUTES)}; found no {', '.join(missing)}; set it there"
        )
    shape = found.sample_shape
    if not isinstance(shape, Sequence) or len(shape) < 2 or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise InputError(f"expected {name}.sample_shape as (channels, height, width); found {shape!r}; set it in __init__")
    if not isinstance(found.network, torch.nn.Module):
        raise InputError(f"expected {name}.network to be a torch module; found a {type(found.network).__name__}")
    found.sample_shape, found.directory = tuple(shape), path
    return found


def _load_part(cls: type[Adapter] | None, directory: PipelineDirectory, options: _Options) -> Adapter:
    """The network of a pipeline directory that ``cls`` serves, LoRA weights fused; None: the first that any adapter serves."""
    known, others = (families(), _registered()) if cls is None else ({cls.family: cls}, {})
    classes = {name: directory.current_class(name) for name in directory.parts}
    order = sorted(classes, key=lambda name: directory.kind is None or name != directory.kind.network)
    network = next((name for name in order if classes[name] in known or classes[name] in others), None)
    if network is None:
        found = ", ".join(f"{name}: {part}" for name, part in classes.items()) or "no networks"
        raise InputError(
            f"expected a backbone of class {', '.join([*known, *others])}; {directory.path} has {found}; name an adapter of "
            "its own with --adapter package.module:Class"
        )
    family = classes[network]
    chosen = known[family] if family in known else _named(others[family])
    if cls is None and family in known:
        directory.check_class(network, family, f"{chosen.__module__}:{chosen.__name__}", options.controlnet)
    else:
        directory = directory.answered_for(network, family)
    directory.check_rest()
    _check_network(chosen, directory, network)
    adapter = _loaded(chosen, directory.directory(network), directory.scheduler(), options.weights)
    adapter.pipeline = directory
    if size := directory.own_size():
        adapter.sample_shape = (*adapter.sample_shape[:-2], size, size)
    adapter.serve(directory)
    adapter.loras = Loras(directory.cls, options.loras)
    adapter.loras.fuse_network(network, adapter.network, {*directory.classes(), *directory.leave_out})
    return adapter


def _check_network(cls: type[Adapter], directory: PipelineDirectory, network: str) -> None:
    """Refuse a network whose configuration is of another class than the index says, or says more than its class takes."""
    config, path = directory.config(network), directory.directory(network) / "config.json"
    named = config.get("_class_name")
    if isinstance(named, str) and current_class(named, config) != directory.current_class(network):
        raise InputError(
            f"expected a {directory.current_class(network)} in {path}, as {INDEX} says; found {named}; correct one of them"
        )
    if hasattr(cls, "network_class"):
        check_fields(cls.network_class, config, str(path), directory.leave_out)


def site_dict(sites: Sequence[Site]) -> dict[str, int]:
    return {site.name: site.width for site in sites}
