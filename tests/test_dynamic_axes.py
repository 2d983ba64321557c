"""A dynamic axis stays dynamic: networks that make a number of it are refused with their line, and exported at one size; what
is exported computes what torch does at other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from families import redraw, save_pipeline
from helpers import relative
from torch import nn
from torch.nn.functional import silu

from mteo_deploy.bundle import Bundle
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import load_backbone
from mteo_deploy.exporters.capture import FixedAxisError
from mteo_deploy.exporters.describe import parameter_times
from mteo_deploy.exporters.evaluate import evaluate
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.hooks import HookedAdapter
from mteo_deploy.exporters.passes.fold import Fold, constant_nodes
from mteo_deploy.exporters.trace import trace_generic
from mteo_deploy.exporters.unet2d import UNet2DAdapter
from mteo_deploy.exporters.unet2d_condition import UNet2DConditionAdapter
from mteo_deploy.requests import Request

EDM = {"_class_name": "EDMEulerScheduler"}
HERE = str(Path(__file__).resolve())


class Site(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.affine = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return silu(x + self.affine(emb)[:, :, None, None])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.site, self.leave = nn.Conv2d(3, 8, 3, padding=1), Site(), nn.Conv2d(8, 3, 3, padding=1)
        self.grid: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        emb = torch.cat([torch.cos(t[:, None] * k) for k in range(1, 5)], 1)
        return self.leave(self.site(self.enter(x), emb))


class Plain(HookedAdapter):
    """A small network; what a subclass does in :meth:`run` is what is tried."""

    family = "Net"
    size_multiple = 1

    def __init__(self) -> None:
        torch.manual_seed(0)
        network = Net()
        super().__init__(network, EDM)
        self.sample_shape = (3, 8, 8)
        self.add_site("site", 4, network.site, "emb")
        self.requires_grad_(False).eval()

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.cat([torch.cos(timestep[:, None] * k) for k in range(1, 5)], 1),)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.run(state)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep)

    def run(self, state: torch.Tensor) -> torch.Tensor:
        return self.network(state, torch.zeros(1))


class Len(Plain):
    def run(self, state: torch.Tensor) -> torch.Tensor:
        return self.network(state, torch.zeros(len(state)))  # here


class Loop(Plain):
    def run(self, state: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.network(one[None], torch.zeros(1)) for one in state])  # here


class View(Plain):
    def run(self, state: torch.Tensor) -> torch.Tensor:
        return self.network(state.view(2, 3, 8, 8), torch.zeros(1))  # here


class Branch(Plain):
    def run(self, state: torch.Tensor) -> torch.Tensor:
        return self.network(state if state.shape[0] < 5 else -state, torch.zeros(1))  # here


class Height(Plain):
    def run(self, state: torch.Tensor) -> torch.Tensor:
        return self.network(state, torch.zeros(1)) + torch.linspace(0, 1, int(state.shape[2]))[:, None]  # here


class Item(Plain):
    def run(self, state: torch.Tensor) -> torch.Tensor:
        return self.network(state if state.sum().item() > 0 else -state, torch.zeros(1))  # here


class One(Plain):
    """At a batch of one it does something else: no guard of torch tells."""

    def run(self, state: torch.Tensor) -> torch.Tensor:
        found = self.network(state, torch.zeros(1))
        return found * 2 if state.shape[0] == 1 else found


class Cached(Plain):
    def run(self, state: torch.Tensor) -> torch.Tensor:
        if self.network.grid is None or self.network.grid.shape != state.shape:
            self.network.grid = torch.ones_like(state).cumsum(-1)
        return self.network(state, torch.zeros(1)) + self.network.grid


class Squeezed(Plain):
    def run(self, state: torch.Tensor) -> torch.Tensor:
        return self.network(state, torch.zeros(1)).squeeze()


class Wide(Plain):
    def run(self, state: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.network(state, torch.zeros(1))] * 2, 1)


@pytest.mark.parametrize(
    ("adapter", "axis", "way_out"),
    [*((one, "batch", "--batch 1") for one in (Len, Loop, View, Branch)), (Height, "height", "--dynamic batch")],
)
def test_a_number_is_refused_with_its_line(adapter: type[Plain], axis: str, way_out: str) -> None:
    dynamic = ("batch", "height") if axis == "height" else ("batch",)
    with pytest.raises(FixedAxisError) as error:
        trace_generic(adapter(), dynamic)
    text = str(error.value)
    assert f"leave {axis} dynamic" in text and f"{HERE}:" in text and "# here" in text and text.endswith(way_out)
    assert "\n" not in text


@pytest.mark.parametrize("adapter", [Len, Loop, Branch])
def test_with_one_size_it_is_exported(adapter: type[Plain]) -> None:
    found = adapter()
    for batch in (1, 3):
        model = trace_generic(found, ("batch",), batch)
        assert list(model.graph.inputs[0].shape or ()) == [batch, 3, 8, 8]
        state, emb = torch.randn(batch, 3, 8, 8), torch.randn(1, 4)
        (made,) = evaluate(model, {"state": state.numpy(), "emb/site": emb.numpy()}) or ()
        assert relative(made, found(state, emb).numpy()) < 1e-5


def test_what_cannot_be_traced_is_one_line() -> None:
    with pytest.raises(InputError, match=r"traced by torch\.export.*data-dependent") as error:
        trace_generic(Item())
    assert f"{HERE}:" in str(error.value) and "\n" not in str(error.value)


def test_another_result_at_another_batch_is_refused() -> None:
    with pytest.raises(InputError, match=r"batch 1|leave batch dynamic"):
        trace_generic(One())


def test_a_cache_is_left_as_it_was() -> None:
    """What the network keeps while it is traced has no numbers: it is gone afterwards, and the graph takes any size."""
    found = Cached()
    model = trace_generic(found, ("batch", "height", "width"))
    assert not isinstance(found.network.grid, torch._subclasses.FakeTensor)
    for shape in ((1, 3, 6, 4), (5, 3, 9, 8)):
        state, emb = torch.randn(shape), torch.randn(1, 4)
        (made,) = evaluate(model, {"state": state.numpy(), "emb/site": emb.numpy()}) or ()
        assert relative(made, found(state, emb).numpy()) < 1e-5


def test_an_output_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"output of the state's shape \[batch, 3, 8, 8\]; found \[batch, 6, 8, 8\]"):
        trace_generic(Wide())
    with pytest.raises(InputError, match=r"output of shape \(1, 3, 8, 8\) at batch 1, 3x8x8; found \(3, 8, 8\)"):
        trace_generic(Squeezed())


# --- the batch is known with the request -----------------------------------------------------------------------------


class SideBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mlp = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return x + self.conv(silu(x + self.mlp(torch.cat((time, label), -1))[:, :, None, None]))


class SideNet(nn.Module):
    """Time and class side by side: the time's row is repeated for the batch. A row of its own is for each image too."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.labels, self.row, self.of_row = nn.Linear(1, 16), nn.Embedding(5, 8), nn.Linear(4, 8), nn.Linear(8, 8)
        self.enter, self.leave, self.block = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1), SideBlock()

    def forward(self, x: torch.Tensor, t: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        rows = silu(self.row.weight.T[:1].expand(x.shape[0], -1) * 2)
        x = self.enter(x) + self.of_row(rows)[:, :, None, None]
        return self.leave(self.block(x, self.time(t[:, None]), self.labels(classes)))


class Side(HookedAdapter):
    family = "SideNet"

    def __init__(self, network: Any, scheduler_config: dict[str, Any]) -> None:
        super().__init__(network, scheduler_config)
        self.sample_shape, self.requests = (3, 8, 8), (Request("classes", "int64", high=5),)
        self.add_site("block", 16, network.block, "time")

    def embeddings(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.network.time(timestep[:, None]),)

    def meet(self, index: int, found: torch.Tensor) -> Any:
        return super().meet(index, found).expand(found.shape[0], -1)

    def call(self, state: torch.Tensor, requests: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.native(state, torch.zeros(requests["classes"].shape[0]), **requests)

    def native(self, state: torch.Tensor, timestep: torch.Tensor, **requests: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep.expand(state.shape[0]), requests["classes"])


def test_inspect_and_compiler_agree_on_the_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter = Side(SideNet(), EDM).requires_grad_(False).eval()
    said = {time: {name.removeprefix("network.") for name in names} for time, names in parameter_times(adapter).items()}
    bundle = export(tmp_path / "b", model=adapter, steps=1, plain=True, realisations=("baked",), quiet=True)
    held = {}
    for name in ("step_00", "prelude"):
        graph = onnx.load(str(Bundle.open(bundle.path).file(f"graphs/{name}.onnx")), load_external_data=False).graph
        held[name] = {tensor.name for tensor in graph.initializer}
    own = {name for name, _ in adapter.network.named_parameters()}
    assert said["prelude"] >= {"block.mlp.weight", "labels.weight", "of_row.weight"} and not said["prelude"] & held["step_00"]
    assert held["prelude"] & own <= said["prelude"] and held["step_00"] & own <= said["steps"]
    assert said["removed"] >= {"time.weight", "time.bias"}


# --- fold ------------------------------------------------------------------------------------------------------------


def test_fold_leaves_no_constants() -> None:
    """Fills, scatters, ranges, selections and splits of constants are evaluated; an output may be constant."""
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[n,2] x) => (float[n,2] y, float[2] z)
    <int64[1] two = {2}, int64[2,1] at = {0, 1}, float[2] by = {3, 4}, int64[1] zero = {0}, float[4] four = {1, 2, 3, 4}> {
        fill = ConstantOfShape<value = float[1] {1}>(two)
        put = ScatterND(fill, at, by)
        first, second = Split<axis = 0, num_outputs = 2>(four)
        where = Greater(put, second)
        chosen = Where(where, put, first)
        y = Add(x, chosen)
        z = Mul(put, chosen)
    }"""
    model = ir.from_onnx_text(text)
    feeds = {"x": np.ones((3, 2), np.float32)}
    expected = evaluate(model, feeds, reference=True)
    Fold()(model)
    assert not constant_nodes(model) and {node.op_type for node in model.graph} <= {"Add", "Identity"}
    for reference in (True, False):  # ONNX Runtime takes a constant output too
        for found, wanted in zip(evaluate(model, feeds, reference=reference) or (), expected or (), strict=True):
            np.testing.assert_array_equal(found, wanted)


# --- sizes -----------------------------------------------------------------------------------------------------------

UNET: dict[str, Any] = {"layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
CROSS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}


def unet(**options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    own = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "attention_head_dim": 16}
    return redraw(UNet2DModel(**{**own, **UNET, **BLOCKS, **options}))  # type: ignore[return-value]


def conditional(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    own = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "attention_head_dim": 2, "cross_attention_dim": 12}
    return redraw(UNet2DConditionModel(**{**own, **UNET, **CROSS, **options}))  # type: ignore[return-value]


def test_a_unet_takes_what_diffusers_takes() -> None:
    """9x13 runs in diffusers' UNet2DConditionModel, whose graph of that size computes the same."""
    network = conditional()
    adapter = UNet2DConditionAdapter(network, {"_class_name": "DDPMScheduler"}).requires_grad_(False).eval()
    adapter.set_size(9, 13)
    model = trace_generic(adapter)
    state, given = torch.randn(3, 2, 9, 13), adapter.draw_requests(3, 0)
    with torch.no_grad():
        expected = network(state, 7, given["encoder_hidden_states"]).sample
        (emb, *_) = adapter.embeddings(torch.tensor([7.0]))
    feeds = {"state": state, "encoder_hidden_states": given["encoder_hidden_states"]}
    feeds |= {f"emb/{site.name}": emb for site in adapter.sites}
    (found,) = evaluate(model, {name: value.numpy() for name, value in feeds.items()}) or ()
    assert relative(found, expected.numpy()) < 1e-4
    with pytest.raises(InputError, match="multiples of 2; found 9x13; pass --size 8x12, say, or --dynamic without height"):
        export(Path("nowhere"), model=adapter, plain=True, steps=1, dynamic=["batch", "height", "width"], quiet=True)
    for size in ((0, 8), (-2, 8), (8, 10**6)):
        with pytest.raises(InputError, match="pass --size"):
            adapter.set_size(*size)


def test_a_size_that_cannot_run_names_one_that_does() -> None:
    for options, message in (
        ({"sample_size": 7}, "multiples of 2; found 7x7; pass --size 8x8"),
        ({"sample_size": (8, 5)}, "found 8x5; pass --size 8x4"),
        ({"sample_size": None}, "names no sample_size; pass --size HEIGHTxWIDTH, in multiples of 2"),
    ):
        adapter = UNet2DAdapter(unet(**options), {"_class_name": "DDPMScheduler"})
        with pytest.raises(InputError, match=message):
            adapter.set_size(*adapter.sample_shape[-2:])
        adapter.set_size(6, 10)
        assert adapter.sample_shape == (1, 6, 10)


def test_no_sample_size_is_no_size(tmp_path: Path) -> None:
    """Through the loader, with weights and without: --size is what it takes."""
    model = save_pipeline(tmp_path / "m", unet(sample_size=None), DDPMScheduler(), "unet")
    for weights in (True, False):
        assert load_backbone(model, size=(6, 10), weights=weights).sample_shape == (1, 6, 10)
        with pytest.raises(InputError, match="names no sample_size; pass --size HEIGHTxWIDTH, in multiples of 2"):
            load_backbone(model, weights=weights)


def test_channels() -> None:
    """A learned variance is cut off as the scheduler does; other outputs are no prediction."""
    network = unet(out_channels=2)
    adapter = UNet2DAdapter(network, {"_class_name": "DDPMScheduler", "variance_type": "learned_range"})
    state = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = network(state, torch.tensor([5.0])).sample[:, :1]
        torch.testing.assert_close(adapter.at_timestep(state, 5.0), expected)
    with pytest.raises(InputError, match="in_channels 1, out_channels 2"):
        UNet2DAdapter(network, {"_class_name": "DDPMScheduler"})
    with pytest.raises(InputError, match=r"in_channels 9, out_channels 4 \(inpainting, editing, super-resolution"):
        UNet2DConditionAdapter(conditional(in_channels=9, out_channels=4), {"_class_name": "DDPMScheduler"})
