"""LoRA weights: read and fused by diffusers' own loaders before anything is traced."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from families import engine_error, redraw, save_pipeline
from helpers import edit_json, relative
from networks import sana
from pipelines import add_text
from safetensors.torch import load_file, save_file
from test_unet2d_condition import random_unet, save
from transformers import CLIPTextModel

from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.choice import pretrained_set
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.lora import Lora, Loras
from mteo_deploy.exporters.text import TextEncoder, load_text_encoder

SCALE = 0.5


def random_lora(network: torch.nn.Module, seed: int, ends: tuple[str, ...] = ("to_q", "to_v", "to_out.0")) -> dict[str, Any]:
    """Weights of rank 2 for the layers whose names end so, none of them zero."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, module in network.named_modules():
        if name.endswith(ends) and isinstance(module, torch.nn.Linear):
            found[f"{name}.lora_A.weight"] = 0.5 * torch.randn(2, module.in_features, generator=generator)
            found[f"{name}.lora_B.weight"] = 0.5 * torch.randn(module.out_features, 2, generator=generator)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "pipeline"
    path.mkdir()
    torch.manual_seed(0)
    save(path, random_unet())
    add_text(path)
    return path


@pytest.fixture(scope="module")
def weights(model: Path) -> Path:
    """Of the UNet, as diffusers' training scripts save them."""
    unet = random_lora(UNet2DConditionModel.from_pretrained(model / "unet"), 1)
    StableDiffusionPipeline.save_lora_weights(model.parent / "weights", unet)
    return model.parent / "weights"


@pytest.fixture(scope="module")
def both(model: Path, weights: Path) -> Path:
    """Of the UNet the same, and of the text encoder."""
    unet = load_file(weights / "pytorch_lora_weights.safetensors")
    text = random_lora(CLIPTextModel.from_pretrained(model / "text_encoder"), 2, ("q_proj", "v_proj"))
    named = {f"text_encoder.{name}": values for name, values in text.items()}
    (model.parent / "both").mkdir()
    save_file({**unet, **named}, model.parent / "both" / "pytorch_lora_weights.safetensors")
    return model.parent / "both"


@pytest.fixture(scope="module")
def fused(model: Path, weights: Path) -> Adapter:
    return load_backbone(model, loras=[Lora.parse(f"{weights}:{SCALE}")])


def by_diffusers(model: Path, weights: Path) -> StableDiffusionPipeline:
    """The torch pipeline with the weights beside its own, not fused."""
    unet, text = UNet2DConditionModel.from_pretrained(model / "unet"), CLIPTextModel.from_pretrained(model / "text_encoder")
    none = {"vae": None, "tokenizer": None, "scheduler": None, "safety_checker": None, "feature_extractor": None}
    pipeline = StableDiffusionPipeline(unet=unet, text_encoder=text, requires_safety_checker=False, **none)
    pipeline.load_lora_weights(weights)
    pipeline.set_adapters(pipeline.get_active_adapters(), [SCALE])
    return pipeline


def test_the_fused_network_is_the_pipelines(model: Path, weights: Path, fused: Adapter) -> None:
    base, pipeline = load_backbone(model), by_diffusers(model, weights)
    state, given = torch.randn(3, *base.sample_shape), base.draw_requests(3, 1)
    with torch.no_grad():
        expected = pipeline.unet(state, 300, encoder_hidden_states=given["encoder_hidden_states"]).sample
        found, without = (one.at_timestep(state, 300.0, **given).numpy() for one in (fused, base))
    assert relative(found, expected.numpy()) < 1e-5 and relative(without, expected.numpy()) > 1e-2
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert fused.sites == base.sites and fused.fingerprint() != base.fingerprint()


def test_so_is_the_text_encoder(model: Path, both: Path) -> None:
    fused = load_backbone(model, loras=[Lora.parse(f"{both}:{SCALE}")])
    encoder, base = load_text_encoder(fused), load_text_encoder(load_backbone(model))
    assert isinstance(encoder, TextEncoder) and isinstance(base, TextEncoder)
    ids = torch.from_numpy(encoder.tokenise(["two cats"])["input_ids"])
    with torch.no_grad():
        expected = by_diffusers(model, both).text_encoder(ids).last_hidden_state.numpy()
    assert relative(encoder.encode(["two cats"])["encoder_hidden_states"], expected) < 1e-5
    assert relative(base.encode(["two cats"])["encoder_hidden_states"], expected) > 1e-2
    assert encoder.to_json()["parameters"] == base.to_json()["parameters"]


def test_two_are_added(model: Path, weights: Path, fused: Adapter) -> None:
    """Half of it twice is the whole of it once."""
    half = Lora.parse(f"{weights}:{SCALE}")
    twice, whole = load_backbone(model, loras=[half, half]), load_backbone(model, loras=[Lora.parse(str(weights))])
    for name, values in whole.network.state_dict().items():
        torch.testing.assert_close(twice.network.state_dict()[name], values)


def test_export(model: Path, weights: Path, fused: Adapter, tmp_path: Path) -> None:
    """The whole way: the engine equals the torch pipeline's network, and the manifest says what was fused."""
    lora, output = f"{weights}:{SCALE}", tmp_path / "bundle"
    arguments = ["export", "--model", str(model), "--plain", "--steps", "2", "--realisation", "baked", "-o", str(output), "-q"]
    done = CliRunner().invoke(main, [*arguments, "--lora", lora])
    assert done.exit_code == 0, done.output
    build(output, engine="onnxruntime", realisation="baked", threads=1, quiet=True)
    assert engine_error(output, "baked", fused) < 1e-4 and engine_error(output, "baked", load_backbone(model)) > 1e-2
    backbone = Bundle.open(output).manifest["backbone"]
    assert backbone["fingerprint"] == fused.fingerprint()
    assert backbone["loras"] == [Lora.parse(lora).to_json()] and backbone["loras"][0]["scale"] == SCALE
    for shown in (["inspect", str(output)], ["inspect", "--model", str(model), "--lora", lora]):
        assert "lora       pytorch_lora_weights.safetensors (0.5), fused" in CliRunner().invoke(main, shown).output
    with pytest.raises(InputError, match="made for backbone"):
        export(tmp_path / "other", model=fused, embeddings=pretrained_set(load_backbone(model), 2, "euler"), quiet=True)


def test_a_transformers_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = save_pipeline(tmp_path / "pipeline", redraw(sana()), FlowMatchEulerDiscreteScheduler(shift=3.0))
    edit_json(path / "model_index.json", lambda index: index.update(_class_name="SanaPipeline"))
    network = SanaTransformer2DModel.from_pretrained(path / "transformer")
    SanaPipeline.save_lora_weights(tmp_path / "weights", random_lora(network, 3))
    pipeline = SanaPipeline(None, None, None, SanaTransformer2DModel.from_pretrained(path / "transformer"), None)
    pipeline.load_lora_weights(tmp_path / "weights")
    base = load_backbone(path, size=(4, 8), tokens=6)
    fused = load_backbone(path, size=(4, 8), tokens=6, loras=[Lora.parse(str(tmp_path / "weights"))])
    state, given = torch.randn(2, 4, 4, 8), base.draw_requests(2, 1)
    with torch.no_grad():
        expected = pipeline.transformer(state, timestep=torch.full((2,), 300.0), return_dict=False, **given)[0].numpy()
        found, without = (one.at_timestep(state, 300.0, **given).numpy() for one in (fused, base))
    assert relative(found, expected) < 1e-5 and relative(without, expected) > 1e-2


def test_what_is_refused(model: Path, weights: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "lora.bin"
    pickled.write_bytes(b"")
    for text in (str(pickled), str(tmp_path / "none.safetensors"), str(tmp_path)):
        with pytest.raises(InputError, match=r"one safetensors file; found .*pickled"):
            Lora.parse(text)
    with pytest.raises(InputError, match="a finite scale"):
        Lora.parse(f"{weights}:nan")
    state = load_file(weights / "pytorch_lora_weights.safetensors")
    renamed = {name.replace("unet.", "transformer."): v for name, v in state.items() if name.startswith("unet.")}
    save_file(renamed, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"expected LoRA weights of unet in .*a.safetensors; found transformer.down"):
        load_backbone(model, loras=[Lora.parse(str(tmp_path / "a.safetensors"))])
    save_file({name: torch.cat([v, v], -1) for name, v in state.items()}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"expected LoRA weights for unet in .*b.safetensors"):
        load_backbone(model, loras=[Lora.parse(str(tmp_path / "b.safetensors"))])
    text = {name.replace("unet.", "text_encoder."): v for name, v in state.items() if name.startswith("unet.")}
    save_file(text, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=r"SanaPipeline's text encoders; found text_encoder.down"):
        Loras("SanaPipeline", (Lora(tmp_path / "c.safetensors"),)).fuse_network("transformer", torch.nn.Module())
    shutil.copytree(model, tmp_path / "pipeline")
    edit_json(tmp_path / "pipeline" / "model_index.json", lambda index: index.update(_class_name="DiffusionPipeline"))
    with pytest.raises(InputError, match="loads LoRA weights for; found DiffusionPipeline"):
        adapter = "mteo_deploy.exporters.unet2d_condition:UNet2DConditionAdapter"
        load_backbone(tmp_path / "pipeline", adapter, loras=[Lora.parse(str(weights))])
    refused = CliRunner().invoke(main, ["inspect", "--model", str(model), "--lora", str(pickled)])
    assert refused.exit_code == 2 and "pickled files are not read" in " ".join(refused.output.split())
