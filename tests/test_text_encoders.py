"""Text encoders beyond Stable Diffusion's: T5, UMT5, Gemma-2 and Qwen2.5-VL, each with the pipeline it belongs to, small and
random, against what diffusers' own pipeline makes of the same prompts."""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    Lumina2Pipeline,
    PixArtAlphaPipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
)
from families import redraw, save_pipeline
from helpers import edit_json, failed, relative
from networks import auraflow, cogvideox, flux, lumina, pixart, qwen, sana, sd3
from pipelines import add_clip, add_gemma, add_qwen, add_t5
from test_imports import BLOCK, python

from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.evaluate import evaluate
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.guidance import guided
from mteo_deploy.exporters.pipeline import load_pipeline
from mteo_deploy.exporters.text import TextEncoder, load_text_encoder, prompt_requests
from mteo_deploy.exporters.trace import trace_text_encoder
from mteo_deploy.prompts import encode
from mteo_deploy.sampler import Sampler
from mteo_deploy.verification import verify

TEXTS = ["An astronaut riding two  Cats ", "", "a castle & 日本 cafés", "the horse " * 60]
"""Words of the vocabulary and others, none, and too many."""
WIDTH = 10

INSTRUCTION = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
Values = dict[str, torch.Tensor]


def _pixart(pipeline: Any, texts: list[str], tokens: int) -> tuple[Values, Values]:
    options = {"negative_prompt": list(texts), "max_sequence_length": tokens, "device": "cpu"}
    hidden, mask, other, other_mask = pipeline.encode_prompt(texts, **options)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return dict(zip(names, (hidden, mask), strict=True)), dict(zip(names, (other, other_mask), strict=True))


def _sd3(pipeline: Any, texts: list[str], tokens: int) -> tuple[Values, Values]:
    options = {"negative_prompt": list(texts), "max_sequence_length": tokens - 77, "device": "cpu"}
    hidden, other, pooled, other_pooled = pipeline.encode_prompt(texts, None, None, **options)
    names = ("encoder_hidden_states", "pooled_projections")
    return dict(zip(names, (hidden, pooled), strict=True)), dict(zip(names, (other, other_pooled), strict=True))


def _flux(pipeline: Any, texts: list[str], tokens: int) -> tuple[Values, Values]:
    hidden, pooled, _ = pipeline.encode_prompt(texts, max_sequence_length=tokens, device="cpu")
    found = {"encoder_hidden_states": hidden, "pooled_projections": pooled}
    return found, found


def _unmasked(pipeline: Any, texts: list[str], tokens: int) -> tuple[Values, Values]:
    options = {"negative_prompt": list(texts), "max_sequence_length": tokens, "device": "cpu"}
    found = pipeline.encode_prompt(texts, **options)
    return {"encoder_hidden_states": found[0]}, {"encoder_hidden_states": found[len(found) // 2]}


def _sana(pipeline: Any, texts: list[str], tokens: int) -> tuple[Values, Values]:
    pipeline.encode_prompt = partial(pipeline.encode_prompt, complex_human_instruction=INSTRUCTION.split("\n"))
    return _pixart(pipeline, texts, tokens)


def _qwen(pipeline: Any, texts: list[str], tokens: int) -> tuple[Values, Values]:
    hidden, mask = pipeline.encode_prompt(texts, device="cpu", max_sequence_length=tokens)
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64) if mask is None else mask
    missing = tokens - hidden.shape[1]  # diffusers pads to the longest prompt, the bundle to one length
    hidden, mask = torch.nn.functional.pad(hidden, (0, 0, 0, missing)), torch.nn.functional.pad(mask, (0, missing))
    found = {"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask}
    return found, found


def _clip_pair(path: Path) -> None:
    add_clip(path, "", 4, 4)
    add_clip(path, "_2", 6, 6)


def _sd3_parts(path: Path) -> None:
    _clip_pair(path)
    add_t5(path, "_3")


def _flux_parts(path: Path) -> None:
    add_clip(path, "", WIDTH, None)
    add_t5(path, "_2")


def _template() -> str:
    return str(QwenImagePipeline(None, None, None, None, None).prompt_template_encode)


def _system() -> str:
    return str(Lumina2Pipeline(None, None, None, None, None).system_prompt)


@dataclass(frozen=True)
class Case:
    """A pipeline: its backbone, text encoders, length of a prompt and scheduler, and what it makes of prompts and negatives."""

    cls: type
    network: Callable[[], Any]
    parts: Callable[[Path], object]
    encoded: Callable[[Any, list[str], int], tuple[Values, Values]]
    tokens: int = 24
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)  # noqa: RUF009  # nobody changes it
    sampled: bool = True


CASES = {
    "pixart": Case(
        PixArtAlphaPipeline,
        partial(pixart, use_additional_conditions=True),
        partial(add_t5, width=WIDTH),
        _pixart,
        scheduler=DDIMScheduler(),
    ),
    "sd3": Case(StableDiffusion3Pipeline, sd3, _sd3_parts, _sd3, tokens=77 + 24),
    "sd3-without-t5": Case(StableDiffusion3Pipeline, sd3, _clip_pair, _sd3, tokens=77 + 24, sampled=False),
    "flux-dev": Case(FluxPipeline, partial(flux, guidance_embeds=True), _flux_parts, _flux),
    "cogvideox": Case(
        CogVideoXPipeline,
        partial(cogvideox, 24),
        partial(add_t5, width=WIDTH),
        _unmasked,
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
    ),
    "auraflow": Case(AuraFlowPipeline, auraflow, partial(add_t5, width=WIDTH, multilingual=True), _unmasked),
    "lumina2": Case(Lumina2Pipeline, partial(lumina, 80), lambda path: add_gemma(path, WIDTH, _system()), _pixart, tokens=64),
    "sana": Case(SanaPipeline, sana, lambda path: add_gemma(path, WIDTH, INSTRUCTION), _sana),
    "qwen-image": Case(QwenImagePipeline, qwen, lambda path: add_qwen(path, WIDTH, _template()), _qwen),
}
SAMPLED = [name for name, case in CASES.items() if case.sampled]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    case = CASES[request.param]
    path = save_pipeline(tmp_path_factory.mktemp("pipelines") / request.param, redraw(case.network()), case.scheduler)
    case.parts(path)
    return path


@pytest.fixture(scope="module")
def adapter(model: Path) -> Adapter:
    tokens = None if model.name == "cogvideox" else CASES[model.name].tokens
    return load_backbone(model, size=(4, 8), tokens=tokens)


@pytest.fixture(scope="module")
def encoder(adapter: Adapter) -> TextEncoder:
    found = load_text_encoder(adapter)
    assert isinstance(found, TextEncoder), found
    return found


def by_diffusers(model: Path, texts: list[str]) -> tuple[Values, Values]:
    """What diffusers' own pipeline makes of prompts, and of the same as negative prompts."""
    import diffusers
    import transformers

    case, parts = CASES[model.name], {}
    index = json.loads((model / "model_index.json").read_text())
    for name, found in index.items():
        if isinstance(found, list):
            parts[name] = getattr({"diffusers": diffusers, "transformers": transformers}[found[0]], found[1]).from_pretrained(
                model / name
            )
    optional = [name for name in inspect.signature(case.cls.__init__).parameters if name not in ("self", *parts)]
    pipeline = case.cls(**parts, **{name: None for name in optional if "require" not in name})
    with torch.no_grad():
        return case.encoded(pipeline, texts, case.tokens)


every = pytest.mark.parametrize("model", CASES, indirect=True)
ignored = pytest.mark.filterwarnings("ignore:the prompt")


@every
@ignored
def test_encoders_are_the_pipelines(model: Path, encoder: TextEncoder) -> None:
    """In torch and as a graph: of prompts and of negative ones, which some pipelines treat otherwise."""
    graph = trace_text_encoder(encoder)

    def run(feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(encoder.outputs, evaluate(graph, feeds) or [], strict=True))

    for negative, expected in enumerate(by_diffusers(model, TEXTS)):
        found = encoder.encode(TEXTS, bool(negative))
        again = encode(encoder.to_json(), encoder.tokenizers, run, TEXTS, bool(negative))
        assert found.keys() == again.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name].dtype == again[name].dtype == values.numpy().dtype
            np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5)
            np.testing.assert_allclose(again[name], values, rtol=0, atol=1e-4)
        hidden = found["encoder_hidden_states"]
        assert np.abs(hidden[0] - hidden[2]).max() > 1e-2 and np.abs(hidden).max() < 1e2


CODE = """
BLOCKED |= {"transformers", "huggingface_hub", "safetensors.torch", "sentencepiece"}
from mteo_deploy.cli import main

texts = ["--prompt", "two cats", "--prompt", "A Castle", "--negative-prompt", "the horse"]
main(["sample", sys.argv[1], *texts, "--num", "2", "-o", sys.argv[2], "-q", "--latents"], standalone_mode=False)
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}, BLOCKED & set(sys.modules)
"""


@pytest.mark.parametrize("model", SAMPLED, indirect=True)
def test_sample_from_prompts_without_torch(model: Path, adapter: Adapter, tmp_path: Path) -> None:
    """From text to states: as from the embeddings that diffusers' pipeline makes of the same prompts."""
    case = CASES[model.name]
    made = export(
        tmp_path / "bundle", model=adapter, steps=1, plain=True, guidance_scale=3.0, realisations=["baked"], quiet=True
    )
    build(made, engine="onnxruntime", threads=1, quiet=True)
    done = python(BLOCK + CODE, str(made.path), str(tmp_path / "states.npz"))
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "states.npz")["images"]
    positive, negative = by_diffusers(model, ["two cats", "A Castle"])[0], by_diffusers(model, ["the horse"] * 2)[1]
    given = {name: values.numpy() for name, values in positive.items()}
    given |= {f"negative_{name}": values.numpy() for name, values in negative.items()}
    given |= {"resolution": [32, 64], "aspect_ratio": [0.5]} if model.name == "pixart" else {}
    with Sampler.load(made.path) as sampler:
        expected = sampler(2, requests=given, latents=True)
        error = relative(found, expected)
        assert error < 1e-4
        given["encoder_hidden_states"] = given["encoder_hidden_states"][::-1]
        assert relative(sampler(2, requests=given, latents=True), expected) > 10 * max(error, 1e-6)  # one for another
    engines = ["onnxruntime", *(["openvino"] if importlib.util.find_spec("openvino") else [])]
    for engine in engines:
        if engine != "onnxruntime":
            build(made, engine=engine, threads=1, quiet=True)
        report = verify(made.path, engine=engine, seconds=0, quiet=True)
        assert report.passed, failed(report)
        assert {"text encoder", "tokenizer"} <= {check.name for check in report.checks}
    assert made.text_encoder is not None and made.text_encoder["tokens"] == (adapter.tokens or case.tokens)


@pytest.mark.parametrize("model", ["sana"], indirect=True)
def test_requests_to_learn_from(adapter: Adapter, encoder: TextEncoder) -> None:
    """Negative prompts have a template of their own, and a mask."""
    found = prompt_requests(guided(adapter, 3.0), ["two cats", "a castle", "two cats"])
    assert found["encoder_attention_mask"].shape == (3, 24)
    np.testing.assert_array_equal(found["encoder_hidden_states"][0], found["encoder_hidden_states"][2])
    other = encoder.encode([""], negative=True)
    np.testing.assert_array_equal(found["negative_encoder_hidden_states"][:1], other["encoder_hidden_states"])
    np.testing.assert_array_equal(found["negative_encoder_attention_mask"][:1], other["encoder_attention_mask"])


@pytest.mark.parametrize("model", ["sana"], indirect=True)
def test_long_negative_prompts_are_cut_with_a_warning(encoder: TextEncoder) -> None:
    for negative in (False, True):
        with pytest.warns(UserWarning, match=r"the horse.*longer than"):
            encoder.encode(["the horse " * 60], negative)


@pytest.mark.parametrize("model", ["pixart"], indirect=True)
def test_encoders_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    edit_json(index, lambda found: found["text_encoder"].__setitem__(1, "UMT5EncoderModel"))
    why = load_pipeline(load_backbone(tmp_path / "pipeline")).left_out["text encoder"]
    assert "UMT5EncoderModel are not supported for PixArtTransformer2DModel, which may have text_encoder: T5EncoderModel" in why
    edit_json(index, lambda found: found["text_encoder"].__setitem__(1, "T5EncoderModel"))
    (tmp_path / "pipeline" / "tokenizer" / "spiece.model").write_bytes(b"no model")
    with pytest.raises(InputError, match="expected a T5Tokenizer in"):
        load_text_encoder(load_backbone(tmp_path / "pipeline"))
