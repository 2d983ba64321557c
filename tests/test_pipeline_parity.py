"""Every family against diffusers' own pipeline: the same first noise, request inputs and guidance, and its own scheduler.

What is compared is ``export --plain --solver scheduler``, ``build`` and ``sample`` with the pipeline's ``__call__``, so that
nothing of ours decides what is right: guidance, packing, sizes, shifts, masks, timesteps, decoding.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from families import redraw
from helpers import edit_json, relative
from networks import auraflow, cogvideox, flux, lumina, pixart, qwen, sana, sd3
from pipelines import add_part, random_vae
from test_unet2d_condition import SDXL, random_unet

from mteo_deploy.engines.build import build
from mteo_deploy.exporters.base import load_backbone
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.guidance import guided
from mteo_deploy.exporters.patches import pack, unpack
from mteo_deploy.sampler import Sampler, noise_for

COUNT, STEPS, SCALE = 2, 2, 3.0
Given = dict[str, torch.Tensor]
FLOW = partial(FlowMatchEulerDiscreteScheduler, shift=3.0)
DYNAMIC = partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)


def unet(**options: Any) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    )


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,  # the pipeline takes 1000 for the label of no class
    )


def _drawn(pipeline: Any, noise: torch.Tensor, call: Callable[[], Any]) -> Any:
    """Of a pipeline that takes no noise: it draws this one."""
    module = importlib.import_module(type(pipeline).__module__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda shape, **_: noise.reshape(shape))
        return call()


def _unconditional(pipeline: Any, noise: torch.Tensor, given: Given, options: dict[str, Any]) -> torch.Tensor:
    call = partial(pipeline, COUNT, num_inference_steps=STEPS, output_type="np")
    return torch.from_numpy(_drawn(pipeline, noise, call).images).permute(0, 3, 1, 2)


def _dit(pipeline: Any, noise: torch.Tensor, given: Given, options: dict[str, Any]) -> torch.Tensor:
    call = partial(pipeline, given["class_labels"].tolist(), guidance_scale=SCALE, num_inference_steps=STEPS, output_type="np")
    return torch.from_numpy(_drawn(pipeline, torch.cat([noise]), call).images).permute(0, 3, 1, 2)


def _text(pipeline: Any, noise: torch.Tensor, given: Given, options: dict[str, Any]) -> torch.Tensor:
    """Embeddings in place of prompts, with what else the pipeline takes of them."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    names = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    names |= {"text_embeds": "pooled_prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    names |= {"encoder_hidden_states_mask": "prompt_embeds_mask"}
    arguments: dict[str, Any] = {}
    for name, values in given.items():
        plain = name.removeprefix("negative_")
        if plain in names:
            arguments[("negative_" if plain != name else "") + names[plain]] = values
    if "AuraFlow" in type(pipeline).__name__:
        mask = torch.ones(given["encoder_hidden_states"].shape[:2], dtype=torch.int64)
        arguments |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    arguments |= {"true_cfg_scale" if "true_cfg_scale" in takes else "guidance_scale": SCALE}
    arguments |= {"guidance_scale": float(given["guidance"][0])} if "guidance" in given else {}
    arguments |= {"use_resolution_binning": False} if "use_resolution_binning" in takes else {}
    arguments |= {name: None for name in ("prompt", "negative_prompt") if name in takes}
    packed = type(pipeline).__name__ in ("FluxPipeline", "QwenImagePipeline")
    height, width = noise.shape[-2:]
    arguments |= {"latents": pack(noise) if packed else noise, "height": 8 * height, "width": 8 * width}
    found = pipeline(**arguments, num_inference_steps=STEPS, output_type="latent", return_dict=False, **options)[0]
    return unpack(found, height // 2, width // 2) if packed else found


@dataclass(frozen=True)
class Case:
    """A pipeline: its network, scheduler, other parts, how it is called, and the size of the states."""

    cls: str
    network: Callable[[], Any]
    scheduler: Callable[[], Any]
    call: Callable[[Any, torch.Tensor, Given, dict[str, Any]], torch.Tensor]
    size: tuple[int, int] | None = (8, 8)
    tokens: int | None = 6
    guidance: float | None = SCALE
    vae: bool = False
    options: dict[str, Any] = field(default_factory=dict)


SD = partial(PNDMScheduler, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True)
XL = partial(EulerDiscreteScheduler, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
CASES = {
    "ddim": Case(
        "DDIMPipeline", unet, partial(DDPMScheduler, clip_sample=False), _unconditional, None, tokens=None, guidance=None
    ),
    "ddpm": Case(
        "DDPMPipeline", unet, partial(DDIMScheduler, clip_sample=False), _unconditional, None, tokens=None, guidance=None
    ),
    "dit": Case("DiTPipeline", dit, partial(DDIMScheduler, clip_sample=False), _dit, None, tokens=None, vae=True),
    "sd": Case("StableDiffusionPipeline", random_unet, SD, _text),
    "sdxl": Case("StableDiffusionXLPipeline", partial(random_unet, **SDXL), XL, _text, (8, 16)),
    "pixart": Case(
        "PixArtAlphaPipeline", partial(pixart, use_additional_conditions=False), DPMSolverMultistepScheduler, _text, (4, 8)
    ),
    "sd3": Case("StableDiffusion3Pipeline", sd3, FLOW, _text, (8, 4)),
    "flux": Case("FluxPipeline", partial(flux, guidance_embeds=True), DYNAMIC, _text, (8, 4)),
    "qwen-image": Case("QwenImagePipeline", qwen, DYNAMIC, _text, (4, 8)),
    "auraflow": Case("AuraFlowPipeline", auraflow, FLOW, _text, (4, 8)),
    "lumina2": Case("Lumina2Pipeline", lumina, FLOW, _text, (4, 8)),
    "sana": Case(
        "SanaPipeline",
        sana,
        partial(DPMSolverMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        _text,
        (4, 8),
    ),
    "cogvideox": Case(
        "CogVideoXPipeline",
        cogvideox,
        partial(CogVideoXDDIMScheduler, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False),
        _text,
        (4, 8),
        tokens=None,
        options={"num_frames": 9},
    ),
}


def saved(case: Case, path: Path) -> Path:
    """The case's pipeline directory."""
    torch.manual_seed(0)
    network, scheduler = redraw(case.network()), case.scheduler()
    folder = "unet" if "UNet" in type(network).__name__ else "transformer"
    path.mkdir(parents=True)
    (path / "model_index.json").write_text("{}")
    add_part(path, folder, network)
    add_part(path, "scheduler", scheduler)
    if case.vae:
        add_part(path, "vae", random_vae(latent_channels=4, scaling_factor=0.5))
    edit_json(path / "model_index.json", lambda index: index.update(_class_name=case.cls))
    return path


def opened(path: Path, cls: str) -> Any:
    """diffusers' pipeline of a directory; parts that it has not are None."""
    import transformers

    parts: dict[str, Any] = {}
    index = {}
    edit_json(path / "model_index.json", index.update)
    for name, entry in index.items():
        if isinstance(entry, list) and entry[1] is not None:
            library = {"diffusers": diffusers, "transformers": transformers}[entry[0]]
            parts[name] = getattr(library, entry[1]).from_pretrained(path / name)
    pipeline = getattr(diffusers, cls)
    others = [name for name in inspect.signature(pipeline.__init__).parameters if name not in ("self", *parts)]
    keep = ("force_zeros_for_empty_prompt",)
    made = pipeline(**parts, **{name: None for name in others if name not in keep})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_samples_are_the_pipelines(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = saved(case, tmp_path / "pipeline")
    backbone = load_backbone(path, size=case.size, tokens=case.tokens)
    requests = guided(backbone, case.guidance).draw_requests(COUNT, 3)
    noise = noise_for(backbone.sample_shape, 5, range(COUNT))
    if "time_ids" in requests:
        height, width = (8 * n for n in backbone.sample_shape[-2:])
        requests["time_ids"] = torch.tensor([[height, width, 0, 0, height, width]] * COUNT, dtype=torch.float32)
    if "guidance" in requests:
        requests["guidance"] = torch.full((COUNT,), 2.5)
    for one in [one for one in requests if one.endswith("mask")]:  # of every length, tokens first
        requests[one] = (torch.arange(requests[one].shape[1]) < torch.tensor([[4], [requests[one].shape[1]]])).long()
    requests.pop("guidance_scale", None)
    with torch.no_grad():
        expected = case.call(opened(path, case.cls), torch.from_numpy(noise), requests, case.options)
    options: dict[str, Any] = {"realisations": ["baked"], "plain": True, "quiet": True}
    bundle = export(
        tmp_path / "bundle", model=backbone, steps=STEPS, solver="scheduler", guidance_scale=case.guidance, **options
    )
    build(bundle, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    with Sampler.load(bundle.path) as sampler:
        given = {one: values.numpy() for one, values in requests.items()}
        found = sampler(COUNT, seed=5, requests=given, latents=not case.vae)
    if case.call in (_unconditional, _dit):
        found = np.clip(found / 2 + 0.5, 0, 1)
    assert found.shape == expected.shape and np.isfinite(found).all()
    assert relative(found, expected.numpy()) < 1e-4, relative(found, expected.numpy())
