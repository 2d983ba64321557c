"""LoRA weights: read and fused by diffusers' own loaders before anything is traced."""

from __future__ import annotations

import re
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
from networks import flux, sana
from pipelines import add_text
from safetensors.torch import load_file, save_file
from test_unet2d_condition import SDXL, random_unet, save
from transformers import CLIPTextModel

from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.choice import pretrained_set
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.lora import Lora, Loras
from mteo_deploy.exporters.pipeline import load_pipeline
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
    wide = {name: torch.cat([v, v], -1) if ".lora_A." in name else v for name, v in state.items()}
    save_file(wide, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"expected LoRA weights for unet in .*b.safetensors; .*size mismatch"):
        load_backbone(model, loras=[Lora.parse(str(tmp_path / "b.safetensors"))])
    text = {name.replace("unet.", "text_encoder."): v for name, v in state.items()}
    save_file(text, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=r"SanaPipeline's text encoders; found text_encoder.down"):
        Loras("SanaPipeline", (Lora(tmp_path / "c.safetensors"),)).fuse_network("transformer", torch.nn.Module())
    shutil.copytree(model, tmp_path / "pipeline")
    edit_json(tmp_path / "pipeline" / "model_index.json", lambda index: index.update(_class_name="DiffusionPipeline"))
    adapter = "mteo_deploy.exporters.unet2d_condition:UNet2DConditionAdapter"
    with pytest.raises(InputError, match="loads LoRA weights for; found DiffusionPipeline"):
        load_backbone(tmp_path / "pipeline", adapter, loras=[Lora.parse(str(weights))])
    refused = CliRunner().invoke(main, ["inspect", "--model", str(model), "--lora", str(pickled)])
    assert refused.exit_code == 2 and "pickled files are not read" in " ".join(refused.output.split())


KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}


def kohya(state: dict[str, Any], prefix: str, alphas: tuple[float | None, ...]) -> dict[str, Any]:
    """The same weights as Kohya's scripts name them, layers in turn with one of ``alphas``."""
    found: dict[str, Any] = {}
    layers = sorted({name.partition(".lora_")[0] for name in state})
    for i, layer in enumerate(layers):
        named, alpha = prefix + layer.replace(".", "_"), alphas[i % len(alphas)]
        for half, other in KOHYA.items():
            found[f"{named}.{other}.weight"] = state[f"{layer}.{half}.weight"]
        if alpha is not None:
            found[f"{named}.alpha"] = torch.tensor(alpha)
    return found


def assert_added(fused: torch.nn.Module, base: torch.nn.Module, state: dict[str, Any], scales: tuple[float, ...]) -> None:
    """Weights are those of the base and, of each layer in turn, ``scale * B @ A``; the paper's own formula."""
    layers = sorted({name.partition(".lora_")[0] for name in state})
    before, after = base.state_dict(), fused.state_dict()
    assert before.keys() == after.keys()
    for i, layer in enumerate(layers):
        a, b = (state[f"{layer}.{half}.weight"].float() for half in KOHYA)
        before[f"{layer}.weight"] = before[f"{layer}.weight"] + scales[i % len(scales)] * (b @ a)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)


ALPHAS = {"one": (1.0,), "several": (1.0, 4.0, 3.0), "some": (4.0, None), "none": (None,)}


@pytest.mark.parametrize("alphas", ALPHAS)
def test_kohyas_names_and_alphas(alphas: str, model: Path, tmp_path: Path) -> None:
    """Of one alpha, as diffusers fuses them; of several, which diffusers mixes up, by the formula."""
    base = load_backbone(model)
    state = random_lora(base.network, 5, ("to_q", "to_out.0", "ff.net.2"))
    save_file(kohya(state, "lora_unet_", ALPHAS[alphas]), tmp_path / "kohya.safetensors")
    fused = load_backbone(model, loras=[Lora(tmp_path / "kohya.safetensors", SCALE)]).network
    assert_added(fused, base.network, state, tuple(SCALE * (2 if alpha is None else alpha) / 2 for alpha in ALPHAS[alphas]))
    if alphas in ("one", "none"):
        unet = UNet2DConditionModel.from_pretrained(model / "unet")
        found, networks, _ = StableDiffusionPipeline.lora_state_dict(
            str(tmp_path), weight_name="kohya.safetensors", return_lora_metadata=True
        )
        StableDiffusionPipeline.load_lora_into_unet(found, networks, unet)
        unet.fuse_lora(SCALE)
        unet.unload_lora()
        for name, value in unet.state_dict().items():
            torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_scale_zero(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    base = load_backbone(model)
    state = {name: value.to(dtype) for name, value in random_lora(base.network, 6).items()}
    save_file({f"unet.{name}": value for name, value in state.items()}, tmp_path / "half.safetensors")
    fused = load_backbone(model, loras=[Lora(tmp_path / "half.safetensors")]).network
    assert_added(fused, base.network, state, (1.0,))
    nothing = load_backbone(model, loras=[Lora(tmp_path / "half.safetensors", 0.0)]).network
    assert all(torch.equal(value, base.network.state_dict()[name]) for name, value in nothing.state_dict().items())


def test_pefts_own_configuration(model: Path, tmp_path: Path) -> None:
    """Alpha lies in the header of the file, as diffusers' scripts save it."""
    from peft import LoraConfig

    base, unet = load_backbone(model), UNet2DConditionModel.from_pretrained(model / "unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    config = {f"unet.{key}": value for key, value in unet.peft_config["default"].to_dict().items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "saved", state, unet_lora_adapter_metadata=unet.peft_config["default"].to_dict()
    )
    assert config["unet.lora_alpha"] == 6
    fused = load_backbone(model, loras=[Lora.parse(str(tmp_path / "saved"))]).network
    assert_added(fused, base.network, state, (3.0,))


def half_unknown(state: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("down_blocks.1", "down_blocks.3"): value for name, value in state.items()}


def one_of(state: dict[str, Any], part: str, change: Any) -> dict[str, Any]:
    first = next(name for name in sorted(state) if part in name)
    return {**state, first: change(state[first])}


UNFIT: dict[str, tuple[Any, str]] = {
    "layers of a relative": (half_unknown, r"matrices fit nowhere \(unet\.down_blocks\.3"),
    "NaN": (lambda s: one_of(s, "lora_A", lambda v: v * float("nan")), "that are finite; unet.down"),
    "infinity": (lambda s: one_of(s, "lora_B", lambda v: v / 0), "that are finite"),
    "one half": (lambda s: {n: v for n, v in s.items() if n != min(s)}, "belong to none"),
    "the other half": (lambda s: {n: v for n, v in s.items() if n != min(n for n in s if "lora_B" in n)}, "no other half"),
    "two ranks": (lambda s: one_of(s, "lora_A", lambda v: torch.cat([v, v])), "of one rank"),
    "transposed": (lambda s: {n: v.mT.contiguous() for n, v in s.items()}, "of one rank"),
    "DoRA": (lambda s: {**s, "unet.conv_in.dora_scale": torch.ones(1)}, "is of DoRA, which is not read"),
    "LoKr": (lambda s: {"lora_unet_conv_in.lokr_w1": torch.ones(1)}, "is of LoKr"),
    "LoHa": (lambda s: {"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "is of LoHa"),
    "LoCon": (lambda s: {**s, "lora_unet_conv_in.lora_mid.weight": torch.ones(1)}, "middle matrix"),
    "difference": (lambda s: {"lora_unet_conv_in.diff": torch.ones(1)}, "whole differences"),
    "a network": (lambda s: {"unet.conv_in.weight": torch.ones(1)}, "conv_in.weight is none"),
    "int8": (lambda s: one_of(s, "lora_A", lambda v: v.to(torch.int8)), "of type I8"),
    "empty": (lambda s: {}, "has no tensors"),
    "an encoder that is not there": (
        lambda s: {**s, **{n.replace("unet.", "text_encoder_2."): v.clone() for n, v in s.items()}},
        "text encoders that the pipeline has",
    ),
    "alpha of two": (lambda s: {**s, f"{min(s).partition('.lora_')[0]}.alpha": torch.ones(2)}, "no single number"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_weights_that_fit_in_part(what: str, model: Path, weights: Path, tmp_path: Path) -> None:
    change, line = UNFIT[what]
    state = load_file(weights / "pytorch_lora_weights.safetensors")
    save_file(change({name: value for name, value in state.items() if name.startswith("unet.")}), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=line) as error:
        load_backbone(model, loras=[Lora(tmp_path / "a.safetensors")])
    assert "\n" not in str(error.value) and "a.safetensors" in str(error.value)


def test_text_weights_that_fit_in_part(model: Path, both: Path, tmp_path: Path) -> None:
    state = load_file(both / "pytorch_lora_weights.safetensors")
    save_file({name.replace("layers.1", "layers.7"): value for name, value in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"text_encoder has in .*fit nowhere \(text_encoder\..*layers\.7"):
        load_text_encoder(load_backbone(model, loras=[Lora(tmp_path / "a.safetensors")]))


def test_text_weights_without_a_text_encoder_in_the_bundle(model: Path, both: Path, tmp_path: Path) -> None:
    """They are in the file and change the images: leaving them out is not silent."""
    shutil.copytree(model, tmp_path / "pipeline")
    edit_json(
        tmp_path / "pipeline" / "model_index.json",
        lambda index: index.update(text_encoder=["transformers", "RobertaModel"]),
    )
    adapter = load_backbone(tmp_path / "pipeline", loras=[Lora.parse(str(both))])
    with pytest.raises(InputError, match=r"no text encoder .*leave those out"):
        load_pipeline(adapter)


def test_kohyas_text_encoder(model: Path, tmp_path: Path) -> None:
    """Several alphas, by the formula; names of an older transformers."""
    adapter = load_backbone(model)
    base = CLIPTextModel.from_pretrained(model / "text_encoder")
    state = random_lora(base, 7, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"))
    named = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}
    unet = random_lora(adapter.network, 5)
    both = {**kohya(unet, "lora_unet_", (1.0,)), **kohya(named, "lora_te_", (1.0, 4.0, 6.0))}
    save_file(both, tmp_path / "kohya.safetensors")
    encoder = load_text_encoder(load_backbone(model, loras=[Lora(tmp_path / "kohya.safetensors")]))
    assert isinstance(encoder, TextEncoder)
    assert_added(encoder.encoders[0], base, state, (0.5, 2.0, 3.0))


def ldm(layer: str) -> str:
    """The name of a layer of attention in Stability's own SDXL, of one layer per block."""
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.attentions\.(\d)\.(.*)", layer)
    if found is None:
        return layer.replace("mid_block.attentions.0", "middle_block.1")
    at, rest = 2 * int(found[2]) + int(found[3]), found[4]
    return f"input_blocks.{at + 1}.1.{rest}" if found[1] == "down" else f"output_blocks.{at}.1.{rest}"


def test_sdxls_own_names(tmp_path: Path) -> None:
    """Kohya's, which need the network's configuration; beside diffusers' names, diffusers leaves them out."""
    torch.manual_seed(0)
    path = tmp_path / "pipeline"
    path.mkdir()
    save(path, random_unet(**SDXL))
    edit_json(path / "model_index.json", lambda index: index.update(_class_name="StableDiffusionXLPipeline"))
    base = load_backbone(path).network
    state = random_lora(base, 5, ("attn1.to_q", "attn2.to_k"))
    named = {f"{ldm(name.partition('.lora_')[0])}.lora_{name.partition('.lora_')[2]}": v for name, v in state.items()}
    save_file(kohya(named, "lora_unet_", (1.0,)), tmp_path / "sdxl.safetensors")
    assert_added(load_backbone(path, loras=[Lora(tmp_path / "sdxl.safetensors")]).network, base, state, (0.5,))
    more = {name: value.clone() for name, value in kohya(state, "lora_unet_", (1.0,)).items()}
    save_file({**kohya(named, "lora_unet_", (1.0,)), **more}, tmp_path / "twice.safetensors")
    with pytest.raises(InputError, match=r"leaves lora_unet_input_blocks_3_1.* out"):
        load_backbone(path, loras=[Lora(tmp_path / "twice.safetensors")])


def test_fluxs_joined_projections(tmp_path: Path) -> None:
    """One layer of Kohya's is three of diffusers'; one that diffusers leaves out without a word does not hide behind them."""
    torch.manual_seed(0)
    path = save_pipeline(tmp_path / "pipeline", redraw(flux()), FlowMatchEulerDiscreteScheduler())
    edit_json(path / "model_index.json", lambda index: index.update(_class_name="FluxPipeline"))
    base = load_backbone(path, size=(8, 8), tokens=6).network.state_dict()
    layer, width = "lora_unet_double_blocks_0_img_attn_qkv", 32
    pair = {f"{layer}.lora_down.weight": torch.randn(2, width), f"{layer}.lora_up.weight": torch.randn(3 * width, 2)}
    save_file({**pair, f"{layer}.alpha": torch.tensor(1.0)}, tmp_path / "flux.safetensors")
    fused = load_backbone(path, size=(8, 8), tokens=6, loras=[Lora(tmp_path / "flux.safetensors")]).network.state_dict()
    added = 0.5 * pair[f"{layer}.lora_up.weight"] @ pair[f"{layer}.lora_down.weight"]
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        weight = f"transformer_blocks.0.attn.{name}.weight"
        torch.testing.assert_close(fused[weight], base[weight] + added[i * width : (i + 1) * width], rtol=1e-5, atol=1e-6)
    other = {name.replace("unet_double_blocks_0_img_attn_qkv", "te3_block"): value.clone() for name, value in pair.items()}
    save_file({**pair, **other}, tmp_path / "t5.safetensors")
    with pytest.raises(InputError, match=r"leaves lora_te3_block\.lora_up\.weight out"):
        load_backbone(path, size=(8, 8), tokens=6, loras=[Lora(tmp_path / "t5.safetensors")])
