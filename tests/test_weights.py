"""Weights as they lie in directories: all of them arrive and only those, or a line says which do not.

What arrives is compared, tensor by tensor, with what diffusers' and transformers' own ``from_pretrained`` gives.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from families import redraw, save_pipeline
from helpers import edit_json
from pipelines import add_part, add_t5, add_text, random_vae
from safetensors.torch import load_file, save_file
from test_unet2d_condition import random_unet, save

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import load_backbone
from mteo_deploy.exporters.decoder import load_decoder
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.text import _encoder

NAME = "diffusion_pytorch_model.safetensors"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )
    return save_pipeline(tmp_path_factory.mktemp("weights") / "pipeline", redraw(network), DDIMScheduler(), "unet")


@pytest.fixture
def unet(original: Path, tmp_path: Path) -> Path:
    """The network's directory, a copy to be altered."""
    return Path(shutil.copytree(original, tmp_path / "pipeline")) / "unet"


def with_old_names(state: State) -> State:
    def old(name: str) -> str:
        for new, before in OLD.items():
            name = name.replace(new, before)
        return name

    return {old(name): value for name, value in state.items()}


def alter(directory: Path, change: Callable[[State], State], file: str = NAME) -> State:
    """Rewrite a file of weights; what was in it before."""
    before = load_file(directory / file)
    save_file({name: value.contiguous() for name, value in change(dict(before)).items()}, directory / file)
    return before


def split(directory: Path, stem: str = NAME.removesuffix(".safetensors")) -> tuple[Path, Path, Path]:
    """Two shards and an index in place of the one file."""
    state = load_file(directory / f"{stem}.safetensors")
    (directory / f"{stem}.safetensors").unlink()
    names, paths = sorted(state), [directory / f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for half, path in zip(halves, paths, strict=True):
        save_file({name: state[name] for name in half}, path, metadata={"format": "pt"})
    places = {name: path.name for half, path in zip(halves, paths, strict=True) for name in half}
    index = directory / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return paths[0], paths[1], index


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == torch.float32 and torch.equal(value, b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64], ids=str)
@pytest.mark.parametrize("names", ["new", "old"])
def test_arrives_as_diffusers_reads_it(names: str, dtype: torch.dtype, unet: Path) -> None:
    before = alter(unet, lambda state: {name: value.to(dtype) for name, value in state.items()})
    if names == "old":
        alter(unet, with_old_names)
        assert any("proj_attn" in name for name in load_file(unet / NAME))
    found = load_backbone(unet.parent).network
    assert_same(found, UNet2DModel.from_pretrained(unet, torch_dtype=torch.float32, use_safetensors=True))
    assert all(torch.equal(found.state_dict()[name], value.to(dtype).float()) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_old_names_in_shards(dtype: torch.dtype, unet: Path) -> None:
    """diffusers converts them in single files alone; what a shard holds is as certain."""
    before = alter(unet, lambda state: with_old_names({name: value.to(dtype) for name, value in state.items()}))
    expected = UNet2DModel.from_pretrained(unet, torch_dtype=torch.float32, use_safetensors=True)
    split(unet)
    assert_same(load_backbone(unet.parent).network, expected)
    assert len(before) == len(expected.state_dict())


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_the_only_variant_is_read(variant: str, unet: Path) -> None:
    dtype = torch.float16 if variant == "fp16" else torch.bfloat16
    UNet2DModel.from_pretrained(unet).to(dtype).save_pretrained(unet, variant=variant)
    expected = UNet2DModel.from_pretrained(unet, variant=variant, torch_dtype=torch.float32)
    exact = load_file(unet / NAME)
    assert torch.equal(load_backbone(unet.parent).network.state_dict()["conv_in.weight"], exact["conv_in.weight"])  # not it
    (unet / NAME).unlink()
    assert_same(load_backbone(unet.parent).network, expected)


def drop(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


def beside(name: str, value: torch.Tensor) -> Callable[[State], State]:
    return lambda state: {**state, name: value}


def quantised(state: State) -> State:
    """As fp8 checkpoints for diffusion models have it."""
    weight = state["conv_in.weight"]
    scale = weight.abs().max() / 448
    return {**state, "conv_in.weight": (weight / scale).to(torch.float8_e4m3fn), "conv_in.scale_weight": scale}


ALTERED: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (drop("conv_out.bias"), r"1 missing \(conv_out\.bias\)"),
    "unexpected": (beside("conv_out.gain", torch.ones(1)), r"1 unexpected \(conv_out\.gain\)"),
    "compiled": (prefixed("_orig_mod."), r"_orig_mod\.' is of torch\.compile"),
    "parallel": (prefixed("module."), r"'module\.' is of DataParallel"),
    "single file": (prefixed("model.diffusion_model."), "from_single_file"),
    "transposed": (lambda s: {**s, "conv_in.weight": s["conv_in.weight"].transpose(0, 1)}, "shapes of its config"),
    "scale": (beside("conv_in.weight_scale", torch.ones(())), "quantised weights' scales.*dequantize"),
    "fp8": (quantised, "F8_E4M3 beside scales conv_in.scale_weight"),
    "int8": (lambda s: {**s, "conv_in.weight": s["conv_in.weight"].to(torch.int8)}, "conv_in.weight in .* is of type I8"),
    "int64": (lambda s: {**s, "conv_in.bias": s["conv_in.bias"].long()}, "conv_in.bias in .* is of type I64"),
    "complex": (lambda s: {**s, "conv_in.bias": s["conv_in.bias"].to(torch.complex64)}, "is of type C64"),
    "lora": (beside("conv_in.lora_A.default.weight", torch.ones(1)), "fuse_lora"),
    "empty": (lambda state: {}, "has no tensors"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_other_tensors_are_refused(what: str, unet: Path) -> None:
    change, line = ALTERED[what]
    alter(unet, change)
    with pytest.raises(InputError, match=line):
        load_backbone(unet.parent)


def test_a_counter_that_may_lie_beside(unet: Path) -> None:
    before = alter(unet, beside("mid_block.position_ids", torch.arange(4)[None]))
    assert all(torch.equal(load_backbone(unet.parent).network.state_dict()[name], value) for name, value in before.items())


def _raw(header: bytes | None, data: bytes = b"", length: int | None = None) -> Callable[[Path], object]:
    def write(file: Path) -> None:
        text = header or b""
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)

    return write


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
GAP = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
NEGATIVE = b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}'
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-4]), "bytes of tensors"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "bytes of tensors"),
    "nothing": (lambda file: file.write_bytes(b""), r"0 bytes, header of None"),
    "header of 2^60": (_raw(b"{}", length=1 << 60), "no whole safetensors file"),
    "twice": (_raw(TWICE, b"\0" * 4), "a twice in it"),
    "gap": (_raw(GAP, b"\0" * 8), "not where its header says"),
    "negative": (_raw(NEGATIVE, b"\0" * 4), "not where its header says"),
    "list": (_raw(b"[]"), "another JSON value"),
    "deep": (_raw(b"[" * 100_000), "fetch it again"),
    "unknown type": (_raw(GAP.replace(b"F32", b"Q4_0").replace(b"4,8", b"0,4"), b"\0" * 4), "is of type Q4_0"),
    "quantised by its metadata": (_raw(b'{"__metadata__":{"_quantization_metadata":"{}"}}'), "quantised, by its metadata"),
    "git-lfs": (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
    "a directory": (lambda file: (file.unlink(), file.mkdir()), "no regular file"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_not_whole(what: str, unet: Path) -> None:
    change, line = FILES[what]
    change(unet / NAME)
    with pytest.raises(InputError, match=line) as error:
        load_backbone(unet.parent)
    assert "\n" not in str(error.value) and "UNet2DModel weights" in str(error.value)


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "model.ckpt", "unet-Q4_0.gguf", "diffusion_pytorch_model.non_ema.safetensors"]
)
def test_other_formats_are_named(name: str, unet: Path) -> None:
    (unet / NAME).rename(unet / name)
    with pytest.raises(InputError, match=f"found {name}; .*save_pretrained"):
        load_backbone(unet.parent)


def test_two_variants_and_none(unet: Path) -> None:
    for variant in ("fp16", "bf16"):
        shutil.copy(unet / NAME, unet / f"diffusion_pytorch_model.{variant}.safetensors")
    (unet / NAME).unlink()
    with pytest.raises(InputError, match="keep one of the variants"):
        load_backbone(unet.parent)


def _twice(first: Path, second: Path, index: Path) -> None:
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: 2 * value}, second)


def _forgotten(first: Path, second: Path, index: Path) -> None:
    name = next(iter(load_file(first)))
    save_file(drop(name)(load_file(first)), first)


def _outside(first: Path, second: Path, index: Path) -> None:
    first.rename(first.parent.parent / "outside.safetensors")
    text = index.read_text().replace(first.name, "../outside.safetensors")
    index.write_text(text)


INDEXES: dict[str, tuple[Callable[[Path, Path, Path], object], str]] = {
    "a shard is absent": (lambda first, second, index: second.unlink(), "00002-of-00002.safetensors, not there"),
    "outside": (_outside, r"\.\./outside\.safetensors, outside the directory"),
    "in two files": (_twice, "lie in two files"),
    "not where the index says": (_forgotten, "and its files differ in"),
    "no map": (lambda first, second, index: index.write_text("{}"), "cannot be read"),
    "no metadata": (lambda first, second, index: edit_json(index, lambda data: data.pop("metadata")), "has no metadata"),
}


@pytest.mark.parametrize("what", INDEXES)
def test_shards_that_do_not_fit_their_index(what: str, unet: Path) -> None:
    change, line = INDEXES[what]
    change(*split(unet))
    with pytest.raises(InputError, match=line):
        load_backbone(unet.parent)


QUANTISED: dict[str, dict[str, Any]] = {
    "bitsandbytes, nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes, load_in_8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "quanto, int8": {"quant_method": "quanto", "weights_dtype": "int8"},
    "gguf": {"quant_method": "gguf", "compute_dtype": "bfloat16"},
    "torchao, int8wo": {"quant_method": "torchao", "quant_type": "int8wo"},
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("weights", [True, False])
def test_quantised_networks_are_named(method: str, weights: bool, unet: Path) -> None:
    edit_json(unet / "config.json", lambda config: config.update(quantization_config=QUANTISED[method]))
    with pytest.raises(InputError, match=rf"is quantised \({method}\); .*dequantize"):
        load_backbone(unet.parent, weights=weights)


def test_room_for_the_converted_copy(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small is told before, and one that fills while it is written."""
    state = alter(unet, lambda state: {name: value.half() for name, value in state.items()})
    wanted = f"{4 * sum(value.numel() for value in state.values()):,} bytes free where TMPDIR is"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 20, 1 << 20, 1000))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=f"{wanted}.*1,000 are free there; set TMPDIR"):
        load_backbone(unet.parent)
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", str(unet / "nowhere"))
    monkeypatch.setattr("tempfile.tempdir", str(unet / "nowhere"))
    with pytest.raises(InputError, match=f"{wanted}.*nowhere"):
        load_backbone(unet.parent)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with a VAE and SDXL's two text encoders, the second with a projection."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("parts") / "pipeline"
    path.mkdir()
    save(path, random_unet())
    add_part(path, "vae", random_vae())
    add_text(path, xl=True)
    return path


@pytest.fixture
def vae(parts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parts / "vae", tmp_path / "vae"))


@pytest.fixture
def encoder(parts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parts / "text_encoder_2", tmp_path / "text_encoder"))


def test_a_vae_with_old_names_in_half(vae: Path) -> None:
    """Stable Diffusion 1's own."""
    alter(vae, lambda state: with_old_names({name: value.half() for name, value in state.items()}))
    expected = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32)
    assert_same(load_decoder(vae, "AutoencoderKL", 2).vae, expected)


def test_a_vae_without_its_encoder(vae: Path) -> None:
    """What decodes is all there: the images are the same."""
    latents = torch.randn(1, 2, 8, 8)
    expected = load_decoder(vae, "AutoencoderKL", 2)
    alter(vae, lambda state: {n: v for n, v in state.items() if not n.startswith(("encoder.", "quant_conv."))})
    found = load_decoder(vae, "AutoencoderKL", 2)
    assert torch.equal(found(latents), expected(latents)) and found.to_json() == expected.to_json()
    assert not any(value.is_meta for value in found.parameters())
    alter(vae, lambda state: {**state, "decoder.conv_in.bias": state["decoder.conv_in.bias"] / 0})
    with pytest.raises(InputError, match=r"decoder\.conv_in\.bias have NaN or infinity"):
        load_decoder(vae, "AutoencoderKL", 2)
    alter(vae, drop("decoder.conv_out.bias"))
    with pytest.raises(InputError, match=r"1 missing \(decoder\.conv_out\.bias\)"):
        load_decoder(vae, "AutoencoderKL", 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_text_encoders_arrive_as_transformers_reads_them(dtype: torch.dtype, encoder: Path) -> None:
    alter(encoder, lambda state: {name: value.to(dtype) for name, value in state.items()}, "model.safetensors")
    cls = "CLIPTextModelWithProjection"
    expected = transformers.CLIPTextModelWithProjection.from_pretrained(encoder, dtype=torch.float32)
    assert_same(_encoder(encoder, cls), expected)
    alter(encoder, beside("text_model.embeddings.position_ids", torch.arange(77)[None]), "model.safetensors")
    alter(encoder, beside("visual_projection.weight", torch.ones(2, 2)), "model.safetensors")  # of a whole CLIP
    assert_same(_encoder(encoder, cls), expected)
    (encoder / "model.safetensors").rename(encoder / "model.fp16.safetensors")
    assert_same(_encoder(encoder, cls), expected)
    (encoder / "model.fp16.safetensors").rename(encoder / "model.safetensors")
    split(encoder, "model")
    assert_same(_encoder(encoder, cls), expected)


def _first(state: State, part: str) -> str:
    return next(name for name in sorted(state) if part in name)


TEXT: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (lambda s: drop(_first(s, "layers.1.mlp.fc1"))(s), r"1 missing \(.*layers\.1\.mlp\.fc1"),
    "no projection": (drop("text_projection.weight"), r"1 missing \(text_projection"),
    "unexpected": (beside("gain", torch.ones(1)), r"1 unexpected \(gain\)"),
    "compiled": (prefixed("_orig_mod."), "of torch.compile"),
    "shape": (lambda s: {**s, "text_projection.weight": torch.ones(3, 8)}, r"text_projection\.weight is \[3, 8\]"),
    "int8": (lambda s: {**s, "text_projection.weight": s["text_projection.weight"].to(torch.int8)}, "is of type I8"),
    "scale": (beside("text_projection.weight_scale", torch.ones(())), "quantised weights' scales"),
    "NaN": (lambda s: {**s, "text_projection.weight": s["text_projection.weight"] / 0}, r"text_projection\.weight have NaN"),
}


@pytest.mark.parametrize("what", TEXT)
def test_other_text_encoders_are_refused(what: str, encoder: Path) -> None:
    change, line = TEXT[what]
    alter(encoder, change, "model.safetensors")
    with pytest.raises(InputError, match=line):
        _encoder(encoder, "CLIPTextModelWithProjection")


def test_other_directories_of_text_encoders(encoder: Path) -> None:
    _, second, _ = split(encoder, "model")
    second.rename(encoder / "kept")
    with pytest.raises(InputError, match=r"names model-00002-of-00002\.safetensors, not there"):
        _encoder(encoder, "CLIPTextModelWithProjection")
    (encoder / "kept").rename(second)
    (encoder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="PEFT adapter"):
        _encoder(encoder, "CLIPTextModelWithProjection")
    (encoder / "adapter_config.json").unlink()
    edit_json(encoder / "config.json", lambda config: config.update(transformers_weights=second.name))
    with pytest.raises(InputError, match="names others in transformers_weights"):
        _encoder(encoder, "CLIPTextModelWithProjection")
    (encoder / "model.safetensors").symlink_to(encoder / "nowhere")  # transformers would take the shards
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read \(found no regular file\)"):
        _encoder(encoder, "CLIPTextModelWithProjection")
    edit_json(encoder / "config.json", lambda config: config.update(quantization_config=QUANTISED["gptq, 4 bits"]))
    with pytest.raises(InputError, match=r"quantised \(gptq, 4 bits\)"):
        _encoder(encoder, "CLIPTextModelWithProjection")


def test_tied_embeddings(tmp_path: Path) -> None:
    """T5's lie under either name, or both; as two different ones it is chance which arrives."""
    (tmp_path / "model_index.json").write_text("{}")
    add_t5(tmp_path, "", width=10)
    directory = tmp_path / "text_encoder"
    expected, state = transformers.T5EncoderModel.from_pretrained(directory), load_file(directory / "model.safetensors")
    shared, name = state["shared.weight"], "encoder.embed_tokens.weight"
    for change in (lambda s: {**drop("shared.weight")(s), name: shared}, beside("shared.weight", shared.clone())):
        alter(directory, change, "model.safetensors")
        assert_same(_encoder(directory, "T5EncoderModel"), expected)
    alter(directory, beside(name, 2 * shared), "model.safetensors")
    with pytest.raises(InputError, match="alike, which are one; they differ"):
        _encoder(directory, "T5EncoderModel")
    alter(directory, lambda s: drop(name)(drop("shared.weight")(s)), "model.safetensors")
    with pytest.raises(InputError, match=r"2 missing \(encoder\.embed_tokens"):
        _encoder(directory, "T5EncoderModel")


def test_what_a_manifest_says(unet: Path, tmp_path: Path) -> None:
    alter(unet, lambda state: with_old_names({name: value.half() for name, value in state.items()}))
    bundle = export(tmp_path / "bundle", model=unet.parent, steps=1, plain=True, realisations=["baked"], quiet=True)
    (found,) = bundle.manifest["weights"]["backbone"]
    assert found["types"] == {"F16": len(load_file(unet / NAME))} and found["variant"] is None and found["ignored"] == []
    assert found["renamed"] == sum(
        name.endswith((".weight", ".bias")) and any(o in name for o in OLD.values()) for name in load_file(unet / NAME)
    )
