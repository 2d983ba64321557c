"""Adapters that are not their network: each is refused in one line that names what is wrong, before anything is traced."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDPMScheduler, UNet2DModel
from families import redraw, save_pipeline
from own_backbone import Guided, GuidedAdapter, Song, SongAdapter
from safetensors.torch import load_file, save_file
from test_requests import random_dit
from test_requests import random_unet as unet
from test_unet2d_condition import SDXL
from test_unet2d_condition import random_unet as conditional
from torch import nn
from torch.nn.functional import dropout

from mteo_deploy.cli import main
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.check_adapter import TOLERANCE, check_adapter
from mteo_deploy.exporters.dit import DiTAdapter
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.unet2d import UNet2DAdapter
from mteo_deploy.exporters.unet2d_condition import UNet2DConditionAdapter
from mteo_deploy.requests import Request

EDM = {"_class_name": "EDMEulerScheduler"}
DDPM = {"_class_name": "DDPMScheduler"}
HERE = "test_check_adapter"


def song(cls: type[Song] = Song) -> Song:
    torch.manual_seed(0)
    network = redraw(cls(2, 16, 3, 8))
    assert isinstance(network, Song)
    return network


def refused(adapter: Adapter) -> str:
    with pytest.raises(InputError) as found:
        check_adapter(adapter)
    assert "\n" not in str(found.value)
    return str(found.value)


# --- networks ---------------------------------------------------------------------------------------------------------


class Divides(Song):
    """As NCSN++: the output is divided by the time."""

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return super().forward(x, noise) / (2 + noise.reshape(-1, 1, 1, 1))


class Drops(Song):
    """Dropout that no mode switches off."""

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return super().forward(dropout(x, 0.1, training=True), noise)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class Normalises(Song):
    """Batch normalisation."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x), noise)


class Mixes(Song):
    """Takes the batch's mean off."""

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return super().forward(x - 0.1 * x.mean(0, keepdim=True), noise)


class Twice(Song):
    """Each block gets an embedding of its own."""

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        emb, x = self.embed(noise), self.enter(x)
        for i, block in enumerate(self.blocks):
            x = block(x, emb * (i + 1))
        return self.leave(x)


class Early(Guided):
    """As EDM's SongUNet: labels are added before the embedding's MLP."""

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        emb, x = self.time_embed(self.sinusoids(timesteps) + self.label_emb(y)[:, :8]), self.enter(x)
        for block in self.blocks:
            x = block(x, emb)
        return self.leave(x)


# --- adapters ---------------------------------------------------------------------------------------------------------


class Bare(SongAdapter):
    native = Adapter.native


class Forgets(SongAdapter):
    def add_site(self, name: str, width: int, module: nn.Module, argument: str) -> None:
        if not name.startswith(("blocks.0", "blocks.2")):
            super().add_site(name, width, module, argument)


class Reversed(SongAdapter):
    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.network.embed(timestep) * i for i in (3, 2, 1))


class Scales(SongAdapter):
    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().embeddings(timestep / 1.01)


class Doubles(SongAdapter):
    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(one.double() for one in super().embeddings(timestep))


class Learns(SongAdapter):
    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(len(timestep), 16, requires_grad=True),) * 3


class Width(SongAdapter):
    def add_site(self, name: str, width: int, module: nn.Module, argument: str) -> None:
        super().add_site(name, 32, module, argument)


class Count(SongAdapter):
    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().embeddings(timestep)[:-1]


class OneTensor(SongAdapter):
    def embeddings(self, timestep: torch.Tensor) -> Any:
        return super().embeddings(timestep)[0]


class Single(SongAdapter):
    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(one[0] for one in super().embeddings(timestep))


class FirstTime(SongAdapter):
    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(one[:1].expand(len(timestep), -1) for one in super().embeddings(timestep))


class Numbers(SongAdapter):
    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().embeddings(torch.tensor([timestep.item()]))


class Remembers(SongAdapter):
    """Hands the last time that ``embeddings`` saw to the network, which scales its state by it."""

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.last = timestep
        return super().embeddings(timestep)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.network(state, self.last[:1])


class Counts(SongAdapter):
    """Another output at every call."""

    calls = 0

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return super().call(state, requests) * (1 + 0.001 * self.calls)


class Tuples(SongAdapter):
    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> Any:
        return (super().call(state, requests),)


class TwiceAsMany(SongAdapter):
    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([super().call(state, requests)] * 2, 1)


class InPlace(SongAdapter):
    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().call(state.mul_(0.5), requests)


class Blind(SongAdapter):
    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().call(torch.zeros_like(state), requests)


class Trains(SongAdapter):
    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        self.network.train()
        return super().call(torch.cat([state, -state]), requests)[:1]


class Stays(SongAdapter):
    """Its network never hears of ``eval``."""

    def train(self, mode: bool = True) -> Any:
        self.network.blocks[1].training = True
        return self


class Itself(SongAdapter):
    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        rows = zip(state.split(1), timestep, strict=True)
        return torch.cat([self(one, *self.embeddings(t[None]), **requests) for one, t in rows])


class OneTime(SongAdapter):
    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep[:1])


class Shape(SongAdapter):
    def __init__(self, network: Song, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.sample_shape = (3, 8, 8)


class Unused(SongAdapter):
    def __init__(self, network: Song, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.requests = (Request("y", "int64", high=10),)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep)


class Idle(SongAdapter):
    """A site that the network does not call."""

    def __init__(self, network: Song, scheduler_config: dict[str, Any]) -> None:
        network.extra = nn.Linear(16, 16)
        super().__init__(network, scheduler_config)
        self.add_site("extra", 16, network.extra, "input")


class Config(SongAdapter):
    def __init__(self, network: Song, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.config = {"width": 16, "hook": object()}


def noisy() -> Adapter:
    network = song()
    network.blocks[1].conv1 = nn.Sequential(network.blocks[1].conv1, Noisy())
    return SongAdapter(network, EDM).eval()


def undeclared() -> Adapter:
    adapter = GuidedAdapter(redraw(Guided()), DDPM)
    adapter.requests = ()
    return adapter


def empty_scheduler() -> Adapter:
    adapter = SongAdapter(song(), EDM)
    adapter.scheduler_config = {}
    return adapter


def broken(value: float) -> Adapter:
    network = song()
    with torch.no_grad():
        network.enter.bias[1] = network.blocks[2].affine.weight[0, 3] = value
    return SongAdapter(network, EDM)


def scaled(by: float) -> Adapter:
    network = song()
    with torch.no_grad():
        network.leave.weight.clamp_(-1, 1).mul_(by)
        network.leave.bias.mul_(0)
    return SongAdapter(network, EDM)


def wrong_dit() -> Adapter:
    class Wrong(DiTAdapter):
        def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (*super().embeddings(timestep)[:-1], super().embeddings(timestep)[1])

    torch.manual_seed(0)
    return Wrong(random_dit(), DDPM)


WRONG: dict[str, tuple[Callable[[], Adapter], str]] = {
    "no native": (lambda: Bare(song(), EDM), "found no method native; add to the class: def native.*return self.network"),
    "forgotten sites": (lambda: Forgets(song(), EDM), r"the time.*enters at blocks\.0, blocks\.2; make a site"),
    "divided by the time": (lambda: SongAdapter(song(Divides), EDM), r"enters at Divides\.forward itself"),
    "labels before the MLP": (
        lambda: GuidedAdapter(redraw(Early()), DDPM),
        "class_labels changes the network's output and not",
    ),
    "order of sites": (lambda: Reversed(song(Twice), EDM), r"another value.*blocks\.0\.affine, blocks\.2\.affine \(2 of 3"),
    "time divided": (lambda: Scales(song(), EDM), r"another value.*\(3 of 3 sites\)"),
    "float64": (lambda: Doubles(song(), EDM), "plain float32; found float64"),
    "gradient": (lambda: Learns(song(), EDM), "plain float32; found a gradient"),
    "width": (lambda: Width(song(), EDM), r"\[times, width\], \[2, 32\]; found \[2, 16\]"),
    "count": (lambda: Count(song(), EDM), "a tuple of 3 tensors.*found 2"),
    "one tensor": (lambda: OneTensor(song(), EDM), "a tuple of 3 tensors.*found a Tensor"),
    "no axis of times": (lambda: Single(song(), EDM), r"found \[16\]"),
    "first time alone": (lambda: FirstTime(song(), EDM), "each time its own row"),
    "a time's number": (lambda: Numbers(song(), EDM), r"times of shape \[2\].*RuntimeError"),
    "kept from call to call": (lambda: Remembers(song(Divides), EDM), "enters at Divides.forward|relative error"),
    "counts calls": (lambda: Counts(song(), EDM), "two equal calls"),
    "tuple": (lambda: Tuples(song(), EDM), r"found a tuple; return its first element"),
    "six channels": (lambda: TwiceAsMany(song(), EDM), r"return output\[:, :2\]"),
    "in place": (lambda: InPlace(song(), EDM), "found state changed in place"),
    "ignores its state": (lambda: Blind(song(), EDM), "depend on its state"),
    "dropout": (lambda: SongAdapter(song(Drops), EDM), r"begins in Drops\.forward itself"),
    "random layer": (noisy, r"begins in blocks\.1\.conv1"),
    "batch norm in training": (lambda: Trains(song(Normalises), EDM), "its buffer norm.running_mean changed"),
    "training mode": (lambda: Stays(song(), EDM), r"found blocks\.1 in training mode after eval"),
    "rows meet": (lambda: SongAdapter(song(Mixes), EDM), "rows of a batch depend on one another"),
    "native takes one time": (lambda: OneTime(song(), EDM), "or native takes one time for all"),
    "native calls itself": (lambda: Itself(song(), EDM), "would compare it with itself"),
    "shape": (lambda: Shape(song(), EDM), r"a state \[2, 3, 8, 8\].*RuntimeError.*mend native, sample_shape"),
    "request not declared": (undeclared, "KeyError: 'class_labels'"),
    "request not used": (lambda: Unused(song(), EDM), "nothing reads y"),
    "site not called": (lambda: Idle(song(), EDM), "nothing reads that of extra"),
    "config": (lambda: Config(song(), EDM), "found a object as 'hook'"),
    "scheduler": (empty_scheduler, "found {}; pass one with a _class_name"),
    "bfloat16": (lambda: SongAdapter(song().bfloat16(), EDM), r"found bfloat16 in .* and \d+ more; call network.float\(\)"),
    "not a number": (lambda: broken(float("nan")), r"NaN or Inf in enter\.bias, blocks\.2\.affine\.weight \(2 of"),
    "infinite": (lambda: broken(float("inf")), r"NaN or Inf in enter\.bias, blocks\.2\.affine\.weight \(2 of"),
    "overflow": (lambda: scaled(3e38), "finite output of native"),
    "nothing trained": (lambda: scaled(0.0), "zero everywhere"),
    "an adapter without hooks": (wrong_dit, "relative error.*compare call and native"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_adapters(name: str) -> None:
    made, named = WRONG[name]
    found = refused(made())
    assert re.search(named, found), found


@pytest.mark.parametrize("make", [lambda: SongAdapter(song(), EDM), lambda: GuidedAdapter(redraw(Guided()), DDPM)])
def test_right_adapters(make: Callable[[], Adapter]) -> None:
    """And the network is left as it was, hooks and all."""
    adapter = make()
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in adapter.modules())
    found = check_adapter(adapter)
    assert 0 <= found.error < TOLERANCE / 10 and len(set(found.times)) == 2
    low, high = adapter.levels.timestep(torch.tensor([adapter.levels.low, adapter.levels.high]).numpy())
    assert low < min(found.times) < max(found.times) < high
    assert sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in adapter.modules()) == hooks
    assert "forward" not in vars(adapter)


def test_a_large_network_is_called_a_few_times() -> None:
    adapter, rows = SongAdapter(song(), EDM), []
    adapter.network.enter.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    check_adapter(adapter)
    assert sum(rows) <= 8


# --- through the commands ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that ``SongAdapter`` reads."""
    path = tmp_path_factory.mktemp("song")
    (path / "config.json").write_text(json.dumps({"channels": 2, "width": 16, "blocks": 3, "size": 8}))
    save_file(song().state_dict(), path / "model.safetensors")
    return path


class Fails(SongAdapter):
    @classmethod
    def load(cls, network_dir: Path, scheduler_config: dict[str, Any]) -> Adapter:
        raise FileNotFoundError("no weights.pt\nin this directory")


class Network(SongAdapter):
    @classmethod
    def load(cls, network_dir: Path, scheduler_config: dict[str, Any]) -> Any:
        return song()


class Abstract(Adapter):
    @classmethod
    def load(cls, network_dir: Path, scheduler_config: dict[str, Any]) -> Adapter:
        return cls(song(), EDM)  # type: ignore[abstract]


class NoShape(SongAdapter):
    def __init__(self, network: Song, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        del self.sample_shape


class Flat(SongAdapter):
    def __init__(self, network: Song, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.sample_shape = (128,)


class Argument(SongAdapter):
    def add_site(self, name: str, width: int, module: nn.Module, argument: str) -> None:
        super().add_site(name, width, module, "temb")


class SiteTwice(SongAdapter):
    def __init__(self, network: Song, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.add_site("again", 16, network.blocks[0].affine, "input")


class NoModule(SongAdapter):
    def __init__(self, network: Song, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.add_site("blocks.7", 16, network.get_submodule("blocks.7"), "input")


class OddConfig(SongAdapter):
    def __init__(self, network: Song, scheduler_config: dict[str, Any]) -> None:
        network.config = 5
        super().__init__(network, scheduler_config)


LOADS = {
    "Bare": "no method native; add to the class: def native",
    "Forgets": r"enters at blocks\.0, blocks\.2",
    "Fails": "Fails.load to read .*FileNotFoundError: no weights.pt; mend the adapter",
    "Network": "Network.load to return an adapter; found a Song",
    "Abstract": "TypeError: Can't instantiate abstract class",
    "NoShape": "found no sample_shape",
    "Flat": r"\(channels, height, width\); found \(128,\)",
    "Argument": "found 'temb' for blocks.0.affine; it takes input",
    "SiteTwice": "found again again; leave out the second add_site",
    "NoModule": "NoModule.load to read .*AttributeError",
    "OddConfig": "Song.config as a mapping or an object with attributes; found a int",
}


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("verb", ["inspect", "export", "distill"])
def test_verbs_refuse(name: str, verb: str, model: Path, tmp_path: Path) -> None:
    arguments = {
        "inspect": [],
        "export": ["--plain", "--steps", "1", "-o", str(tmp_path / "bundle"), "-q"],
        "distill": ["--steps", "1", "-o", str(tmp_path / "e.safetensors"), "-q"],
    }[verb]
    found = CliRunner().invoke(main, [verb, "--model", str(model), "--adapter", f"{HERE}:{name}", *arguments])
    lines = found.output.strip().splitlines()
    assert found.exit_code == 2 and len(lines) == 1 and re.search(LOADS[name], lines[0]), found.output
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_pipeline(tmp_path_factory.mktemp("check") / "pipeline", unet(num_class_embeds=None), DDPMScheduler(), "unet")


def test_inspect_says_what_it_compared(model: Path, pipeline: Path, tmp_path: Path) -> None:
    """Weights are read where they are there and not many; a network of one's own is as its adapter loads it."""
    shown = CliRunner().invoke(main, ["inspect", "--model", str(model), "--adapter", "own_backbone:SongAdapter"])
    assert shown.exit_code == 0 and re.search(r"adapter +equals the network's own forward: \de-0\d at 2 times", shown.output)

    def adapter_of(path: Path) -> dict[str, Any]:
        found = CliRunner().invoke(main, ["inspect", "--model", str(path), "--json"])
        assert found.exit_code == 0, found.output
        return dict(json.loads(found.output)["adapter"])

    assert adapter_of(pipeline)["error"] < TOLERANCE
    path = tmp_path / "config-alone"
    (path / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/config.json"):
        (path / name).write_text((pipeline / name).read_text())
    (path / "scheduler").symlink_to(pipeline / "scheduler")
    assert adapter_of(path) == {"skipped": "no weights are there; distill and export check"}
    with torch.device("meta"):
        UNet2DModel(block_out_channels=(224, 448, 672, 896), sample_size=64).save_config(path / "unet")
    assert "more than 100,000,000 parameters" in adapter_of(path)["skipped"]


def test_weights_that_are_no_numbers(pipeline: Path, tmp_path: Path) -> None:
    """Said before anything is traced, by the name that the file has."""
    path = Path(shutil.copytree(pipeline, tmp_path / "model"))
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_out.bias"] = torch.full_like(state["conv_out.bias"], float("nan"))
    save_file(state, file, metadata={"format": "pt"})
    for verb in (["inspect"], ["export", "--plain", "--steps", "1", "-o", str(tmp_path / "bundle"), "-q"]):
        found = CliRunner().invoke(main, [verb[0], "--model", str(path), *verb[1:]])
        assert found.exit_code == 2 and "found NaN or Inf in conv_out.bias (1 of" in found.output, found.output
    assert not (tmp_path / "bundle").exists()


class Signals(SongAdapter):
    """States of two axes."""

    def __init__(self, network: Song, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.sample_shape = (16, 8)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().call(state.unflatten(1, (2, 8)), requests).flatten(1, 2)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return self.network(state.unflatten(1, (2, 8)), timestep).flatten(1, 2)


def test_states_may_have_two_axes(model: Path) -> None:
    found = load_backbone(model, f"{HERE}:Signals")
    assert found.sample_shape == (16, 8) and check_adapter(found).error < TOLERANCE


# --- what configurations are ------------------------------------------------------------------------------------------


def with_config(config: Any) -> Adapter:
    network = song()
    network.config = config
    return SongAdapter(network, EDM)


def test_configurations_have_one_form() -> None:
    """An object's attributes, ``to_dict``, types and numpy's numbers: the fingerprint is that of plain values."""
    plain = {"width": 16, "dtype": "torch.float32", "act": "torch.nn.modules.activation.SiLU", "sizes": [1, 2]}
    expected = with_config(plain).fingerprint()
    rich = {"width": np.int64(16), "dtype": torch.float32, "act": nn.SiLU, "sizes": (1, 2)}
    for config in (rich, SimpleNamespace(**rich), SimpleNamespace(to_dict=lambda: rich), {**plain, "_private": object()}):
        assert with_config(config).fingerprint() == expected
    assert with_config({**plain, "width": 17}).fingerprint() != expected
    assert with_config(None).config == {}


def test_a_configuration_that_json_cannot_hold_is_refused_by_its_key() -> None:
    for config in ({"a": 1, "odd": object()}, {"odd": {(1, 2): 3}}):
        with pytest.raises(InputError, match=r"as 'odd'; set self\.config"):
            with_config(config).fingerprint()


# --- what diffusers' UNets can be -------------------------------------------------------------------------------------

SKIP = {
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64, 64),
    "attention_head_dim": 32,
}
SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
}
TAKEN: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (unet, {"freq_shift": 1, "flip_sin_to_cos": False, "center_input_sample": True}),
    (unet, {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet"}),
    (unet, {"mid_block_type": None, "dropout": 0.2, "downsample_padding": 0}),
    (unet, {**SKIP, "num_class_embeds": None}),
    (conditional, {"time_embedding_type": "fourier", "time_embedding_dim": 24}),
    (conditional, {"timestep_post_act": "silu", "freq_shift": 1, "center_input_sample": True}),
    (conditional, {"timestep_post_act": "silu", **SDXL}),
    (conditional, SIMPLE),
    (conditional, {"attention_type": "gated", "resnet_out_scale_factor": 2.0, "transformer_layers_per_block": [1, 2]}),
]


def optional(make: Callable[..., Any], options: dict[str, Any]) -> Any:
    """A network of ``make``'s configuration, with options in the place of some of it."""
    small = make()
    torch.manual_seed(0)
    own = {key: value for key, value in small.config.items() if not key.startswith("_")}
    return type(small)(**{**own, **options})


@pytest.mark.parametrize(("make", "options"), TAKEN)
def test_options_that_are_taken(make: Callable[..., Any], options: dict[str, Any]) -> None:
    """The adapter equals diffusers' own class, with the option."""
    network = redraw(optional(make, options))
    cls = UNet2DAdapter if isinstance(network, UNet2DModel) else UNet2DConditionAdapter
    assert check_adapter(cls(network, DDPM)).error < TOLERANCE


K = {"down_block_types": ("KDownBlock2D", "KDownBlock2D"), "up_block_types": ("KUpBlock2D", "KUpBlock2D")}
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (unet, {"time_embedding_type": "fourier"}, "'positional'; found 'fourier'.*divides the output by the time"),
    (unet, {"time_embedding_type": "learned", "num_train_timesteps": 1000}, "'positional'; found 'learned'"),
    (unet, {"num_class_embeds": None, "class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
    (unet, {"num_class_embeds": None, "class_embed_type": "identity"}, "class_embed_type 'identity'"),
    (unet, {**K, "block_out_channels": (32, 64)}, r"down_blocks\.0\.resnets\.0, which normalises by the time"),
    (conditional, {**K, "block_out_channels": (32, 64), "mid_block_type": None}, "which normalises by the time"),
    (conditional, {"class_embeddings_concat": True}, "class_embeddings_concat True"),
    (conditional, {"num_class_embeds": 4}, "num_class_embeds 4"),
    (conditional, {"dual_cross_attention": True}, "dual_cross_attention True"),
    (conditional, {"time_embedding_act_fn": "silu"}, "time_embedding_act_fn 'silu'"),
    (conditional, {"encoder_hid_dim": 10}, "encoder_hid_dim_type 'text_proj'"),
    (conditional, {"addition_embed_type": "text_image"}, "addition_embed_type 'text_image'"),
]


@pytest.mark.parametrize(("make", "options", "named"), REFUSED)
def test_options_that_are_refused(make: Callable[..., Any], options: dict[str, Any], named: str) -> None:
    network = optional(make, options)
    cls = UNet2DAdapter if isinstance(network, UNet2DModel) else UNet2DConditionAdapter
    with pytest.raises(InputError, match=named):
        cls(network, DDPM)


# --- what everything is compared with ---------------------------------------------------------------------------------


class Overflows(SongAdapter):
    """As it should be, but at the highest noise."""

    most = 1e30

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.where(timestep[:, None] > 1.05, self.most, one) for one in super().embeddings(timestep))


class Infinite(Overflows):
    most = torch.inf


def test_embeddings_must_be_finite_at_every_evaluation(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"finite embeddings; found NaN or Inf at evaluation 0 for blocks\.0\.affine"):
        export(tmp_path / "bundle", model=Infinite(song(), EDM), steps=3, plain=True, realisations=["baked"], quiet=True)
    assert not list(tmp_path.iterdir())


def test_the_reference_must_be_finite(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torch reference; found NaN or Inf in states, first at evaluation 0 of 3"):
        export(tmp_path / "bundle", model=Overflows(song(), EDM), steps=3, plain=True, realisations=["baked"], quiet=True)
    assert not list(tmp_path.iterdir())
