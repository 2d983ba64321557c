"""Large models: weights in shards and in half precision, mapped; memory of an export; distillation in little memory."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel, UNet2DModel
from families import redraw, save_pipeline
from helpers import relative
from safetensors.torch import load_file

from mteo_deploy.commands.common import parse_bytes
from mteo_deploy.distillation import Recipe, distill, run, trajectories
from mteo_deploy.distillation.student import Student
from mteo_deploy.distillation.trajectories import Trajectories, reference_trajectories
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.checkpoint import read_checkpoint
from mteo_deploy.exporters.evaluate import evaluate, without_weights
from mteo_deploy.exporters.passes.share import WeightFile, content_hash
from mteo_deploy.exporters.weights import STEM, in_float32
from mteo_deploy.machine import watch

linux = pytest.mark.skipif(sys.platform != "linux", reason="tells another process's memory")


def unet() -> Any:
    return redraw(
        UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=8,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_shards_and_types_load_the_same(dtype: torch.dtype, shard: str, tmp_path: Path) -> None:
    """Exactly the numbers that are stored, in float32."""
    network = unet().to(dtype)
    path = save_pipeline(tmp_path / "pipeline", network, DDIMScheduler(), "unet")
    for file in (path / "unet").glob("*.safetensors"):
        file.unlink()
    network.save_pretrained(path / "unet", max_shard_size=shard)
    files = list((path / "unet").glob("*.safetensors"))
    assert (len(files) > 3) == (shard == "100KB")
    found = load_backbone(path).network.state_dict()
    stored = {name: value for file in files for name, value in load_file(file).items()}
    assert found.keys() == stored.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32 and torch.equal(value, stored[name].float()), name
    with in_float32(read_checkpoint(path / "unet", STEM, "UNet2DModel")) as directory:
        assert (directory == path / "unet") == (dtype == torch.float32)
        assert directory.is_dir()
    assert directory.is_dir() == (dtype == torch.float32)  # a copy does not stay


@pytest.mark.parametrize("broken", ["missing", "cut", "index"])
def test_a_shard_that_is_broken(broken: str, tmp_path: Path) -> None:
    network = unet().half()
    path = save_pipeline(tmp_path / "pipeline", network, DDIMScheduler(), "unet")
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    network.save_pretrained(path / "unet", max_shard_size="100KB")
    first, *_ = sorted((path / "unet").glob("*.safetensors"))
    if broken == "missing":
        first.unlink()
    elif broken == "cut":
        first.write_bytes(first.read_bytes()[:1000])
    else:
        (path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match="UNet2DModel weights as safetensors"):
        load_backbone(path)


CHILD = """
import sys
from pathlib import Path
from mteo_deploy import export
from mteo_deploy.exporters.base import families, load_backbone
families()
if len(sys.argv) > 2:
    export(sys.argv[2], model=sys.argv[1], steps=2, plain=True, batch=[1], realisations=["table"], quiet=True)
"""


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_export_takes_little_memory_of_its_own(dtype: torch.dtype, tmp_path: Path) -> None:
    """Anonymous memory above that of the imports, against the weights in float32: they are evaluated before and after every
    pass, hashed and written, and not once are all of them in it."""
    network = PixArtTransformer2DModel(
        num_layers=2,
        sample_size=8,
        num_attention_heads=16,
        attention_head_dim=96,
        cross_attention_dim=1536,
        caption_channels=64,
    ).to(dtype)
    weights = 4 * sum(value.numel() for value in network.parameters())
    model = save_pipeline(tmp_path / "model", network, DDIMScheduler())
    del network
    imports = watch([sys.executable, "-c", CHILD, str(model)])
    found = watch([sys.executable, "-c", CHILD, str(model), str(tmp_path / "bundle")])
    assert imports.status == found.status == 0
    assert weights > 150e6
    assert found.anonymous - imports.anonymous < 1.0 * weights


@linux
def test_watch_sees_memory() -> None:
    """100 MB of numbers are anonymous, the same from a file are not; a status is handed on."""
    make = "import numpy as np, sys; x = np.{}; y = x.sum(); import time; time.sleep(0.2); sys.exit(3)"
    own = watch([sys.executable, "-c", make.format("ones(100 << 20, np.uint8)")])
    assert own.status == 3 and own.seconds > 0.2 and 0 < own.processor < own.seconds * 64
    assert own.peak > own.anonymous > 100 << 20
    mapped = watch([sys.executable, "-c", make.format(f"memmap({sys.executable!r}, np.uint8, 'r')")])
    assert mapped.anonymous < own.anonymous - (60 << 20)


def weighted(transposed: bool) -> ir.Model:
    """``x [2, 8] -> x @ w + b``, the weight as it lies in memory or as a transposed view, as folding leaves it."""
    text = (
        '<ir_version: 10, opset_import: ["": 20]> agraph (float[2, 8] x) => (float[2, 6] y) { m = MatMul(x, w) y = Add(m, b) }'
    )
    model = ir.from_onnx_text(text)
    generator = np.random.default_rng(0)
    w = generator.standard_normal((6, 8), np.float32).T if transposed else generator.standard_normal((8, 6), np.float32)
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name in ("w", "b") and not value.is_initializer():
                array = w if value.name == "w" else np.arange(6, dtype=np.float32)
                value.const_value, value.shape, value.dtype = ir.tensor(array), ir.Shape(array.shape), ir.DataType.FLOAT
                model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_evaluate_takes_weights_where_they_lie(transposed: bool, reference: bool) -> None:
    """A weight becomes an input, what is small stays a constant; the model itself is left as it was."""
    model, x = weighted(transposed), np.random.default_rng(1).standard_normal((2, 8), np.float32)
    w = model.graph.initializers["w"].const_value
    assert w is not None
    light, weights = without_weights(model)
    assert list(weights) == ["w"] and [v.name for v in light.graph.inputs] == ["x", "w"] and "b" in light.graph.initializers
    (found,) = evaluate(model, {"x": x}, reference=reference) or []
    np.testing.assert_allclose(found, x @ w.numpy() + np.arange(6), rtol=1e-5, atol=1e-5)
    assert set(model.graph.initializers) == {"w", "b"} and [v.name for v in model.graph.inputs] == ["x"]


def test_a_tensor_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the graph's content and its place in the file, and for any number of graphs; other numbers hash otherwise."""
    model, read = weighted(False), []
    weights = WeightFile(tmp_path / "weights.bin")
    w = model.graph.initializers["w"].const_value
    assert w is not None
    monkeypatch.setattr(ir.Tensor, "tobytes", lambda self, own=ir.Tensor.tobytes: (read.append(self), own(self))[1])
    first = content_hash(model, weights)
    assert content_hash(model.clone(), weights) == first
    assert sum(tensor is w for tensor in read) == 1
    place = weights.place(w)
    assert weights.place(w) == place and sum(tensor is w for tensor in read) == 2  # once more, to be written
    assert (tmp_path / "weights.bin").read_bytes() == w.numpy().tobytes()
    other = weighted(True)
    assert content_hash(other, weights) != first
    assert WeightFile(tmp_path / "more.bin", parent=weights).place(ir.tensor(w.numpy().copy())) == place


def test_index_of_a_converted_copy(tmp_path: Path) -> None:
    """diffusers reads it as it reads any other: every tensor is in the file that the index names."""
    path = tmp_path / "unet"
    unet().half().save_pretrained(path)
    with in_float32(read_checkpoint(path, STEM, "UNet2DModel")) as directory:
        places = json.loads((directory / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
        assert {name for file in set(places.values()) for name in load_file(directory / file)} == set(places)


# --- distillation ---

QUICK = Recipe(trajectories=16, iterations=6, batch=8, teacher_evaluations=8, lr=0.02)
EACH = 4 * 64 * (2 + 1)
"""Bytes of a reference trajectory at two steps: states at two time points and the noise, 8x8 numbers each."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_pipeline(tmp_path_factory.mktemp("large") / "pipeline", unet(), DDIMScheduler(), "unet")


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingSet:
    return distill(model, tmp_path_factory.mktemp("sets") / "e.safetensors", steps=2, recipe=QUICK, quiet=True)


@pytest.mark.parametrize(("options", "near"), [({"checkpointing": True}, 1e-3), ({"weights": "bf16"}, 0.5)], ids=str)
def test_what_large_backbones_need_learns_the_same(
    options: dict[str, Any], near: float, model: Path, plain: EmbeddingSet, tmp_path: Path
) -> None:
    """Or, in bf16, much the same; the backbone of the caller has the very tensors that it had."""
    adapter = load_backbone(model)
    before = [(p, p.data_ptr(), p.dtype) for p in [*adapter.parameters(), *adapter.buffers()]]
    found = distill(adapter, tmp_path / "e.safetensors", steps=2, recipe=replace(QUICK, **options), quiet=True)
    assert all((p.data_ptr(), p.dtype) == (pointer, dtype) for p, pointer, dtype in before)
    assert found.training["error_before"] == plain.training["error_before"]  # in float32, whatever the weights were meanwhile
    assert found.training["error_after"] < found.training["error_before"]
    a, b = (np.concatenate([one.deltas[site].ravel() for site in plain.deltas]) for one in (found, plain))
    assert relative(a, b) < near


def test_the_network_is_in_bf16_while_it_learns(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, seen = load_backbone(model), set()

    def train(student: Student, *rest: Any) -> float:
        seen.update(value.dtype for value in student.adapter[0].network.parameters())
        seen.add(student(torch.zeros(1, 1, 8, 8), {})[-1].dtype)
        raise RuntimeError("seen")

    monkeypatch.setattr(run, "train", train)
    recipe = replace(QUICK, weights="bf16")
    with pytest.raises(RuntimeError, match="seen"):
        distill(adapter, tmp_path / "e.safetensors", steps=2, recipe=recipe, quiet=True)
    assert seen == {torch.bfloat16, torch.float32}  # weights, states
    assert {value.dtype for value in adapter.network.parameters()} == {torch.float32}  # after an error too


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": "fp16"}, "--weights out of fp32, bf16"),
        ({"weights": "bf16", "share": "time"}, "--weights fp32 with --share time"),
        ({"weights": "bf16", "learn": ("points",)}, "--learn points"),
    ],
    ids=str,
)
def test_recipes_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Recipe(**options)


def solve(adapter: Adapter, count: int = 4, **options: Any) -> Trajectories:
    options = {"seed": 3, "progress": lambda n: None} | options
    return reference_trajectories(adapter, adapter.compile_plan(2), count=count, batch=2, substeps=2, **options)


def test_trajectories_of_a_cache_are_mapped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as in memory; what is done to them stays in memory; nothing is computed again, and nothing else left."""
    adapter, cache = load_backbone(model), tmp_path / "cache"
    expected, found = solve(adapter), solve(adapter, cache=cache)
    (directory,) = cache.iterdir()
    assert {path.name for path in directory.iterdir()} == {"noise.npy", "states.npy"}
    assert float(expected.states.abs().max()) > 0.1
    assert torch.equal(found.states, expected.states) and torch.equal(found.noise, expected.noise)
    found.states.zero_()
    monkeypatch.setattr(trajectories, "run", None)
    assert torch.equal(solve(adapter, cache=cache).states, expected.states)


def test_an_interrupted_cache_keeps_nothing(model: Path, tmp_path: Path) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(load_backbone(model), cache=tmp_path / "cache", progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_limits(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before any work: how many bytes are wanted, and what is there already."""
    adapter, cache = load_backbone(model), tmp_path / "cache"
    solve(adapter, limit=4 * EACH)
    with pytest.raises(InputError, match=rf"at most {4 * EACH - 1:,} bytes .* {4 * EACH:,} bytes for 4 .* {EACH} for each"):
        solve(adapter, limit=4 * EACH - 1)
    solve(adapter, limit=4 * EACH, cache=cache)
    solve(adapter, limit=0, cache=cache)  # those that are there take no more
    with pytest.raises(InputError, match=r"beside [\d,]+ bytes that .*cache has already; lower --trajectories or raise"):
        solve(adapter, limit=5 * EACH, cache=cache, seed=4)
    monkeypatch.setattr(trajectories.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(InputError, match=r"room for .* found 100 bytes free"):
        solve(adapter, cache=cache, seed=4)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "count"), [("7", 7), ("1.5kB", 1500), ("500MB", 5 * 10**8), ("20 GB", 2 * 10**10), ("1T", 10**12)]
)
def test_bytes_of_an_option(text: str, count: int) -> None:
    assert parse_bytes("--reference-limit", text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "20GiB"])
def test_bytes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--reference-limit as a number of bytes"):
        parse_bytes("--reference-limit", text)
