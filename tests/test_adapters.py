"""The adapter protocol: a network of one's own, an adapter that another package registers, and what inspect says of each."""

from __future__ import annotations

import inspect
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import engine_error, prelude_weights, redraw, step_weights
from helpers import relative
from own_backbone import Guided, Song, SongAdapter
from safetensors.torch import save_file

from mteo_deploy.cli import main
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.describe import describe, parameter_times
from mteo_deploy.sampler import noise_for

NAME = "own_backbone:SongAdapter"
CONFIG = {"channels": 2, "width": 16, "blocks": 3, "size": 8}


@pytest.fixture(scope="module")
def song() -> Song:
    torch.manual_seed(0)
    network = redraw(Song(**CONFIG))
    assert isinstance(network, Song)
    return network


@pytest.fixture(scope="module")
def model(song: Song, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "song"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(song.state_dict(), path / "model.safetensors")
    return path


def call(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@torch.no_grad()
def edm_sampler(network: Song, noise: np.ndarray, sigmas: list[float]) -> np.ndarray:
    """Karras et al. 2022, algorithm 1 without the second order, and eq. 7 with table 1's preconditioning."""
    x, data = torch.from_numpy(noise).double() * sigmas[0], 0.5
    for sigma, following in pairwise(sigmas):
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
        scaled = (x / (sigma**2 + data**2) ** 0.5).float()
        denoised = skip * x + out * network(scaled, torch.tensor([np.log(sigma) / 4], dtype=torch.float32))
        x = x + (following - sigma) * (x - denoised) / sigma
    return x.float().numpy()


def test_a_network_of_ones_own(model: Path, song: Song, tmp_path: Path) -> None:
    """Through the commands: learned, exported, built and sampled; engine equals torch, and the plain solver EDM's sampler."""
    options = ["--model", model, "--adapter", NAME, "--size", "6x10"]
    learning = ["--steps", "2", "--trajectories", "64", "--iterations", "20", "--batch", "32"]
    learned = call("distill", *options, *learning, "-o", tmp_path / "e.safetensors", "--json")
    assert learned["error_after"] < learned["error_before"]
    bundle = tmp_path / "bundle"
    call("export", *options, "--plain", "--steps", "3", "-o", bundle, "--json")
    call("build", bundle, "--engine", "onnxruntime", "--realisation", "baked", "--threads", "1", "--json")
    adapter = load_backbone(model, NAME, size=(6, 10))
    for realisation in ("baked", "table", "fused"):
        assert engine_error(bundle, realisation, adapter) < 1e-4
    assert not [name for names in step_weights(bundle).values() for name in names if "affine" in name or "map_layer" in name]
    call("sample", bundle, "--num", "3", "--seed", "4", "-o", tmp_path / "drawn.npz", "--json")
    with np.load(tmp_path / "drawn.npz") as arrays:
        drawn = arrays[arrays.files[0]]
    plan = adapter.compile_plan(3)
    noise = noise_for(adapter.sample_shape, 4, range(3))
    assert relative(drawn, edm_sampler(song, noise, list(plan.sigmas))) < 1e-4


def test_a_network_with_classes(tmp_path: Path) -> None:
    """Labels are added to the time embedding before the sites: modulation is the prelude's, and ``--model`` is a file."""
    torch.manual_seed(0)
    network = redraw(Guided())
    save_file(network.state_dict(), tmp_path / "guided.safetensors")
    bundle = tmp_path / "bundle"
    options = ["--model", tmp_path / "guided.safetensors", "--adapter", "own_backbone:GuidedAdapter"]
    call("export", *options, "--plain", "--steps", "2", "-o", bundle, "--json")
    call("build", bundle, "--engine", "onnxruntime", "--realisation", "baked", "--threads", "1", "--json")
    adapter = load_backbone(tmp_path / "guided.safetensors", "own_backbone:GuidedAdapter")
    state, labels = torch.randn(3, 2, 8, 8), torch.tensor([3, 0, 9])
    with torch.no_grad():
        expected = network(state, torch.full((3,), 500.0), labels)[:, :2]
        torch.testing.assert_close(adapter.at_timestep(state, 500.0, class_labels=labels), expected)
    assert max(engine_error(bundle, realisation, adapter) for realisation in ("baked", "table", "fused")) < 1e-4
    held = {name for names in step_weights(bundle).values() for name in names}
    assert not [name for name in held if "emb" in name] and any("label_emb" in name for name in prelude_weights(bundle))


def test_the_adapter_in_the_docs_is_the_tested_one() -> None:
    page = (Path(__file__).parent.parent / "docs" / "backbones.md").read_text()
    assert inspect.getsource(SongAdapter) in page


def test_inspect_tells_what_baking_removes(model: Path, tiny_model: Path) -> None:
    found = call("inspect", "--model", model, "--adapter", NAME, "--json")
    assert found["sites"] == {f"blocks.{i}.affine": 16 for i in range(3)} and found["pretrained"] == 1
    gone = 2 * (16 * 16 + 16) + 3 * (16 * 16 + 16)
    assert found["baking"] == {"removed": gone, "prelude": 0, "steps": found["parameters"] - gone}
    assert (found["prediction_type"], found["levels"]["high"], found["requests"]) == ("edm", 80.0, [])
    shown = CliRunner().invoke(main, ["inspect", "--model", str(tiny_model)])
    assert shown.exit_code == 0 and "UNet2DModel" in shown.output and "removes" in shown.output
    for arguments, named in (([], "neither"), ([str(tiny_model), "--model", str(tiny_model)], "both")):
        refused = CliRunner().invoke(main, ["inspect", *arguments])
        assert refused.exit_code == 2 and named in refused.output


def test_inspect_where_a_network_asks_for_numbers(song: Song) -> None:
    class Asks(SongAdapter):
        def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
            return super().call(state, requests) * state.sum().item()

    assert "meta" in describe(Asks(song, {"_class_name": "EDMEulerScheduler"}))["baking"]["unknown"]


def test_a_parameter_is_followed_through_views_and_writing() -> None:
    """What is written into a view, at a step, makes the whole known at a step; what only lends its shape stays out."""

    class Writes(SongAdapter):
        def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
            emb = self.network.blocks[0].affine(torch.zeros(1, 16))
            table = torch.zeros(2, 16)
            table[1] = state.flatten()[:16]
            return state * (table @ self.network.map_layer0.weight).sum() + torch.zeros_like(emb).sum()

    times = parameter_times(Writes(Song(**CONFIG), {"_class_name": "EDMEulerScheduler"}))
    assert times["steps"] == {"network.map_layer0.weight"} and not times["prelude"]


def test_an_installed_package_registers_its_adapter(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point is enough: a pipeline directory whose index names the network's class."""
    package, pipeline = tmp_path / "site" / "song-1.0.dist-info", tmp_path / "pipeline"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: song\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(f"[mteo_deploy.adapters]\nSong = {NAME}\nOther = nowhere:Other\n")
    monkeypatch.syspath_prepend(str(package.parent))
    (pipeline / "scheduler").mkdir(parents=True)
    (pipeline / "scheduler" / "scheduler_config.json").write_text("{}")
    (pipeline / "net").symlink_to(model)
    index = pipeline / "model_index.json"
    index.write_text(json.dumps({"net": ["song", "Song"], "scheduler": ["diffusers", "DDPMScheduler"]}))
    assert isinstance(load_backbone(pipeline), SongAdapter)
    assert isinstance(load_backbone(pipeline, NAME), SongAdapter)
    index.write_text(json.dumps({"net": ["other", "Other"]}))
    with pytest.raises(InputError, match=r"package\.module:Class that can be imported; found 'nowhere:Other'"):
        load_backbone(pipeline)
    index.write_text(json.dumps({"net": ["other", "Else"]}))
    with pytest.raises(InputError, match=r"Song, Other; .* has net: Else; .*--adapter"):
        load_backbone(pipeline)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("nowhere:A", "No module named"),
        ("own_backbone:Nothing", "Nothing"),
        ("own_backbone", "own_backbone"),
        (":", "found ':'"),
    ],
)
def test_adapters_that_cannot_be_imported(name: str, named: str, model: Path) -> None:
    with pytest.raises(InputError, match=f"package.module:Class that can be imported.*{named}"):
        load_backbone(model, name)


def test_what_is_no_adapter(model: Path) -> None:
    with pytest.raises(InputError, match="subclass of"):
        load_backbone(model, "own_backbone:Song")
    with pytest.raises(InputError, match="found nothing"):
        load_backbone(model / "missing", NAME)


def test_adapters_in_the_working_directory(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_alone.py").write_text("from own_backbone import SongAdapter as Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    assert isinstance(load_backbone(model, "mine_alone:Mine"), Adapter)


def test_sizes_and_prompts(tiny_model: Path, model: Path) -> None:
    found = load_backbone(model, NAME, size=(12, 10))
    assert found.sample_shape == (2, 12, 10)
    assert load_backbone(tiny_model, size=(16, 8)).sample_shape[1:] == (16, 8)
    with pytest.raises(InputError, match="--size that UNet2DModel takes: multiples of 2; found 9x8"):
        load_backbone(tiny_model, size=(9, 8))
    with pytest.raises(InputError, match="no --tokens for UNet2DModel, which takes no prompt"):
        load_backbone(tiny_model, tokens=4)
    with pytest.raises(InputError, match="--tokens of 1 or more"):
        load_backbone(tiny_model, tokens=0)
