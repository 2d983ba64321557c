"""Request inputs: a class-conditional backbone from diffusers to images, with a prelude that runs once per request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from helpers import altered, relative

from mteo_deploy import plan as plans
from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.engines.build import build
from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.choice import pretrained_set
from mteo_deploy.exporters.export import export
from mteo_deploy.realisations import NAMES
from mteo_deploy.requests import Request, take_all
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.verification import verify

LABELS = Request("class_labels", "int64", high=10)


def random_unet(**options: Any) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        **{"num_class_embeds": 10, **options},
    )


def random_dit() -> DiTTransformer2DModel:
    """Two blocks; what the model starts with as zero is drawn too, else no label and no time would matter."""
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    return network


@pytest.fixture(scope="module", params=["UNet2DModel", "DiTTransformer2DModel"])
def class_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipeline directory of a small network with ten classes and random weights."""
    path: Path = tmp_path_factory.mktemp("classes") / "pipeline"
    torch.manual_seed(0)
    if request.param == "UNet2DModel":
        DDPMPipeline(unet=random_unet(), scheduler=DDPMScheduler()).save_pretrained(path)
        return path
    random_dit().save_pretrained(path / "transformer")
    DDIMScheduler().save_pretrained(path / "scheduler")
    index = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **index}))
    return path


def network_of(model: Path) -> Any:
    """diffusers' own network of a pipeline directory."""
    if (model / "unet").is_dir():
        return UNet2DModel.from_pretrained(model / "unet", use_safetensors=True)
    return DiTTransformer2DModel.from_pretrained(model / "transformer", use_safetensors=True)


@pytest.fixture(scope="module")
def class_adapter(class_model: Path) -> Adapter:
    return load_backbone(class_model)


@pytest.fixture(scope="module")
def class_bundle(class_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built bundle of the plain iPNDM 2 solver, 3 steps."""
    path = tmp_path_factory.mktemp("bundles") / "classes"
    build(
        export(path, model=class_model, steps=3, solver="ipndm-2", plain=True, quiet=True), threads=1, seconds=0.1, quiet=True
    )
    return path


def test_adapter_is_the_model(class_model: Path, class_adapter: Adapter) -> None:
    """With its own time embedding at every site the hooked network is the network."""
    network = network_of(class_model)
    state, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 7, 0])
    with torch.no_grad():
        expected = network(state, timestep=torch.full((3,), 300), class_labels=labels).sample[:, :1]
        found = class_adapter.at_timestep(state, 300.0, class_labels=labels)
        other = class_adapter.at_timestep(state, 300.0, class_labels=labels.flip(0))
    torch.testing.assert_close(found, expected)
    assert relative(other.numpy(), expected.numpy()) > 1e-3
    dit = Request("class_labels", "int64", high=11, none=10)
    assert class_adapter.requests == (LABELS if isinstance(network, UNet2DModel) else dit,)


@pytest.mark.parametrize("realisation", NAMES)
def test_states_equal_torch(realisation: str, class_bundle: Path, class_adapter: Adapter) -> None:
    plan = pretrained_set(class_adapter, 3, "ipndm-2").plan
    noise, labels = noise_for((1, 8, 8), 4, range(5)), np.array([3, 1, 4, 1, 5])

    def network(i: int, state: torch.Tensor) -> torch.Tensor:
        return class_adapter.at_timestep(state, plan.evaluations[i].timestep, class_labels=torch.from_numpy(labels))

    with torch.no_grad():
        expected = plans.run(plan, torch.from_numpy(noise), network)
    sampler = Sampler.load(class_bundle, realisation=realisation)
    found = sampler.states(noise, {"class_labels": labels})
    assert max(relative(a, b.numpy()) for a, b in zip(found, expected, strict=True)) < 1e-4
    conditioned = sampler.conditioned_states(plan, noise, {"class_labels": labels})
    assert relative(np.asarray(conditioned[-1]), expected[-1].numpy()) < 1e-4


@pytest.mark.parametrize("realisation", NAMES)
def test_verify(realisation: str, class_bundle: Path) -> None:
    report = verify(class_bundle, realisation=realisation, seconds=0.1, quiet=True)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_prelude_holds_the_projections_once(class_bundle: Path, class_adapter: Adapter) -> None:
    """One product per site for all evaluations together; the step graphs take neither labels nor projections."""
    bundle = Bundle.open(class_bundle)
    prelude = onnx.load(str(bundle.file(bundle.manifest["prelude"]["graph"])), load_external_data=False)
    assert sum(node.op_type in ("Gemm", "MatMul") for node in prelude.graph.node) == len(class_adapter.sites)
    assert bundle.manifest["prelude"]["inputs"] == ["class_labels"]
    outputs = bundle.manifest["prelude"]["outputs"]
    assert outputs == [f"step_{i:02}/request/packed" for i in range(3)]  # one tensor for each evaluation
    for entry in [*bundle.step_graphs, bundle.realisations["table"], bundle.realisations["fused"]]:
        assert "class_labels" not in entry["inputs"]
        graph = onnx.load(str(bundle.file(entry["graph"])), load_external_data=False).graph
        dead = ("time_emb_proj", "class_emb", "norm1.linear", "proj_out_1")
        assert not [tensor.name for tensor in graph.initializer if any(part in tensor.name for part in dead)]
    onnx.checker.check_model(str(bundle.file(bundle.manifest["prelude"]["graph"])), full_check=True)
    sites = bundle.manifest["compiler"]["sites"]
    details = {text for site in sites for where in site["constants"].values() for text in where.values()}
    assert details == {"hoisted: meets class_labels before its layer"}


def test_without_hoist_the_graphs_take_the_labels(class_model: Path, class_bundle: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 3, "solver": "ipndm-2", "plain": True, "quiet": True}
    bundle = export(tmp_path / "b", model=class_model, passes=["absorb"], **options)
    assert bundle.manifest["prelude"] is None
    build(bundle, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    for realisation in NAMES:
        images = [
            Sampler.load(p, realisation=realisation)(num=3, seed=2, requests={"class_labels": 5})
            for p in (bundle.path, class_bundle)
        ]
        assert relative(images[0], images[1]) < 1e-4


def test_labels_matter_and_belong_to_their_image(class_bundle: Path) -> None:
    sampler = Sampler.load(class_bundle)
    one, other = sampler(num=3, seed=1, requests={"class_labels": 2}), sampler(num=3, seed=1, requests={"class_labels": [3]})
    assert relative(one, other) > 1e-3
    mixed = sampler(num=3, seed=1, batch=2, requests={"class_labels": [2, 3, 2]})
    np.testing.assert_allclose(mixed, np.stack([one[0], other[1], one[2]]), rtol=0, atol=1e-4)


def test_distill_lowers_the_error(class_model: Path, tmp_path: Path) -> None:
    recipe = Recipe(trajectories=16, iterations=8, batch=16, teacher_evaluations=8, lr=0.02)
    found = distill(class_model, tmp_path / "e.safetensors", steps=2, recipe=recipe, quiet=True)
    assert found.training["error_after"] < found.training["error_before"]
    bundle = export(tmp_path / "b", model=class_model, embeddings=found, quiet=True)
    build(bundle, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    assert verify(bundle.path, seconds=0, quiet=True).passed


@pytest.mark.parametrize("steps", [1, 2])
def test_packed_with_a_fixed_batch(steps: int, class_model: Path, class_adapter: Adapter, tmp_path: Path) -> None:
    """Graphs for one batch size, and of one step alone, pack as open ones do."""
    path = tmp_path / "bundle"
    export(path, model=class_model, steps=steps, plain=True, batch=[2], quiet=True)
    build(path, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    bundle = Bundle.open(path)
    assert [entry["inputs"] for entry in bundle.step_graphs] == [["state", "request/packed"]] * steps
    assert verify(path, seconds=0, quiet=True).passed


def test_other_sizes(class_model: Path, class_adapter: Adapter, tmp_path: Path) -> None:
    """A UNet takes them, with a prelude too; a DiT has position embeddings of one size, and says so."""
    options: dict[str, Any] = {"steps": 2, "plain": True, "realisations": ["baked"], "quiet": True}
    if class_adapter.size_multiple is None:
        with pytest.raises(InputError, match=r"DiTTransformer2DModel takes 8x8 only .* leave height and width out"):
            export(tmp_path / "b", model=class_model, dynamic=["batch", "width"], **options)
        with pytest.raises(InputError, match="found 8x10; DiTTransformer2DModel takes no other"):
            export(tmp_path / "b", model=class_model, **options).shape_at((8, 10))
        return
    bundle = export(tmp_path / "b", model=class_model, dynamic=["batch", "width"], **options)
    assert bundle.manifest["prelude"] is not None
    build(bundle, engine="onnxruntime", threads=1, quiet=True)
    report = verify(bundle.path, seconds=0, quiet=True)
    assert report.passed and "size 8x12" in {check.name for check in report.checks}
    with pytest.raises(InputError, match="since height of this bundle are fixed"):
        bundle.shape_at((10, 8))


def test_command_line(class_bundle: Path, tmp_path: Path) -> None:
    def call(*labels: str) -> Any:
        arguments = ["sample", str(class_bundle), "--num", "4", "-o", str(tmp_path / "x.npz"), "-q", *labels]
        return CliRunner().invoke(main, arguments)

    assert call("--class-labels", "0,1,2,3").exit_code == 0
    for labels, message in [
        ([], "class_labels missing"),
        (["--class-labels", "12"], "found [12]"),
        (["--class-labels", "1,2"], "expected 1 or 4 values for class_labels"),
        (["--class-labels", "cat"], "expected --class-labels as integers"),
    ]:
        result = call(*labels)
        assert result.exit_code == 2 and message in result.stderr, result.stderr


def test_values_are_taken_or_refused() -> None:
    np.testing.assert_array_equal(LABELS.take(3, 2), [3, 3])
    np.testing.assert_array_equal(LABELS.take([3, 4], 2), [3, 4])
    assert LABELS.take([3], 2).dtype == np.int64
    vector = Request("pooled", "float32", (4,))
    assert vector.take(np.ones(4), 3).shape == (3, 4)
    for wrong in ([1, 2, 3], [0.5], [-1], [[1, 2]]):
        with pytest.raises(InputError):
            LABELS.take(wrong, 2)
    with pytest.raises(InputError, match=r"takes|each of: class_labels; found guidance too many"):
        take_all([LABELS], {"class_labels": 1, "guidance": 2}, 1)
    with pytest.raises(InputError, match="no request inputs; found class_labels too many"):
        take_all([], {"class_labels": 1}, 1)


def test_broken_manifest_entry(class_bundle: Path, tmp_path: Path) -> None:
    path = altered(class_bundle, tmp_path / "b", lambda manifest: manifest["requests"][0].pop("dtype"))
    with pytest.raises(BundleError, match=r"`dtype`.*requests\[0\]"):
        build(path, engine="onnxruntime", threads=1, quiet=True)


def test_other_class_embeddings_are_refused(tmp_path: Path) -> None:
    network = random_unet(num_class_embeds=None, class_embed_type="identity")
    DDPMPipeline(unet=network, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="found class_embed_type 'identity'"):
        load_backbone(tmp_path / "model")


MASK = Request("encoder_attention_mask", "int64", (7,), high=2, mask=True)


def test_a_mask_is_drawn_as_prompts_have_them() -> None:
    """Tokens first, one at least, then padding; of many lengths."""
    found = MASK.draw(64, 0)
    assert found.dtype == np.int64 and set(np.unique(found)) == {0, 1}
    assert (np.diff(found, axis=1) <= 0).all() and (found[:, 0] == 1).all()
    assert set(found.sum(axis=1)) == set(range(1, 8))


@pytest.mark.parametrize("none", [0, 3, 4])
def test_no_class_is_never_drawn(none: int) -> None:
    """The others are, and the label may still be asked for."""
    labels = Request("class_labels", "int64", high=5, none=none)
    assert set(labels.draw(200, 0)) == set(range(5)) - {none} and labels.take(none, 1) == none
    assert Request.from_json(labels.to_json()) == labels


def test_a_mask_says_so_in_a_bundle() -> None:
    assert Request.from_json(MASK.to_json()) == MASK
    older = {name: value for name, value in LABELS.to_json().items() if name not in ("mask", "none")}
    assert Request.from_json(older) == LABELS and not LABELS.mask
