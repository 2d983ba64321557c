"""Classifier-free guidance: one call of the network on both branches, from torch to an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, UNet2DConditionModel
from helpers import relative
from test_requests import random_dit
from test_requests import random_unet as unet_with_classes
from test_unet2d_condition import SDXL, random_unet, save

from mteo_deploy import plan as plans
from mteo_deploy.benchmarking import bench
from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.distillation import Recipe, distill, run
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.choice import guidance_of, pretrained_set
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.guidance import GuidedAdapter, guided
from mteo_deploy.exporters.unet2d import UNet2DAdapter
from mteo_deploy.inspection import inspect
from mteo_deploy.profiling import profile
from mteo_deploy.realisations import NAMES
from mteo_deploy.requests import Request, draw_all, take_all
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.verification import verify

SCALE = 4.0
QUICK = Recipe(trajectories=16, iterations=8, batch=16, teacher_evaluations=8, lr=0.02)
NULL = 10
"""The label of no class in the tests' networks; a UNet does not know that it is."""


def dit(path: Path) -> None:
    random_dit().save_pretrained(path / "transformer")
    DDIMScheduler().save_pretrained(path / "scheduler")
    index = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **index}))


def unet(path: Path) -> None:
    DDPMPipeline(unet=unet_with_classes(num_class_embeds=NULL + 1), scheduler=DDPMScheduler()).save_pretrained(path)


def sdxl(path: Path) -> None:
    """One level: exported, it is half the work of the two in test_unet2d_condition.py."""
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=12,
        **SDXL,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save(path, network)


MODELS: dict[str, Callable[[Path], object]] = {
    "dit": dit,
    "unet": unet,
    "sd": lambda path: save(path, random_unet()),
    "sdxl": sdxl,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("guidance")
    torch.manual_seed(0)
    for name, make in MODELS.items():
        make(directory / name)
    return {name: directory / name for name in MODELS}


def null_class(name: str) -> int | None:
    return NULL if name == "unet" else None


@pytest.fixture(scope="module", params=["dit", "sdxl"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def adapter(name: str, models: dict[str, Path]) -> Adapter:
    return guided(load_backbone(models[name]), SCALE, null_class(name))


@pytest.fixture(scope="module")
def bundle(name: str, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built bundle of the plain iPNDM 2 solver, 3 steps, guided at 4."""
    path = tmp_path_factory.mktemp("bundles") / name
    options: dict[str, Any] = {"steps": 3, "solver": "ipndm-2", "plain": True, "guidance_scale": SCALE, "quiet": True}
    build(export(path, model=models[name], **options), engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    return path


def branches(inner: Adapter, given: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What both branches of a guided adapter get, written out: negative, positive."""
    positive = {r.name: given[r.name] for r in inner.requests}
    negative = {name: given.get(f"negative_{name}", values) for name, values in positive.items()}
    if "class_labels" in positive:
        negative["class_labels"] = torch.full_like(positive["class_labels"], NULL)
    return negative, positive


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_adapter_is_the_formula(kind: str, models: dict[str, Path]) -> None:
    """Scale 1 is the conditional network, 0 the negative branch, and each image has its own."""
    inner = load_backbone(models[kind])
    found = guided(inner, SCALE, null_class(kind))
    state, given = torch.randn(4, *inner.sample_shape), found.draw_requests(4, 1)
    assert given["guidance_scale"].tolist() == [SCALE] * 4
    assert [r.none for r in found.requests if r.name == "class_labels"] == [NULL] * ("class_labels" in given)
    given["guidance_scale"] = scale = torch.tensor([0.0, 1.0, 4.0, -2.0])
    negative, positive = (inner.at_timestep(state, 300.0, **one) for one in branches(inner, given))
    assert relative(negative.numpy(), positive.numpy()) > 1e-3
    output = found.at_timestep(state, 300.0, **given)
    torch.testing.assert_close(output[0], negative[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output[1], positive[1], rtol=1e-4, atol=1e-5)
    expected = negative + scale.view(-1, 1, 1, 1) * (positive - negative)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert found.fingerprint() == inner.fingerprint() and found.parameter_count == inner.parameter_count
    assert found.sites == inner.sites


def test_request_inputs(models: dict[str, Path]) -> None:
    """A constant, the same again, or a second input; and the scale with its default."""
    names = {kind: [r.name for r in guided(load_backbone(models[kind]), 2.0, null_class(kind)).requests] for kind in MODELS}
    prompt = "encoder_hidden_states"
    assert names == {
        "dit": ["class_labels", "guidance_scale"],
        "unet": ["class_labels", "guidance_scale"],
        "sd": [prompt, f"negative_{prompt}", "guidance_scale"],
        "sdxl": [prompt, "text_embeds", "time_ids", f"negative_{prompt}", "negative_text_embeds", "guidance_scale"],
    }


@torch.no_grad()
def test_diffusers_pipeline_guides_alike(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What DiTPipeline hands to its scheduler, for the states that it asked the network about."""
    adapter = load_backbone(models["dit"])
    vae = AutoencoderKL(latent_channels=1, block_out_channels=(4,), norm_num_groups=2)
    scheduler = DDIMScheduler()
    pipeline = DiTPipeline(transformer=adapter.network, vae=vae, scheduler=scheduler, id2label={})
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(DiTPipeline, "_execution_device", torch.device("cpu"))
    seen: list[tuple[torch.Tensor, int, torch.Tensor]] = []
    step = scheduler.step

    def record(output: torch.Tensor, timestep: torch.Tensor, state: torch.Tensor) -> Any:
        seen.append((output, int(timestep), state))
        return step(output, timestep, state)

    monkeypatch.setattr(pipeline.scheduler, "step", record)
    monkeypatch.setattr(pipeline.transformer.config, "num_embeds_ada_norm", NULL, raising=False)
    labels = [3, 7]
    generator = torch.Generator().manual_seed(0)
    # its own label for no class is 1000, ImageNet's: ours is asked for in its place
    embedding = [block.norm1.emb.class_embedder for block in adapter.network.transformer_blocks]
    hooks = [e.register_forward_pre_hook(lambda m, args: (args[0].clamp(max=NULL), *args[1:])) for e in embedding]
    pipeline(labels, guidance_scale=SCALE, generator=generator, num_inference_steps=1, output_type="np")
    for hook in hooks:
        hook.remove()
    ((output, timestep, state),) = seen
    found = guided(adapter, SCALE).at_timestep(
        state[:2], float(timestep), class_labels=torch.tensor(labels), guidance_scale=torch.full((2,), SCALE)
    )
    torch.testing.assert_close(found, output[:2, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("realisation", NAMES)
def test_states_equal_torch(realisation: str, bundle: Path, adapter: Adapter) -> None:
    """Each image at a scale of its own, none of them the default."""
    plan = pretrained_set(adapter, 3, "ipndm-2").plan
    noise, given = noise_for(adapter.sample_shape, 4, range(5)), adapter.draw_requests(5, 9)
    given["guidance_scale"] = torch.tensor([0.0, 1.0, 2.0, 5.0, 3.0])

    def network(i: int, state: torch.Tensor) -> torch.Tensor:
        return adapter.at_timestep(state, plan.evaluations[i].timestep, **given)

    with torch.no_grad():
        expected = plans.run(plan, torch.from_numpy(noise), network)
    sampler, arrays = Sampler.load(bundle, realisation=realisation), {key: v.numpy() for key, v in given.items()}
    found = sampler.states(noise, arrays)
    assert max(relative(a, b.numpy()) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert relative(np.asarray(sampler.conditioned_states(plan, noise, arrays)[-1]), expected[-1].numpy()) < 1e-4


def test_verify(bundle: Path) -> None:
    report = verify(bundle, seconds=0.1, quiet=True)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_prelude_holds_both_branches(bundle: Path, name: str) -> None:
    """It takes what both get, and not the scale; what crosses has one row for each image."""
    opened = Bundle.open(bundle)
    expected = {
        "dit": {"class_labels"},
        "sdxl": {
            *("encoder_hidden_states", "text_embeds", "time_ids"),
            *("negative_encoder_hidden_states", "negative_text_embeds"),
        },
    }
    assert set(opened.manifest["prelude"]["inputs"]) == expected[name]
    gone = ("norm1.linear", "class_embed", "time_emb_proj", "attn2.to_k", "attn2.to_v")
    for entry in [*opened.step_graphs, opened.realisations["table"], opened.realisations["fused"]]:
        assert not {*entry["inputs"]} & expected[name] and "guidance_scale" in entry["inputs"]
        graph = onnx.load(str(opened.file(entry["graph"])), load_external_data=False).graph
        assert not [tensor.name for tensor in graph.initializer if any(part in tensor.name for part in gone)]
        per_image = [value for value in graph.input if value.name not in ("evaluation", "table")]
        assert len({value.type.tensor_type.shape.dim[0].dim_param for value in per_image}) == 1
        assert per_image[0].type.tensor_type.shape.dim[0].dim_param


def test_one_prelude_serves_every_scale(bundle: Path) -> None:
    sampler = Sampler.load(bundle, realisation="baked")
    given = sampler.bundle.reference_requests(2)
    once = sampler.prepare(given)
    for scale in (1.0, 6.0):
        now = {**once, "guidance_scale": np.full(2, scale, np.float32)}
        state = noise_for(sampler.bundle.sample_shape, 0, range(2))
        found, _ = sampler.step(0, state, [], now)
        expected = sampler.states(
            state / np.float32(sampler.plan.initial_scale), {**given, "guidance_scale": now["guidance_scale"]}
        )
        np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-4)


def test_scale_has_a_default(bundle: Path) -> None:
    sampler = Sampler.load(bundle)
    given = {key: v for key, v in sampler.bundle.reference_requests(2).items() if key != "guidance_scale"}
    images = {scale: sampler(num=2, requests={**given, "guidance_scale": scale}) for scale in (SCALE, 1.0)}
    np.testing.assert_array_equal(sampler(num=2, requests=given), images[SCALE])
    assert relative(images[1.0], images[SCALE]) > 1e-3
    apart = sampler(num=2, requests={**given, "guidance_scale": [SCALE, 1.0]})
    np.testing.assert_allclose(apart, np.stack([images[SCALE][0], images[1.0][1]]), rtol=0, atol=1e-4)


def test_the_other_verbs(bundle: Path, tmp_path: Path) -> None:
    assert {"guidance_scale": SCALE}.items() <= {r["name"]: r["default"] for r in inspect(bundle)["requests"]}.items()
    text = CliRunner().invoke(main, ["inspect", str(bundle)]).output
    assert "guidance_scale (default 4)" in text
    assert profile(bundle, loops=2, quiet=True).layers
    assert bench([bundle], plain=True, num=2, seconds=0.1, quiet=True).rows(1)


@pytest.mark.parametrize("options", [{"batch": [2]}, {"passes": ["absorb"]}], ids=["fixed batch", "without hoist"])
def test_other_ways_to_export(options: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "b"
    export(path, model=models["dit"], steps=2, plain=True, guidance_scale=SCALE, quiet=True, **options)
    build(path, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    report = verify(path, seconds=0, quiet=True)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_distill_learns_under_guidance(models: dict[str, Path], tmp_path: Path) -> None:
    model, file = models["dit"], tmp_path / "e.safetensors"
    found = distill(model, file, steps=2, recipe=QUICK, guidance_scale=SCALE, quiet=True)
    assert found.training["error_after"] < found.training["error_before"]
    assert found.training["guidance"] == {"scale": SCALE, "null_class": None} and found.guidance == (SCALE, None)
    made = export(tmp_path / "b", model=model, embeddings=file, realisations=["baked"], quiet=True)
    assert made.requests[-1] == Request("guidance_scale", "float32", default=SCALE)
    build(made, engine="onnxruntime", realisation="baked", threads=1, quiet=True)
    assert verify(made.path, seconds=0, quiet=True).passed
    assert guidance_of(found, False, SCALE, None) == (SCALE, None)
    with pytest.raises(InputError, match=r"--guidance-scale as the embedding set was learned, at 4; found 2; leave it out"):
        export(tmp_path / "c", model=model, embeddings=file, guidance_scale=2.0, quiet=True)


def test_open_sizes(models: dict[str, Path], tmp_path: Path) -> None:
    """The graphs take shapes from the state alone; verify looks at a second size."""
    options: dict[str, Any] = {"plain": True, "steps": 1, "guidance_scale": SCALE, "null_class": NULL, "quiet": True}
    axes = ["batch", "height", "width"]
    path = export(tmp_path / "b", model=models["unet"], dynamic=axes, realisations=["baked"], **options)
    build(path, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    report = verify(tmp_path / "b", seconds=0, quiet=True)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert any("size" in check.name for check in report.checks)


def test_set_without_guidance_refuses_it(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["dit"]
    plain = pretrained_set(load_backbone(model), 2, "euler")
    with pytest.raises(
        InputError, match=r"as the embedding set was learned, without one; found 3; .*distill --guidance-scale 3"
    ):
        export(tmp_path / "c", model=model, embeddings=plain, guidance_scale=3.0, quiet=True)


def test_scale_is_in_the_checkpoints_key(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []

    def train(*args: Any) -> float:
        keys.append(next(a for a in args if isinstance(a, str)))
        return 0.0

    monkeypatch.setattr(run, "train", train)
    errors = []
    for scale in (None, 2.0, 3.0):
        tiny = Recipe(trajectories=1, iterations=1, batch=17, teacher_evaluations=8)
        found = distill(models["dit"], tmp_path / "e.safetensors", steps=2, recipe=tiny, guidance_scale=scale, quiet=True)
        errors.append(found.training["error_before"])
    assert len(set(keys)) == 3 and len(set(errors)) == 3


def test_command_line(bundle: Path, name: str, models: dict[str, Path], tmp_path: Path) -> None:
    if name != "dit":
        pytest.skip("labels")

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(main, [*arguments, "-q"])

    sample = ["sample", str(bundle), "--num", "2", "-o", str(tmp_path / "x.npz"), "--class-labels", "3"]
    found = []
    for scale in ([], ["--guidance-scale", "4"], ["--guidance-scale", "1.5"]):
        done = call(*sample, *scale)
        assert done.exit_code == 0, done.output
        found.append(np.load(tmp_path / "x.npz")["images"])
    np.testing.assert_array_equal(found[0], found[1])
    assert relative(found[2], found[0]) > 1e-3
    refused = call(*sample, "--guidance-scale", "nan")
    assert refused.exit_code == 2 and "'nan' is not a finite number" in refused.stderr
    model = ["--model", str(models["unet"]), "--steps", "2", "-o"]
    for arguments, message in [
        (["export", *model, str(tmp_path / "b"), "--plain", "--guidance-scale", "3"], "pass --null-class LABEL"),
        (["export", *model, str(tmp_path / "b"), "--plain", "--null-class", "3"], "--null-class with --guidance-scale only"),
        (["distill", *model, str(tmp_path / "e.safetensors"), "--guidance-scale", "3", "--null-class", "11"], "in [0, 11)"),
        (["distill", *model, str(tmp_path / "e.safetensors"), "--guidance-scale", "inf"], "'inf' is not a finite number"),
    ]:
        refused = call(*arguments)
        assert refused.exit_code == 2 and message in refused.stderr, refused.output


def test_what_cannot_be_guided(models: dict[str, Path]) -> None:
    unconditional = UNet2DAdapter(unet_with_classes(num_class_embeds=None), {"_class_name": "DDPMScheduler"})
    with pytest.raises(InputError, match="found an unconditional UNet2DModel"):
        guided(unconditional, 2.0)
    with pytest.raises(InputError, match="found a UNet2DConditionModel without; leave it out"):
        guided(load_backbone(models["sd"]), 2.0, 3)
    with pytest.raises(InputError, match="labels beside that of no class; found a UNet2DModel with 1"):
        guided(UNet2DAdapter(unet_with_classes(num_class_embeds=1), {"_class_name": "DDPMScheduler"}), 2.0, 0)
    assert guided(unconditional, None) is unconditional
    assert GuidedAdapter(load_backbone(models["dit"]), 2.0, 4).negatives["class_labels"] == 4


def test_values_with_a_default() -> None:
    scale, rows = Request("guidance_scale", "float32", default=3.0), Request("prompt", "float32", (2,))
    assert Request.from_json(scale.to_json()) == scale
    older = {key: value for key, value in rows.to_json().items() if key != "default"}
    assert Request.from_json(older) == rows
    np.testing.assert_array_equal(take_all([scale, rows], {"prompt": [1, 2]}, 2)["guidance_scale"], [3, 3])
    zeros = Request("negative_prompt", "float32", (2,), default=0.0)
    np.testing.assert_array_equal(take_all([zeros], {}, 3)["negative_prompt"], np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"guidance_scale too many; export with --guidance-scale"):
        take_all([rows], {"prompt": [1, 2], "guidance_scale": 3}, 1)
    drawn = draw_all([scale, rows], 4, 0, {"prompt": np.arange(6.0).reshape(3, 2), "guidance_scale": np.array([5.0])})
    assert set(drawn["guidance_scale"]) == {5} and len(np.unique(drawn["prompt"])) > 2
    with pytest.raises(InputError, match="as many values of each request input, or 1; found"):
        draw_all([scale, rows], 4, 0, {"prompt": np.ones((3, 2)), "guidance_scale": np.ones(2)})


def test_the_packaged_backbone_draws_the_label_it_is_asked_for(tmp_path: Path) -> None:
    """Named, exported with its own set and guided; images of one label are nearer to each other than to those of another."""
    bundle = export(tmp_path / "dit", model="mnist-dit", steps=4, realisations=["table"], quiet=True)
    assert bundle.manifest["embeddings"]["parameters"] == 2560 and bundle.manifest["backbone"]["parameters"] == 1_427_856
    build(bundle.path, engine="onnxruntime", realisation="table", threads=1, seconds=0.1, quiet=True)
    with Sampler.load(bundle.path) as sampler:
        labels = [0, 1] * 8
        images = sampler(num=16, seed=0, requests={"class_labels": labels})
        zeros, ones = images[0::2].mean(0), images[1::2].mean(0)
        again = sampler(num=16, seed=100, requests={"class_labels": labels})
    nearer = [np.mean((image - zeros) ** 2) < np.mean((image - ones) ** 2) for image in again]
    assert nearer == [label == 0 for label in labels]
    with pytest.raises(InputError, match=r"in mnist-dit; found euler-4.*--model mnist-dit"):
        export(tmp_path / "other", model="mnist-dit", steps=3, quiet=True)
