"""diffusers' UNet2DConditionModel: Stable Diffusion's and SDXL's kind, small and random, from torch to an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from families import check_checkpointing, engine_error
from helpers import relative

from mteo_deploy import plan as plans
from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.choice import pretrained_set
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.guidance import guided
from mteo_deploy.exporters.unet2d_condition import UNet2DConditionAdapter
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.verification import verify

SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}


def random_unet(**options: Any) -> UNet2DConditionModel:
    """Two levels; what the model starts with as zero is drawn too."""
    network = UNet2DConditionModel(
        sample_size=8,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        **{"in_channels": 2, "cross_attention_dim": 12, **options},
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def save(path: Path, network: UNet2DConditionModel) -> Path:
    network.save_pretrained(path / "unet")
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1).save_pretrained(
        path / "scheduler"
    )
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    pipeline = "StableDiffusionXLPipeline" if network.config.addition_embed_type else "StableDiffusionPipeline"
    (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **index}))
    return path


@pytest.fixture(scope="module", params=[{}, SDXL], ids=["sd", "sdxl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("conditional") / "pipeline", random_unet(**request.param))


@pytest.fixture(scope="module")
def adapter(model: Path) -> Adapter:
    return load_backbone(model)


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "conditional"
    build(export(path, model=model, steps=2, plain=True, quiet=True), engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    return path


def test_adapter_is_the_model(model: Path, adapter: Adapter) -> None:
    network = UNet2DConditionModel.from_pretrained(model / "unet", use_safetensors=True)
    state, given = torch.randn(3, 2, 8, 8), adapter.draw_requests(3, 1)
    pooled = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
    with torch.no_grad():
        prompt = given["encoder_hidden_states"]
        expected = network(state, 300, encoder_hidden_states=prompt, added_cond_kwargs=pooled).sample
        found = adapter.at_timestep(state, 300.0, **given)
        torch.testing.assert_close(found, expected)
        for name in given:
            other = adapter.at_timestep(state, 300.0, **{**given, name: given[name].flip(0)})
            assert relative(other.numpy(), expected.numpy()) > 1e-4, name
    assert [request.name for request in adapter.requests] == ["encoder_hidden_states", *pooled]


@pytest.mark.parametrize("realisation", NAMES)
def test_states_equal_torch(realisation: str, bundle: Path, adapter: Adapter) -> None:
    plan = pretrained_set(adapter, 2, "euler").plan
    noise, given = noise_for((2, 8, 8), 4, range(3)), adapter.draw_requests(3, 2)

    def network(i: int, state: torch.Tensor) -> torch.Tensor:
        return adapter.at_timestep(state, plan.evaluations[i].timestep, **given)

    with torch.no_grad():
        expected = plans.run(plan, torch.from_numpy(noise), network)
    found = Sampler.load(bundle, realisation=realisation).states(noise, {name: v.numpy() for name, v in given.items()})
    assert max(relative(a, b.numpy()) for a, b in zip(found, expected, strict=True)) < 1e-4


def test_the_prompt_is_read_once_per_request(bundle: Path, adapter: Adapter) -> None:
    """Keys and values of every cross-attention are the prelude's, once for all evaluations; the step graphs take no prompt."""
    opened = Bundle.open(bundle)
    prelude = onnx.load(str(opened.file(opened.manifest["prelude"]["graph"])), load_external_data=False).graph
    assert set(opened.manifest["prelude"]["inputs"]) == {request.name for request in adapter.requests}
    keys_and_values = [name for name, _ in adapter.network.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert keys_and_values and sum(n.op_type in ("MatMul", "Gemm") for n in prelude.node) >= len(keys_and_values)
    for entry in [*opened.step_graphs, opened.realisations["fused"]]:
        assert not set(entry["inputs"]) & {request.name for request in adapter.requests}
        graph = onnx.load(str(opened.file(entry["graph"])), load_external_data=False).graph
        gone = ("time_emb_proj", "time_embedding", "attn2.to_k", "attn2.to_v", "add_embedding")
        assert not [tensor.name for tensor in graph.initializer if any(part in tensor.name for part in gone)]


def test_verify(bundle: Path) -> None:
    report = verify(bundle, seconds=0, quiet=True)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_checkpointing(adapter: Adapter) -> None:
    check_checkpointing(adapter, by_block=True)
    check_checkpointing(guided(adapter, 3.0), by_block=True)


def test_distill_learns_from_given_prompts(model: Path, adapter: Adapter, tmp_path: Path) -> None:
    recipe = Recipe(trajectories=8, iterations=6, batch=8, teacher_evaluations=8, lr=0.02)
    np.savez(tmp_path / "prompts.npz", **{name: v.numpy() for name, v in adapter.draw_requests(5, 3).items()})
    found = distill(model, tmp_path / "e.safetensors", steps=2, recipe=recipe, requests=tmp_path / "prompts.npz", quiet=True)
    assert found.training["error_after"] < found.training["error_before"]
    with pytest.raises(InputError, match=r"encoder_hidden_states.*--requests FILE"):
        distill(model, tmp_path / "f.safetensors", steps=2, recipe=recipe, quiet=True)


def test_sample_takes_a_file_of_prompts(bundle: Path, adapter: Adapter, tmp_path: Path) -> None:
    def call(rows: int, name: str) -> Any:
        np.savez(tmp_path / name, **{key: v.numpy() for key, v in adapter.draw_requests(rows, 3).items()})
        arguments = [
            "sample",
            str(bundle),
            "--num",
            "2",
            "-o",
            str(tmp_path / "o.npz"),
            "-q",
            "--requests",
            str(tmp_path / name),
        ]
        return CliRunner().invoke(main, arguments)

    assert call(1, "one.npz").exit_code == 0 and call(2, "two.npz").exit_code == 0
    refused = call(3, "three.npz")
    assert refused.exit_code == 2 and "expected 1 or 2 values of shape [77, 12]" in refused.output
    (tmp_path / "no.npz").write_text("no npz")
    refused = CliRunner().invoke(main, ["sample", str(bundle), "--requests", str(tmp_path / "no.npz")])
    assert refused.exit_code == 2 and "numpy.savez" in refused.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"in_channels": 4}, "out_channels 2"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim 8"),
        ({"addition_embed_type": "text", "encoder_hid_dim": None}, "addition_embed_type 'text'"),
    ],
)
def test_other_kinds_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        UNet2DConditionAdapter(random_unet(**options), {"_class_name": "DDPMScheduler"})


def test_published_configuration() -> None:
    """Stable Diffusion 1.5 on the meta device: 22 sites of 1280, and the share of the parameters that baking removes."""
    with torch.device("meta"):
        network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    found = UNet2DConditionAdapter(network, {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"})
    assert [site.width for site in found.sites] == [1280] * 22
    gone = [p.numel() for name, p in network.named_parameters() if "time_emb" in name]
    assert found.parameter_count == 859_520_964 and round(sum(gone) / found.parameter_count, 3) == 0.032


@pytest.fixture(scope="module")
def controlled(model: Path) -> Adapter:
    return load_backbone(model, size=(8, 12), controlnet=True)


@torch.no_grad()
def residuals_of(controlled: Adapter, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a real ControlNet gives for a picture: of this network's shape, its outputs drawn at random instead of zero."""
    torch.manual_seed(5)
    network = ControlNetModel.from_unet(controlled.network, conditioning_embedding_out_channels=(4, 8))
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    pooled = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
    picture, state = torch.rand(3, 3, 16, 24), torch.randn(3, 2, 8, 12)
    down, middle = network(state, 300, given["encoder_hidden_states"], picture, added_cond_kwargs=pooled, return_dict=False)
    found = {f"down_block_additional_residual_{i}": values for i, values in enumerate(down)}
    return {**found, "mid_block_additional_residual": middle}


def test_residuals_of_a_controlnet(model: Path, controlled: Adapter) -> None:
    """Their shapes are a ControlNet's, and the network with them is diffusers'."""
    network = UNet2DConditionModel.from_pretrained(model / "unet", use_safetensors=True)
    given = controlled.draw_requests(3, 1)
    made = residuals_of(controlled, given)
    assert {name: tuple(values.shape[1:]) for name, values in made.items()} == {r.name: r.shape for r in controlled.residuals}
    given |= made
    pooled = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
    state, (*down, middle) = torch.randn(3, 2, 8, 12), made.values()
    with torch.no_grad():
        expected = network(
            state,
            300,
            encoder_hidden_states=given["encoder_hidden_states"],
            added_cond_kwargs=pooled,
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=middle,
        ).sample
        torch.testing.assert_close(controlled.at_timestep(state, 300.0, **given), expected)
        for name in made:
            other = controlled.at_timestep(state, 300.0, **{**given, name: given[name].roll(1, 0)})
            assert relative(other.numpy(), expected.numpy()) > 1e-4, name


def test_residuals_reach_the_engine(model: Path, controlled: Adapter, tmp_path: Path) -> None:
    """Under guidance both branches get the same; every realisation equals torch, verify passes."""
    made = export(tmp_path / "bundle", model=controlled, steps=2, plain=True, guidance_scale=3.0, quiet=True)
    build(made, engine="onnxruntime", realisation="table", threads=1, quiet=True)
    assert not [request for request in made.requests if request.name.startswith(("negative_down", "negative_mid"))]
    both = guided(controlled, 3.0)
    assert max(engine_error(made.path, realisation, both) for realisation in NAMES) < 1e-4
    report = verify(made.path, seconds=0, quiet=True)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_residuals_fix_the_size(model: Path, controlled: Adapter, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes other sizes"):
        export(tmp_path / "bundle", model=controlled, steps=1, plain=True, dynamic=["batch", "height", "width"], quiet=True)
    with pytest.raises(InputError, match="--controlnet with a UNet2DConditionModel; found a UNet2DModel"):
        load_backbone(tiny_model, controlnet=True)
    shown = CliRunner().invoke(main, ["inspect", "--model", str(model), "--controlnet"])
    assert "mid_block_additional_residual float32 [32, 4, 4]" in " ".join(shown.output.split())
