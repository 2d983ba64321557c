"""Prompts: a pipeline's CLIP text encoders and tokenizers in the bundle, from text to images without torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers import altered, edit_json, failed, relative
from pipelines import add_text
from test_imports import BLOCK, python
from test_unet2d_condition import SDXL, random_unet, save
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import load_backbone
from mteo_deploy.exporters.evaluate import evaluate
from mteo_deploy.exporters.guidance import guided
from mteo_deploy.exporters.pipeline import load_pipeline
from mteo_deploy.exporters.text import TextEncoder, load_text_encoder, prompt_requests
from mteo_deploy.exporters.trace import trace_text_encoder
from mteo_deploy.prompts import open_tokenizers, tokenise
from mteo_deploy.sampler import Sampler
from mteo_deploy.verification import verify

TEXTS = ["An astronaut riding two  cats", "", "a castle & 日本 cafés", "the horse " * 60]
"""Words of the vocabulary and others, none, and too many."""


@pytest.fixture(scope="module")
def xl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("xl") / "pipeline"
    path.mkdir()
    torch.manual_seed(0)
    save(path, random_unet(**SDXL))
    add_text(path, xl=True)
    return path


def encoder_of(model: Path) -> TextEncoder:
    found = load_text_encoder(load_backbone(model))
    assert isinstance(found, TextEncoder), found
    return found


def by_diffusers(model: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """What diffusers' own pipelines make of prompts."""
    parts: dict[str, Any] = {"tokenizer": CLIPTokenizer.from_pretrained(model / "tokenizer")}
    parts["text_encoder"] = CLIPTextModel.from_pretrained(model / "text_encoder")
    rest = {"vae": None, "unet": None, "scheduler": None}
    with torch.no_grad():
        if not (model / "text_encoder_2").is_dir():
            one = StableDiffusionPipeline(
                **parts, **rest, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
            found = one.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)
            return {"encoder_hidden_states": found[0].numpy()}
        parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(model / "tokenizer_2")
        parts["text_encoder_2"] = CLIPTextModelWithProjection.from_pretrained(model / "text_encoder_2")
        two = StableDiffusionXLPipeline(**parts, **rest, add_watermarker=False)
        hidden, _, pooled, _ = two.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
        return {"encoder_hidden_states": hidden.numpy(), "text_embeds": pooled.numpy()}


@pytest.mark.filterwarnings("ignore:the prompt")
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_encoders_are_diffusers(kind: str, pipeline_model: Path, xl_model: Path) -> None:
    model = pipeline_model if kind == "sd" else xl_model
    encoder, expected = encoder_of(model), by_diffusers(model, TEXTS)
    found = encoder.encode(TEXTS)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5)
        assert np.abs(values[0] - values[2]).max() > 1e-2, name


@pytest.mark.filterwarnings("ignore:the prompt")
def test_token_ids_are_the_slow_tokenizers(xl_model: Path) -> None:
    encoder = encoder_of(xl_model)
    tokens = tokenise(encoder.to_json(), encoder.tokenizers, TEXTS)
    for name, found in (("tokenizer", tokens["input_ids"]), ("tokenizer_2", tokens["input_ids_2"])):
        own = CLIPTokenizer.from_pretrained(xl_model / name)
        expected = own(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
        np.testing.assert_array_equal(found, expected)


def test_the_graph_of_two_encoders_equals_torch(xl_model: Path) -> None:
    encoder = encoder_of(xl_model)
    found = evaluate(trace_text_encoder(encoder), encoder.tokenise(TEXTS[:3]))
    assert found is not None
    for values, expected in zip(found, encoder.encode(TEXTS[:3]).values(), strict=True):
        assert relative(values, expected) < 1e-5


def test_sampler_reads_prompts(pipeline_bundle: Path, pipeline_model: Path) -> None:
    encoder = encoder_of(pipeline_model)
    positive, negative = (encoder.encode([text])["encoder_hidden_states"] for text in ("two cats", "a horse"))
    empty = encoder.encode([""])["encoder_hidden_states"]
    with Sampler.load(pipeline_bundle) as sampler:
        given = {"encoder_hidden_states": positive, "negative_encoder_hidden_states": negative}
        expected = sampler(2, requests=given)
        found = sampler(2, prompt="two cats", negative_prompt=["a horse"])
        assert relative(found, expected) < 1e-5
        plain = sampler(2, prompt="two cats")
        assert relative(plain, sampler(2, requests={**given, "negative_encoder_hidden_states": empty})) < 1e-5
        assert relative(plain, found) > 1e-3
        each = sampler(2, prompt=["two cats", "a castle"])
        assert relative(each[:1], plain[:1]) < 1e-5 and relative(each[1:], plain[1:]) > 1e-3
        scaled = sampler(2, prompt="two cats", requests={"guidance_scale": 1.0})
        assert relative(scaled, sampler(2, requests={**given, "guidance_scale": 1.0})) < 1e-5


def test_refused(pipeline_bundle: Path, tmp_path: Path) -> None:
    with Sampler.load(pipeline_bundle) as sampler:
        with pytest.raises(InputError, match="one --prompt for all images or one for each of 4; found 2"):
            sampler(4, prompt=["a", "b"])
        with pytest.raises(InputError, match="encoder_hidden_states from --prompt or --requests"):
            sampler(1, prompt="a", requests={"encoder_hidden_states": np.zeros((77, 12))})
        with pytest.raises(InputError, match="--negative-prompt with --prompt"):
            sampler(1, negative_prompt="a")
        with pytest.warns(UserWarning, match=r"the horse.*longer than 77 tokens"):
            sampler(1, prompt=TEXTS[3])

    def without(manifest: dict[str, Any]) -> None:
        manifest.update(text_encoder=None, left_out={"text encoder": "text_encoder: T5EncoderModel is not supported"})

    with pytest.raises(InputError, match=r"T5EncoderModel is not supported; pass --requests FILE"):
        open_tokenizers(Bundle.open(altered(pipeline_bundle, tmp_path / "bundle", without)))


def test_other_text_encoders_are_left_out(pipeline_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "pipeline"
    shutil.copytree(pipeline_model, model)
    edit_json(model / "model_index.json", lambda index: index["text_encoder"].__setitem__(1, "T5EncoderModel"))
    why = load_pipeline(load_backbone(model)).left_out["text encoder"]
    assert "text_encoder: T5EncoderModel are not supported for UNet2DConditionModel" in why
    with pytest.raises(InputError, match=r"T5EncoderModel.*pass --requests FILE"):
        prompt_requests(load_backbone(model), ["a"])
    edit_json(model / "model_index.json", lambda index: index["text_encoder"].__setitem__(1, "CLIPTextModel"))
    (model / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(InputError, match=r"expected a tokenizer .* in .*; found none"):
        load_text_encoder(load_backbone(model))
    shutil.rmtree(model / "text_encoder")
    assert "no directory text_encoder" in str(load_text_encoder(load_backbone(model)))
    assert load_text_encoder(load_backbone(model, leave_out=["text_encoder"])) == "left out with --leave-out"
    edit_json(model / "model_index.json", lambda index: index.update(text_encoder=[None, None]))
    assert load_text_encoder(load_backbone(model)) is None


def test_xl_sizes_and_zeros(xl_model: Path) -> None:
    """Sizes are the image's own; without a negative prompt the negative branch gets zeros, as SDXL's index says by default."""
    found = prompt_requests(guided(load_backbone(xl_model), 5.0), ["a horse", "a castle", "a horse"])
    assert found["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    assert found["encoder_hidden_states"].shape == (3, 77, 12) and found["text_embeds"].shape == (3, 16)
    assert not found["negative_encoder_hidden_states"].any() and not found["negative_text_embeds"].any()
    assert "negative_time_ids" not in found
    np.testing.assert_array_equal(found["text_embeds"][0], found["text_embeds"][2])


def test_distill_learns_from_a_file_of_prompts(pipeline_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("two cats\n\na castle\nan astronaut riding a horse\n")
    recipe = ["--trajectories", "8", "--iterations", "4", "--batch", "8", "--teacher-evaluations", "6", "--lr", "0.02", "-q"]
    output = str(tmp_path / "e.safetensors")
    arguments = ["distill", "--model", str(pipeline_model), "--steps", "2", "-o", output, *recipe, "--prompts"]
    done = CliRunner().invoke(main, [*arguments, str(tmp_path / "prompts.txt"), "--guidance-scale", "2", "--json"])
    assert done.exit_code == 0, done.output
    refused = CliRunner().invoke(main, [*arguments, str(tmp_path / "none.txt")])
    assert refused.exit_code == 2 and "a file of prompts, one a line" in refused.output
    with pytest.raises(InputError, match="--prompts or --requests; found both"):
        distill(
            pipeline_model, output, steps=2, recipe=Recipe(), prompts=["a"], requests={"encoder_hidden_states": np.zeros(1)}
        )


def test_verify_compares_the_text_encoder(pipeline_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = verify(pipeline_bundle, seconds=0, quiet=True)
    assert report.passed, failed(report)
    assert {"text encoder", "tokenizer"} <= {check.name for check in report.checks}
    encode = Sampler.encode
    monkeypatch.setattr(Sampler, "encode", lambda *a: {name: v + 0.01 for name, v in encode(*a).items()})
    monkeypatch.setattr("mteo_deploy.numerics.tokenise", lambda *a: {n: ids + (ids == 320) for n, ids in tokenise(*a).items()})
    assert failed(verify(pipeline_bundle, seconds=0, quiet=True)) == {"text encoder", "tokenizer"}


def test_sample_from_prompts_without_torch(pipeline_bundle: Path, tmp_path: Path) -> None:
    """The whole way from text to a grid of images, with tokenizers, numpy and the engine alone."""
    code = """
BLOCKED |= {"transformers", "huggingface_hub", "safetensors.torch"}
from mteo_deploy.cli import main

output = sys.argv[2]
prompts = ["--prompt", "two cats", "--prompt", "a castle", "--negative-prompt", "the horse", "--guidance-scale", "5"]
main(["sample", sys.argv[1], *prompts, "--num", "2", "-o", output, "-q"], standalone_mode=False)
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}, BLOCKED & set(sys.modules)
"""
    done = python(BLOCK + code, str(pipeline_bundle), str(tmp_path / "images.npz"))
    assert done.returncode == 0, done.stderr
    images = np.load(tmp_path / "images.npz")["images"]
    assert images.shape == (2, 3, 16, 16)
    with Sampler.load(pipeline_bundle) as sampler:
        given = {"prompt": ["two cats", "a castle"], "negative_prompt": "the horse", "requests": {"guidance_scale": 5.0}}
        assert relative(images, sampler(2, **given)) < 1e-5
    assert "prompts    CLIPTextModel" in CliRunner().invoke(main, ["inspect", str(pipeline_bundle)]).output
