"""Which pipeline classes of diffusers are taken: those known to go from noise to samples with one network, called with the
request inputs that its adapter names.

A network of a known class and shape says nothing of how its pipeline calls it: Qwen-Image-Edit puts an image's tokens behind
the latents, SDXL's refiner takes an aesthetic score where the base has a size. So the pipeline's class decides, and one that
is not here is refused. Every row was read in diffusers' own pipeline of that name, and is compared with it by a test.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mteo_deploy.errors import InputError

SCALED, SHIFTED, CENTRED = "scaled", "shifted", "centred"
"""What a pipeline undoes before it decodes latents: ``/ scaling_factor``; then ``+ shift_factor``; or, where the VAE has both,
``* latents_std / scaling_factor + latents_mean``."""

SD_SIZE = 64
"""Of a Stable Diffusion UNet whose configuration is older than diffusers 0.9 and says less."""

CHECKER = "images that it finds unsafe are blackened by diffusers, and left as they are here"
EXTRACTOR = "it prepares images for parts that the bundle has not"
IMAGES = "it encodes reference images (IP-Adapter), which the request inputs have not"
VISION = MappingProxyType({"image_encoder": IMAGES, "feature_extractor": EXTRACTOR})
"""Parts that prompts alone do not use."""
SAFETY = MappingProxyType({**VISION, "safety_checker": CHECKER})
RESIDUALS = "its residuals are request inputs"


@dataclass(frozen=True)
class PipelineKind:
    """A pipeline class that is taken.

    Attributes:
        family: of the network that it calls with noise and the adapter's request inputs, and nothing else.
        network: the part that is this network.
        decoder: the part that decodes its samples; None where they are images.
        latents: what is undone before that, of :data:`SCALED`, :data:`SHIFTED`, :data:`CENTRED`.
        outside: parts that stay outside a bundle and change nothing of what is sampled from noise and request inputs -> what
            that means.
        fields: of ``model_index.json`` that are honoured, or change nothing.
        scheduler: the class that the pipeline converts any scheduler to.
        stable_diffusion: the pipeline mends old configurations: ``steps_offset`` 1, no ``clip_sample``, size 64.
        controlnet: residuals of a ControlNet are request inputs.
    """

    family: str
    network: str
    decoder: str | None = "vae"
    latents: str = SCALED
    outside: Mapping[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    scheduler: str | None = None
    stable_diffusion: bool = False
    controlnet: bool = False

    def scheduler_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A scheduler's configuration as the pipeline uses it.

        Raises:
            InputError: for a scheduler that diffusers does not have, where the pipeline converts it.
        """
        found = dict(config)
        if self.scheduler is not None and found.get("_class_name") not in (None, self.scheduler):
            found = {key: value for key, value in found.items() if key in _options(self.scheduler) or key.startswith("_")}
            found |= {"_class_name": self.scheduler}
        if self.stable_diffusion:
            options = _options(str(found.get("_class_name", "DDPMScheduler")))
            found |= {name: value for name, value in (("steps_offset", 1), ("clip_sample", False)) if name in options}
        return found

    def own_size(self, config: Mapping[str, Any]) -> int | None:
        """The size that the pipeline gives a network whose configuration is too old to say it; None for the network's own."""
        size, version = config.get("sample_size"), re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
        old = version is not None and (int(version[1]), int(version[2])) < (0, 9)
        return SD_SIZE if self.stable_diffusion and old and isinstance(size, int) and size < SD_SIZE else None


def _options(scheduler: str) -> tuple[str, ...]:
    """What a scheduler of diffusers can be told; nothing for one that diffusers has not, which is refused elsewhere."""
    import diffusers

    cls = getattr(diffusers, scheduler, None)
    return () if cls is None else tuple(name for name in inspect.signature(cls.__init__).parameters if name != "self")


def _text(family: str, network: str = "transformer", latents: str = SCALED, **options: Any) -> PipelineKind:
    return PipelineKind(family, network, latents=latents, **options)


_SD: Mapping[str, Any] = {"family": "UNet2DConditionModel", "network": "unet"}
_XL = {**_SD, "latents": CENTRED, "fields": ("force_zeros_for_empty_prompt",)}

PIPELINES: Mapping[str, PipelineKind] = MappingProxyType(
    {
        "DDPMPipeline": PipelineKind("UNet2DModel", "unet", None),
        "DDIMPipeline": PipelineKind("UNet2DModel", "unet", None, scheduler="DDIMScheduler"),
        "PNDMPipeline": PipelineKind("UNet2DModel", "unet", None, scheduler="PNDMScheduler"),
        "LDMPipeline": PipelineKind("UNet2DModel", "unet", "vqvae"),
        "StableDiffusionPipeline": PipelineKind(
            **_SD, outside=SAFETY, fields=("requires_safety_checker",), stable_diffusion=True
        ),
        "StableDiffusionXLPipeline": PipelineKind(**_XL, outside=VISION),
        "StableDiffusionControlNetPipeline": PipelineKind(
            **_SD,
            outside={**SAFETY, "controlnet": RESIDUALS},
            fields=("requires_safety_checker",),
            controlnet=True,
        ),
        "StableDiffusionXLControlNetPipeline": PipelineKind(
            **_XL, outside={**VISION, "controlnet": RESIDUALS}, controlnet=True
        ),
        "DiTPipeline": PipelineKind("DiTTransformer2DModel", "transformer", fields=("id2label",)),
        "PixArtAlphaPipeline": _text("PixArtTransformer2DModel"),
        "PixArtSigmaPipeline": _text("PixArtTransformer2DModel"),
        "StableDiffusion3Pipeline": _text("SD3Transformer2DModel", latents=SHIFTED, outside=VISION),
        "FluxPipeline": _text("FluxTransformer2DModel", latents=SHIFTED, outside=VISION),
        "QwenImagePipeline": _text("QwenImageTransformer2DModel"),
        "AuraFlowPipeline": _text("AuraFlowTransformer2DModel"),
        "Lumina2Pipeline": _text("Lumina2Transformer2DModel", latents=SHIFTED),
        "CogVideoXPipeline": _text("CogVideoXTransformer3DModel"),
        "SanaPipeline": _text("SanaTransformer2DModel"),
    }
)

RENAMED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"Transformer2DModel": {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}}
)
"""Network classes of older diffusers -> ``norm_type`` of the configuration -> what they are called now
(``diffusers.models.model_loading_utils``)."""


def current_class(cls: str, config: Mapping[str, Any]) -> str:
    """A network's class under its present name, with its configuration."""
    return RENAMED.get(cls, {}).get(str(config.get("norm_type")), cls)


def taken(family: str, controlnet: bool = True) -> list[str]:
    """Names of the pipeline classes with a family's network."""
    return [name for name, kind in PIPELINES.items() if kind.family == family and (controlnet or not kind.controlnet)]


def check_fields(cls: Any, config: Mapping[str, Any], where: str, leave_out: frozenset[str] = frozenset()) -> None:
    """Refuse a configuration that says something which a class of diffusers would leave aside.

    Args:
        cls: of diffusers; what its ``__init__`` takes is known, and what the class takes that the configuration names
            (diffusers drops that where it maps an older class).
        where: the configuration's file.
        leave_out: fields to leave aside.

    Raises:
        InputError: that names the fields.
    """
    import diffusers

    named = getattr(diffusers, str(config.get("_class_name")), cls)
    known = {*inspect.signature(cls.__init__).parameters, *inspect.signature(named.__init__).parameters, *KEPT, *leave_out}
    others = [name for name, value in config.items() if name not in known and not name.startswith("_") and says(value)]
    if others:
        raise InputError(
            f"expected a configuration of fields that {cls.__name__} of diffusers {diffusers.__version__} takes in {where}; "
            f"found {', '.join(f'{name} {config[name]!r}' for name in others)}, which it would leave aside; install the "
            f"diffusers that knows them, or pass --leave-out {' --leave-out '.join(others)}"
        )


KEPT = ("quantization_config",)
"""Fields of a configuration that are not its class's, and are read elsewhere."""


def says(value: Any) -> bool:
    """Whether a field's value is more than nothing."""
    return value not in (None, False, "", [], {}) and value != [None, None]
