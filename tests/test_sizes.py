"""Open axes: heights, widths and batch sizes by choice, with the same layers in the graphs and the same images as torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import Once
from diffusers import UNet2DModel
from helpers import Array, altered, failed, relative, torch_states

from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.engines import BACKENDS, backend
from mteo_deploy.engines.base import Session
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.choice import pretrained_set
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.unet2d import UNet2DAdapter
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.verification import verify

PLAIN: dict[str, Any] = {"steps": 2, "solver": "ipndm-2", "plain": True, "quiet": True}
QUICK: dict[str, Any] = {"threads": 1, "seconds": 0.1, "quiet": True}


@pytest.fixture(scope="session")
def open_bundle(tiny_model: Path, once: Once) -> Path:
    """Built bundle with every axis open: plain iPNDM 2, 2 steps."""

    def make(directory: Path) -> None:
        bundle = export(directory, model=tiny_model, dynamic=["batch", "height", "width"], **PLAIN)
        build(bundle, engine="onnxruntime", realisation="baked", **QUICK)

    return once("open", make)


def graph_of(bundle: Bundle, name: str) -> onnx.GraphProto:
    return onnx.load(str(bundle.file(f"graphs/{name}.onnx")), load_external_data=False).graph


def layers(graph: onnx.GraphProto) -> Counter[str]:
    """How often each operator occurs, without views and what computes shapes, from shapes and constants alone."""
    shapes = {"", *(tensor.name for tensor in graph.initializer)}
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type == "Shape" or shapes.issuperset(node.input):
            shapes.update(node.output)
        elif node.op_type != "Reshape":
            found[node.op_type] += 1
    return found


# --- height and width ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [name for name in BACKENDS if name != "tensorrt"])
@pytest.mark.parametrize("realisation", NAMES)
def test_other_sizes_as_torch(engine: str, realisation: str, open_bundle: Path, tiny_adapter: Adapter) -> None:
    pytest.importorskip(engine, reason=f"the extra {engine} is not installed")
    bundle, embeddings = Bundle.open(open_bundle), pretrained_set(tiny_adapter, 2, "ipndm-2")
    sampler = Sampler(bundle, lambda graph: backend(engine).open(bundle, graph, "cpu", {"threads": 1}), realisation)
    for shape in ((1, 8, 8), (1, 12, 6), (1, 2, 20)):
        noise = noise_for(shape, 5, range(3))
        expected = torch_states(tiny_adapter, embeddings, noise)
        for found, wanted in zip(sampler.states(noise), expected, strict=True):
            assert relative(found, wanted) < 1e-4
        conditioned = sampler.conditioned_states(sampler.plan, noise)[-1]
        assert relative(np.asarray(conditioned), expected[-1]) < 1e-4


def test_sampler_takes_a_size(open_bundle: Path, tiny_adapter: Adapter) -> None:
    sampler, embeddings = Sampler.load(open_bundle), pretrained_set(tiny_adapter, 2, "ipndm-2")
    found = sampler(num=3, seed=7, batch=2, size=(6, 10))
    expected = torch_states(tiny_adapter, embeddings, noise_for((1, 6, 10), 7, range(3)))[-1]
    assert found.shape == (3, 1, 6, 10) and relative(found, expected) < 1e-4
    assert sampler.conditioned(sampler.plan, num=1, size=(6, 10)).shape == (1, 1, 6, 10)
    np.testing.assert_array_equal(sampler(num=2, seed=7, size=(8, 8)), sampler(num=2, seed=7))


@pytest.mark.parametrize("dynamic", [["batch"], ["height", "width"], []])
def test_absorbed_all_the_same(dynamic: list[str], open_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Whatever is open, the graphs have the same layers, and every site is in a layer's own parameters."""
    batch = [] if "batch" in dynamic else [3]
    found = export(tmp_path / "b", model=tiny_model, dynamic=dynamic, batch=batch, **PLAIN)
    reference = Bundle.open(open_bundle)
    for name in ("step_00", "step_01", "table", "fused", "conditioned"):
        assert layers(graph_of(found, name)) == layers(graph_of(reference, name)), name
    for bundle in (found, reference):
        details = [where["baked"] for site in bundle.manifest["compiler"]["sites"] for where in site["constants"].values()]
        assert details and all(text.startswith("rule A") for text in details)
    (state, *_) = graph_of(found, "step_00").input
    dims = [dim.dim_value for dim in state.type.tensor_type.shape.dim]
    assert dims == [3 if batch else 0, 1, *((0, 0) if "height" in dynamic else (8, 8))]
    build(found, engine="onnxruntime", realisation="baked", **QUICK)
    assert verify(found.path, seconds=0, quiet=True).passed


def test_verify_looks_at_another_size(open_bundle: Path) -> None:
    """A session that is right at the backbone's own size, and one per cent off at any other."""
    good = Sampler.load(open_bundle)
    report = verify(good, seconds=0, quiet=True)
    assert report.passed and "size 10x12" in {check.name for check in report.checks}

    class Off:
        def __init__(self, session: Session) -> None:
            self.session = session

        def run(self, feeds: Mapping[str, Array]) -> list[Array]:
            factor = np.float32(1.0 if feeds["state"].shape[2:] == (8, 8) else 1.01)
            return [output * factor for output in self.session.run(feeds)]

    sampler = Sampler(good.bundle, lambda graph: Off(good.open_graph(graph)))
    assert failed(verify(sampler, seconds=0, quiet=True)) == {"size 10x12"}


def test_sizes_that_do_not_fit(open_bundle: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    for path, size, message in [
        (open_bundle, "9x8", "expected --size in multiples of 2; found 9x8; the nearest is 8x8"),
        (open_bundle, "0x8", "the nearest is 2x8"),
        (open_bundle, "large", "expected --size as HEIGHTxWIDTH"),
        (
            tiny_bundle,
            "10x8",
            "expected --size 8x8, since height of this bundle are fixed; found 10x8; export again with --dynamic",
        ),
    ]:
        result = CliRunner().invoke(main, ["sample", str(path), "--size", size, "-o", str(tmp_path / "x.npz")])
        assert result.exit_code == 2 and message in result.stderr, result.stderr
    result = CliRunner().invoke(
        main, ["sample", str(open_bundle), "--num", "2", "--size", "6x4", "-o", str(tmp_path / "x.npz")]
    )
    assert result.exit_code == 0, result.stderr
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["images"].shape == (2, 1, 6, 4)


def test_a_bundle_of_an_older_version_has_its_own_size(tiny_bundle: Path, tmp_path: Path) -> None:
    def older(manifest: dict[str, Any]) -> None:
        manifest["schema"] = 1
        del manifest["digest"], manifest["dynamic"], manifest["batches"], manifest["backbone"]["size_multiple"]

    bundle = Bundle.open(altered(tiny_bundle, tmp_path / "b", older))
    assert bundle.batches == [] and bundle.shape_at((8, 8)) == bundle.shape_at(None) == (1, 8, 8)
    with pytest.raises(InputError, match="expected --size 8x8"):
        bundle.shape_at((8, 10))


@pytest.mark.parametrize(
    ("down", "up", "multiple"),
    [
        (("DownBlock2D",), ("UpBlock2D",), 1),
        (("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D"), 2),
        (("SkipDownBlock2D", "AttnSkipDownBlock2D", "DownBlock2D"), ("UpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"), 4),
    ],
)
def test_multiple_is_the_networks(down: tuple[str, ...], up: tuple[str, ...], multiple: int) -> None:
    """diffusers' network runs at multiples of it and at nothing between."""
    network = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 64)[: len(down)],
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=16,
        norm_num_groups=8,
    )
    adapter = UNet2DAdapter(network, {"_class_name": "DDPMScheduler", "beta_schedule": "linear"})
    assert adapter.size_multiple == multiple
    with torch.no_grad():
        assert adapter.at_timestep(torch.zeros(1, 3, 3 * multiple, 5 * multiple), 3.0).shape[2:] == (3 * multiple, 5 * multiple)
        for less in range(1, multiple):
            with pytest.raises(RuntimeError):
                adapter.at_timestep(torch.zeros(1, 3, 8 + less, 8), 3.0)


# --- batch -----------------------------------------------------------------------------------------------------------


def test_several_sizes_are_what_build_compiles(tiny_model: Path, tmp_path: Path) -> None:
    """The batch stays open; build takes the sizes from the bundle unless it is given others."""
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    options = ["--model", str(tiny_model), "--steps", "1", "--plain", "--realisation", "baked", "--batch", "1,3", "-q"]
    result = CliRunner().invoke(main, ["export", *options, "-o", str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "b")
    assert (bundle.batches, bundle.manifest["batch"], bundle.manifest["dynamic"]) == ([1, 3], "dynamic", ["batch"])
    directory = build(bundle, engine="openvino", **QUICK)
    assert {path.name for path in directory.glob("*.blob")} == {
        f"{n}-{b}.blob" for n in ("step_00", "conditioned") for b in (1, 3)
    }
    noise = noise_for(bundle.sample_shape, 4, range(5))
    found = Sampler.load(bundle.path).states(noise)[-1]
    other = build(bundle, engine="openvino", batch=[2], **QUICK)
    assert {path.name for path in other.glob("*.blob")} == {"step_00-2.blob", "conditioned-2.blob"}
    build(bundle, engine="onnxruntime", **QUICK)
    assert relative(found, Sampler.load(bundle.path, engine="onnxruntime").states(noise)[-1]) < 1e-4
    text = CliRunner().invoke(main, ["inspect", str(bundle.path)]).stdout
    assert "open       batch; batch 1, 3 asked for" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": [0]}, "--batch of 1 or more"),
        ({"batch": [2, -1]}, "--batch of 1 or more; found 2, -1"),
        ({"dynamic": ["depth"]}, "--dynamic out of batch, height, width; found 'depth'"),
        ({"dynamic": ["height"]}, "expected one size with --batch .* found 0"),
        ({"dynamic": [], "batch": [1, 2]}, "expected one size with --batch .* found 2"),
    ],
)
def test_axes_that_do_not_fit(options: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        export(tmp_path / "b", model=tiny_model, **PLAIN, **options)
    assert not (tmp_path / "b").exists()
