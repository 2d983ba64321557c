"""Fake quantisation: torch computes what the exported step graphs compute, learns against it, and leaves the network alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mteo_deploy.bundle import Bundle
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.distillation.run import quantising
from mteo_deploy.distillation.student import Student
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, embeddings_at, load_backbone
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.fake_quantize import FakeQuantised, Quantised, fake_quantise, quantised_layers, round_weight
from mteo_deploy.exporters.guidance import guided
from mteo_deploy.exporters.passes.quantize import FORMATS, rounded
from mteo_deploy.sampler import noise_for

SMALL = {"trajectories": 32, "batch": 16}


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_torch_rounds_as_the_graph_does(name: str) -> None:
    form, values = FORMATS[name], np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    scale = 3 / form.largest  # clips some
    found = fake_quantise(torch.from_numpy(values), scale, form).numpy()
    np.testing.assert_allclose(found, rounded(values, np.float32(scale), form), rtol=1e-6, atol=1e-7)


def test_the_gradient_goes_straight_through_but_for_what_is_clipped() -> None:
    values = torch.tensor([-5.0, -0.3, 0.0, 0.7, 5.0], requires_grad=True)
    fake_quantise(values, 1 / 127, FORMATS["int8"]).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))


def as_written(bundle: Bundle, noise: np.ndarray, requests: dict[str, np.ndarray]) -> np.ndarray:
    """Images of the graphs as they are written, without the optimiser of an engine."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    def run(graph: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = onnxruntime.InferenceSession(bundle.path / graph, options, providers=["CPUExecutionProvider"])
        feeds = {value.name: given[value.name] for value in session.get_inputs()}
        return dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))

    crossing = run("graphs/prelude.onnx", requests) if (bundle.path / "graphs" / "prelude.onnx").exists() else {}
    state = noise * np.float32(bundle.plan.initial_scale)
    for entry in bundle.manifest["realisations"]["baked"]:
        given = {"state": state, **requests, **{name: crossing[source] for name, source in entry["requests"].items()}}
        state = run(entry["graph"], given)["next_state"]
    return state


@pytest.mark.parametrize(
    ("kind", "precision", "keep"),
    [
        ("unet", "int8", ("*up_blocks*", "*mid*", "conv_out")),
        ("unet", "fp8", ()),
        ("dit", "int8", ("*ff*", "*.norm1.*", "proj_out_*")),
        ("guided dit", "int8", ()),
    ],
)
def test_torch_computes_what_the_exported_graphs_do(
    kind: str, precision: str, keep: tuple[str, ...], tiny_model: Path, token_model: Path, tmp_path: Path
) -> None:
    """With few layers the numbers agree. With many, one that lies between two steps goes to the other by the last bit of a sum,
    and the layers behind pass that on; then it is the errors that are of one size."""
    model, scale = tiny_model if kind == "unet" else token_model, 2.0 if kind == "guided dit" else None
    adapter = guided(load_backbone(model), scale)
    plan = adapter.compile_plan(2)
    layers = quantised_layers(adapter, plan, lambda i: embeddings_at(adapter, plan, i), precision, keep)
    made = {"model": model, "plain": True, "steps": 2, "quiet": True, "realisations": ["baked"], "guidance_scale": scale}
    bundle = export(tmp_path / "bundle", precision=precision, keep=keep, **made)
    noise = noise_for(adapter.sample_shape, 3, range(4))
    requests = {request.name: torch.arange(4) for request in adapter.requests if request.name == "class_labels"}
    requests |= {"guidance_scale": torch.full((4,), scale)} if scale else {}
    student = Student(adapter, plan)
    with torch.no_grad():
        exact = student(torch.from_numpy(noise), requests)[-1].numpy()
        with quantising(student, layers):
            found = student(torch.from_numpy(noise), requests)[-1].numpy()
        again = student(torch.from_numpy(noise), requests)[-1].numpy()
    expected = as_written(bundle, noise, {name: values.numpy() for name, values in requests.items()})
    cost = np.sqrt(np.mean((exact - found) ** 2))
    assert cost > 1e-4 * np.sqrt(np.mean(exact**2))
    assert np.sqrt(np.mean((exact - expected) ** 2)) == pytest.approx(cost, rel=0.2)
    assert np.sqrt(np.mean((found - expected) ** 2)) < (0.2 if keep else 1) * cost
    np.testing.assert_array_equal(again, exact)  # the network is what it was


def test_learning_lowers_the_error_of_the_quantised_network(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.safetensors"
    recipe = Recipe(iterations=30, precision="int8", keep=("conv_in",), **SMALL)
    found = distill(tiny_model, out, steps=2, recipe=recipe, quiet=True)
    assert found.training["error_after"] < 0.9 * found.training["error_before"]
    assert found.training["quantised"]["left_in_float32"] == {"conv_in": "named by the caller"}
    assert EmbeddingSet.load(out).precision == ("int8", ("conv_in",))
    bundle = export(tmp_path / "bundle", model=tiny_model, embeddings=out, quiet=True)  # its precision is the set's
    assert bundle.manifest["precision"] == "int8" and "table" not in bundle.realisations
    assert bundle.manifest["compiler"]["precision"]["layers"]["conv_in"] == "named by the caller"
    exact = export(tmp_path / "fp32", model=tiny_model, embeddings=out, precision="fp32", realisations=["baked"], quiet=True)
    assert Bundle.open(exact.path).manifest["precision"] == "fp32"


def test_what_cannot_be_together_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--precision out of fp32, int8, fp8; found 'int4'"):
        Recipe(precision="int4")
    with pytest.raises(InputError, match="--checkpointing"):
        Recipe(precision="int8", checkpointing=True)
    with pytest.raises(InputError, match="--keep with --precision"):
        Recipe(keep=("conv_in",))
    with pytest.raises(InputError, match="found none"):
        distill(
            tiny_model, tmp_path / "x.safetensors", steps=2, recipe=Recipe(precision="int8", keep=("*",), **SMALL), quiet=True
        )


def test_a_layer_of_the_graph_alone_is_named(tiny_adapter: Adapter) -> None:
    with pytest.raises(InputError, match="found nowhere, which is in its graph alone"):
        FakeQuantised(tiny_adapter.network, Quantised("int8", {"nowhere": [0.1]}, {})).__enter__()


def test_weights_are_rounded_by_output_channel() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    left = round_weight(weight, FORMATS["int8"])
    steps = weight.flatten(1).abs().amax(1) / FORMATS["int8"].largest_weight
    assert ((left - weight).flatten(1).abs().amax(1) <= 0.5001 * steps).all()
