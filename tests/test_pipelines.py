"""Pipeline directories as they are published: which classes, parts, fields and layouts are taken, and what is refused."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    Transformer2DModel,
    UNet2DModel,
    VQModel,
)
from families import redraw, save_pipeline
from helpers import edit_json
from networks import flux, pixart, qwen, sd3
from pipelines import add_clip, add_part, add_text, random_vae
from test_unet2d_condition import SDXL, random_unet, save

from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import families, load_backbone
from mteo_deploy.exporters.describe import describe
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.pipeline import load_pipeline
from mteo_deploy.exporters.taken import PIPELINES, taken
from mteo_deploy.exporters.text import TextEncoder, load_text_encoder

TEXTS = ["an astronaut", "", "the horse " * 300]


def small_unet(**options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    network = UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **options,
        }
    )
    return redraw(network)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Stable Diffusion pipeline directory without its other parts."""
    torch.manual_seed(0)
    return save(tmp_path / "sd", random_unet())


def index_of(model: Path, **fields: Any) -> Path:
    edit_json(model / "model_index.json", lambda index: index.update(fields))
    return model


def test_every_class_that_is_taken_is_a_pipeline_with_that_network() -> None:
    """In diffusers, with that part of that class, and the family has an adapter."""
    for name, kind in PIPELINES.items():
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert kind.family in str(parameters[kind.network].annotation) and kind.family in families()
        assert {*kind.outside, *kind.fields} <= {*parameters}, name
        assert kind.decoder is None or kind.decoder in parameters
        others = {*parameters} - {"self", "scheduler", kind.network, kind.decoder, *kind.outside, *kind.fields}
        assert all(one.startswith(("text_encoder", "tokenizer")) or one == "add_watermarker" for one in others), others


def test_lengths_of_prompts_are_the_pipelines_defaults() -> None:
    """What diffusers pads T5, UMT5, Gemma and Qwen to where nobody says anything."""
    modules = {"SanaPipeline": "sana", "AuraFlowPipeline": "auraflow", "Lumina2Pipeline": "lumina2", "FluxPipeline": "flux"}
    modules |= {"QwenImagePipeline": "qwen_image"}
    for name, module in modules.items():
        tokens = importlib.import_module(f"mteo_deploy.exporters.{module}").TOKENS
        assert tokens == inspect.signature(getattr(diffusers, name).__call__).parameters["max_sequence_length"].default, name
    from mteo_deploy.exporters import pixart, sd3

    for name, tokens in (
        ("PixArtAlphaPipeline", pixart.ALPHA_TOKENS),
        ("PixArtSigmaPipeline", pixart.SIGMA_TOKENS),
        ("StableDiffusion3Pipeline", sd3.T5_TOKENS),
    ):
        assert tokens == inspect.signature(getattr(diffusers, name).__call__).parameters["max_sequence_length"].default, name


OTHERS = {
    "QwenImageEditPipeline": (qwen, {}),
    "QwenImageLayeredPipeline": (qwen, {}),
    "FluxKontextPipeline": (flux, {}),
    "FluxControlPipeline": (flux, {}),
    "StableDiffusion3Img2ImgPipeline": (sd3, {}),
    "PixArtSigmaPAGPipeline": (pixart, {}),
    "DiffusionPipeline": (flux, {}),
    "MyPipeline": (flux, {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_are_refused_by_name(name: str, tmp_path: Path) -> None:
    network, options = OTHERS[name]
    path = save_pipeline(tmp_path / "pipeline", network(**options), DDIMScheduler())
    index_of(path, _class_name=name)
    with pytest.raises(InputError, match=rf"model_index.json names {name} .*--adapter mteo_deploy\.exporters\.\w+:\w+Adapter"):
        load_backbone(path)


def test_an_adapter_answers_for_the_pipeline(model: Path, tmp_path: Path) -> None:
    """With --adapter another class is taken; inspect and export say that nobody checked it, and what goes unused."""
    torch.manual_seed(0)
    network = random_unet(**SDXL | {"projection_class_embeddings_input_dim": 16 + 5 * 8})
    path = save(tmp_path / "refiner", network)
    index_of(path, _class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True)
    with pytest.raises(InputError, match="names StableDiffusionXLImg2ImgPipeline"):
        load_backbone(path)
    adapter = load_backbone(path, "mteo_deploy.exporters.unet2d_condition:UNet2DConditionAdapter")
    shapes = {request.name: request.shape for request in adapter.requests}
    assert shapes == {"encoder_hidden_states": (77, 12), "text_embeds": (16,), "time_ids": (5,)}
    found = describe(adapter)
    assert found["pipeline"] == {"class": "StableDiffusionXLImg2ImgPipeline", "checked": False}
    assert "the adapter answers" in found["left_out"]["requires_aesthetics_score"]
    arguments = ["inspect", "--model", str(path), "--adapter", "mteo_deploy.exporters.unet2d_condition:UNet2DConditionAdapter"]
    assert "StableDiffusionXLImg2ImgPipeline, not checked" in CliRunner().invoke(main, arguments).output
    assert describe(load_backbone(model))["pipeline"] == {"class": "StableDiffusionPipeline", "checked": True}


@pytest.mark.parametrize("name", [None, ["pipeline", "MyPipeline"], 3])
def test_indices_without_a_class(name: Any, model: Path) -> None:
    index_of(model, _class_name=name)
    with pytest.raises(InputError, match=r"names (no class|\[|3)"):
        load_backbone(model)


def test_a_network_of_code_of_its_own(model: Path) -> None:
    index_of(model, unet=["my_code", "UNet2DConditionModel"])
    with pytest.raises(InputError, match=r"names my_code.UNet2DConditionModel, code of its own, which is not run"):
        load_backbone(model)


def test_a_configuration_of_another_class_or_with_other_fields(model: Path) -> None:
    config = model / "unet" / "config.json"
    edit_json(config, lambda found: found.update(num_head_channels=8, new_option=None))
    with pytest.raises(InputError, match=r"UNet2DConditionModel .*found num_head_channels 8.*--leave-out num_head_channels"):
        load_backbone(model)
    assert load_backbone(model, leave_out=["num_head_channels"]).family == "UNet2DConditionModel"
    edit_json(config, lambda found: found.update(_class_name="UNet2DModel"))
    with pytest.raises(InputError, match=r"expected a UNet2DConditionModel in .*config.json.*found UNet2DModel"):
        load_backbone(model)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"unet_2": ["diffusers", "UNet2DConditionModel"]}, "unet_2"),
        ({"boundary_ratio": 0.875}, "boundary_ratio"),
        ({"expand_timesteps": True}, "expand_timesteps"),
        ({"prior": ["diffusers", "PriorTransformer"]}, "prior"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet"),
        ({"requires_aesthetics_score": True}, "requires_aesthetics_score"),
    ],
)
def test_what_may_change_images_is_refused_unless_left_out(entry: dict[str, Any], named: str, model: Path) -> None:
    index_of(model, **entry)
    with pytest.raises(InputError, match=rf"expected a StableDiffusionPipeline .*{named}.*--leave-out {named}"):
        load_backbone(model)
    assert load_pipeline(load_backbone(model, leave_out=[named])).left_out == {named: "left out with --leave-out"}
    done = CliRunner().invoke(main, ["inspect", "--model", str(model), "--leave-out", named])
    assert done.exit_code == 0 and f"left out   {named}" in done.output
    index_of(model, **dict.fromkeys(entry, False if named in ("expand_timesteps", "requires_aesthetics_score") else None))
    assert load_backbone(model).pipeline is not None  # what says nothing is nothing


def test_leave_out_of_what_is_needed_or_not_there(model: Path) -> None:
    with pytest.raises(InputError, match=r"a bundle can do without; found unet"):
        load_backbone(model, leave_out=["unet"])
    with pytest.raises(InputError, match=r"expected --leave-out of what .*found safety_cheker"):
        load_backbone(model, leave_out=["safety_cheker"])


def test_parts_outside_the_bundle_are_named(model: Path) -> None:
    """Known ones, which change nothing of what is sampled from a prompt."""
    index_of(
        model,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        image_encoder=[None, None],
        requires_safety_checker=True,
    )
    found = load_pipeline(load_backbone(model)).left_out
    assert set(found) == {"safety_checker", "feature_extractor"} and "blackened" in found["safety_checker"]


def test_a_controlnet_pipeline_needs_its_residuals(model: Path) -> None:
    index_of(model, _class_name="StableDiffusionControlNetPipeline", controlnet=["diffusers", "ControlNetModel"])
    with pytest.raises(InputError, match=r"StableDiffusionControlNetPipeline.*pass --controlnet"):
        load_backbone(model)
    found = load_backbone(model, controlnet=True)
    assert load_pipeline(found).left_out == {"controlnet": "its residuals are request inputs"}


def test_scheduler_configurations_are_mended_as_the_pipeline_mends_them(tmp_path: Path) -> None:
    """Stable Diffusion's own: steps_offset 1, no clip_sample, size 64 for old UNets; DDIM's converts any scheduler."""
    torch.manual_seed(0)
    network = random_unet()
    old = PNDMScheduler(steps_offset=0), DDIMScheduler(), DDPMScheduler(clip_sample=True)
    rest = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    for scheduler in old:
        path = save(tmp_path / type(scheduler).__name__, network)
        scheduler.save_pretrained(path / "scheduler")
        index_of(path, scheduler=["diffusers", type(scheduler).__name__])
        with pytest.warns(FutureWarning):
            own = StableDiffusionPipeline(
                unet=network, scheduler=type(scheduler).from_config(scheduler.config), requires_safety_checker=False, **rest
            )
        found = load_backbone(path).scheduler_config
        for name in ("steps_offset", "clip_sample"):
            assert found.get(name) == own.scheduler.config.get(name), (name, found)
    unet = small_unet()
    path = save_pipeline(tmp_path / "ddim", unet, DDPMScheduler(variance_type="fixed_large", steps_offset=2), "unet")
    index_of(path, _class_name="DDIMPipeline")
    converted = dict(DDIMPipeline(unet, DDPMScheduler.from_pretrained(path / "scheduler")).scheduler.config)
    found = load_backbone(path).scheduler_config
    assert found["_class_name"] == "DDIMScheduler" and found["steps_offset"] == 2 and "variance_type" not in found
    assert {name: converted[name] for name in found if not name.startswith("_")} == {
        name: value for name, value in found.items() if not name.startswith("_")
    }


def test_old_stable_diffusion_networks_have_64_latents(model: Path) -> None:
    config = model / "unet" / "config.json"
    edit_json(config, lambda found: found.update(_diffusers_version="0.6.0"))
    assert load_backbone(model).sample_shape == (2, 64, 64) and load_backbone(model, size=(8, 8)).sample_shape == (2, 8, 8)
    edit_json(config, lambda found: found.update(_diffusers_version="0.9.0"))
    assert load_backbone(model).sample_shape == (2, 8, 8)


def flat(path: Path) -> Path:
    """A pipeline directory with everything beside its index."""
    for part in ("unet", "scheduler"):
        for file in (path / part).iterdir():
            shutil.move(file, path / file.name)
        (path / part).rmdir()
    return path


def test_flat_layout(tmp_path: Path) -> None:
    """As google/ddpm-* have it: diffusers reads it, and here it is the same backbone."""
    path = save_pipeline(tmp_path / "model", small_unet(), DDPMScheduler(beta_end=0.03), "unet")
    expected = load_backbone(path).fingerprint(), load_backbone(path).levels
    assert isinstance(DDPMPipeline.from_pretrained(flat(path)).unet, UNet2DModel)
    found = load_backbone(path)
    assert found.fingerprint() == expected[0]
    np.testing.assert_array_equal([found.levels.high, found.levels.low], [expected[1].high, expected[1].low])
    assert CliRunner().invoke(main, ["inspect", "--model", str(path)]).exit_code == 0
    (path / "scheduler_config.json").unlink()
    with pytest.raises(InputError, match=r"expected the noise schedule at .*scheduler_config.json; found nothing there"):
        load_backbone(path)


@pytest.mark.filterwarnings("ignore")
def test_old_block_names(tmp_path: Path) -> None:
    """``UNetRes...`` of diffusers' first months are the blocks of today, as diffusers maps them."""
    path = save_pipeline(tmp_path / "model", small_unet(), DDPMScheduler(), "unet")
    expected = load_backbone(path)
    blocks = {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]}
    blocks |= {"up_block_types": ["UNetResAttnUpBlock2D", "UNetResUpBlock2D"]}
    edit_json(path / "unet" / "config.json", lambda config: config.update(blocks))
    found, state = load_backbone(path), torch.randn(2, 1, 8, 8)
    assert torch.equal(found.at_timestep(state, 300.0), expected.at_timestep(state, 300.0))


@pytest.mark.parametrize("pipeline", ["DiTPipeline", "PixArtAlphaPipeline"])
def test_network_classes_under_their_old_name(pipeline: str, tmp_path: Path) -> None:
    """``Transformer2DModel``, as facebook/DiT-* and PixArt-alpha/* name it, with the fields of that class."""
    small: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8}
    small |= {"num_layers": 1, "sample_size": 8}
    torch.manual_seed(0)
    dit = pipeline == "DiTPipeline"
    network = redraw(DiTTransformer2DModel(**small, num_embeds_ada_norm=10) if dit else pixart())
    path = save_pipeline(tmp_path / "model", network, DDIMScheduler())
    index_of(path, transformer=["diffusers", "Transformer2DModel"], _class_name=pipeline)
    expected = save_pipeline(tmp_path / "expected", network, DDIMScheduler())
    others = {"double_self_attention": False, "num_vector_embeds": None, "use_linear_projection": True}
    edit_json(path / "transformer" / "config.json", lambda config: config.update(_class_name="Transformer2DModel", **others))
    assert type(Transformer2DModel.from_pretrained(path / "transformer")) is type(network)
    found, same = load_backbone(path), load_backbone(expected)
    assert found.family == type(network).__name__ and found.source == "model"
    given, state = found.draw_requests(2, 1), torch.randn(2, 4, 8, 8)
    assert torch.equal(found.at_timestep(state, 300.0, **given), same.at_timestep(state, 300.0, **given))


def test_the_working_directory_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_pipeline(tmp_path / "model", small_unet(), DDPMScheduler(), "unet")
    monkeypatch.chdir(path)
    assert [load_backbone(Path(name)).source for name in (".", "./", "../model")] == ["model"] * 3
    monkeypatch.chdir(path / "unet")
    assert load_backbone(Path("..")).source == "model"


def test_latents_of_other_decoders(tmp_path: Path) -> None:
    """LDM's VQ-VAE: refused, unless the bundle is to give latents; it says so, and so does sample."""
    path = save_pipeline(tmp_path / "ldm", small_unet(in_channels=3, out_channels=3), DDIMScheduler(clip_sample=False), "unet")
    add_part(path, "vqvae", VQModel(block_out_channels=(8,), norm_num_groups=4))
    index_of(path, _class_name="LDMPipeline")
    run, bundle = CliRunner().invoke, tmp_path / "bundle"
    command = ["export", "--model", str(path), "--plain", "--steps", "1", "--realisation", "baked", "-q", "-o", str(bundle)]
    assert "found a VQModel; for a bundle that gives latents pass --latents" in run(main, command).stderr
    done = run(main, [*command, "--latents"])
    assert done.exit_code == 0, done.output
    assert "no decoder in the bundle: the vqvae (VQModel) was left out with --latents" in done.output
    assert "samples are latents" in Bundle.open(bundle).manifest["left_out"]["decoder"]
    assert "left out   decoder" in run(main, ["inspect", str(bundle)]).output
    build(bundle, engine="onnxruntime", threads=1, quiet=True)
    done = run(main, ["sample", str(bundle), "--num", "1", "-o", str(tmp_path / "one.npz"), "-q"])
    assert done.exit_code == 0 and "these are latents: the vqvae (VQModel)" in done.output, done.output


def with_length(path: Path, tokens: int, stored: int | None, number: str = "") -> None:
    """Give a CLIP encoder so many positions and its tokenizer such a length."""
    edit_json(path / f"tokenizer{number}" / "tokenizer_config.json", lambda config: config.update(model_max_length=stored))
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    cls = CLIPTextModelWithProjection if number else CLIPTextModel
    config = CLIPTextConfig.from_pretrained(path / f"text_encoder{number}")
    config.max_position_embeddings = tokens
    torch.manual_seed(2)
    cls(config).save_pretrained(path / f"text_encoder{number}")


@pytest.mark.filterwarnings("ignore:the prompt")
@pytest.mark.parametrize(("tokens", "xl"), [(16, False), (248, False), (16, True)])
def test_the_length_of_prompts_is_the_tokenizers(tokens: int, xl: bool, tmp_path: Path) -> None:
    """As diffusers' own pipeline pads and cuts."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    path = save(tmp_path / "pipeline", random_unet(**(SDXL if xl else {})))
    add_text(path, xl=xl)
    for number in ["", "_2"][: 1 + xl]:
        with_length(path, tokens, tokens, number)
    encoder = load_text_encoder(load_backbone(path))
    assert isinstance(encoder, TextEncoder) and encoder.to_json()["tokens"] == tokens
    parts: dict[str, Any] = {"tokenizer": CLIPTokenizer.from_pretrained(path / "tokenizer")}
    parts["text_encoder"] = CLIPTextModel.from_pretrained(path / "text_encoder")
    rest: dict[str, Any] = {"vae": None, "unet": None, "scheduler": None}
    with torch.no_grad():
        if xl:
            parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(path / "tokenizer_2")
            parts["text_encoder_2"] = CLIPTextModelWithProjection.from_pretrained(path / "text_encoder_2")
            expected = StableDiffusionXLPipeline(**parts, **rest).encode_prompt(TEXTS, device="cpu")[0]
        else:
            rest |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            expected = StableDiffusionPipeline(**parts, **rest).encode_prompt(TEXTS, "cpu", 1, False)[0]
    assert expected.shape[1] == tokens
    np.testing.assert_allclose(encoder.encode(TEXTS)["encoder_hidden_states"], expected, rtol=0, atol=1e-5)


def test_lengths_that_are_not_stored_or_do_not_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = save(tmp_path / "pipeline", random_unet())
    assert load_backbone(path).tokens == 77  # no tokenizer: as diffusers assumes
    assert load_backbone(path, tokens=20).requests[0].shape == (20, 12)
    add_text(path)
    with_length(path, 24, None)
    assert load_backbone(path).tokens == 24
    with_length(path, 24, 512)
    assert load_backbone(path).tokens == 24
    with pytest.raises(InputError, match=r"hidden_states of \[30, 12\].*found \[24, 12\]; pass --leave-out text_encoder"):
        load_text_encoder(load_backbone(path, tokens=30))
    edit_json(path / "text_encoder" / "config.json", lambda config: config.update(use_attention_mask=True))
    assert "use_attention_mask" in str(load_text_encoder(load_backbone(path)))


def test_clip_encoders_of_two_lengths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = save(tmp_path / "pipeline", random_unet(**SDXL))
    add_text(path, xl=True)
    with_length(path, 16, 16)
    with pytest.raises(InputError, match=r"CLIP text encoders of one length; found \[16, 77\]"):
        load_text_encoder(load_backbone(path))


def test_clip_of_another_length_before_t5(tmp_path: Path) -> None:
    """Stable Diffusion 3: the tokens of CLIP, then 256 of T5."""
    path = save_pipeline(tmp_path / "sd3", sd3(), diffusers.FlowMatchEulerDiscreteScheduler())
    add_clip(path, "", 4, 4)
    add_clip(path, "_2", 6, 6)
    assert load_backbone(path).tokens == 77 + 256
    for number in ("", "_2"):
        edit_json(path / f"tokenizer{number}" / "tokenizer_config.json", lambda config: config.update(model_max_length=20))
    found = load_backbone(path)
    assert found.tokens == 20 + 256
    encoder = load_text_encoder(found)
    assert isinstance(encoder, TextEncoder) and encoder.lengths == [20, 20]
    with pytest.raises(InputError, match="--tokens above"):
        load_text_encoder(load_backbone(path, tokens=20)) if (path / "text_encoder_3").is_dir() else _t5(path)


def _t5(path: Path) -> None:
    from pipelines import add_t5

    add_t5(path, "_3")
    load_text_encoder(load_backbone(path, tokens=20))


def test_what_decodes_is_the_pipelines(pipeline_model: Path) -> None:
    """Stable Diffusion divides by ``scaling_factor`` and knows no shift, whatever the VAE says."""
    decoder, latents = load_pipeline(load_backbone(pipeline_model)).decoder, torch.randn(1, 2, 8, 8)
    vae = AutoencoderKL.from_pretrained(pipeline_model / "vae")
    assert decoder is not None and vae.config.shift_factor == random_vae().config.shift_factor != 0
    with torch.no_grad():
        torch.testing.assert_close(decoder(latents), vae.decode(latents / vae.config.scaling_factor).sample)


def test_taken_lists_are_whole() -> None:
    assert {kind.family for kind in PIPELINES.values()} == {*families()}
    assert "StableDiffusionControlNetPipeline" not in taken("UNet2DConditionModel", controlnet=False)


def test_export_takes_leave_out(model: Path, tmp_path: Path) -> None:
    """From Python, with a directory; a backbone was loaded with or without it already."""
    index_of(model, boundary_ratio=0.9)
    found = export(
        tmp_path / "bundle", model=model, steps=1, plain=True, realisations=["baked"], leave_out=["boundary_ratio"], quiet=True
    )
    manifest = json.loads((found.path / "manifest.json").read_text())
    assert manifest["left_out"] == {"boundary_ratio": "left out with --leave-out"}
    assert manifest["backbone"]["pipeline"] == {"class": "StableDiffusionPipeline", "checked": True}
    with pytest.raises(InputError, match="give it to load_backbone"):
        export(tmp_path / "other", model=load_backbone(model, leave_out=["boundary_ratio"]), plain=True, leave_out=["x"])
