"""Every packaged adapter against its diffusers class, called by the test itself as the pipeline calls it: ``native`` at times
that differ between rows, and the adapter with the pretrained embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import test_time_only
import test_transformers
import torch
from families import redraw
from helpers import relative
from test_requests import random_dit
from test_requests import random_unet as unet
from test_unet2d_condition import SDXL
from test_unet2d_condition import random_unet as conditional

from mteo_deploy.exporters.base import Adapter, families
from mteo_deploy.exporters.check_adapter import TOLERANCE, check_adapter
from mteo_deploy.exporters.guidance import guided

Requests = dict[str, torch.Tensor]
SIZE, TOKENS = test_transformers.SIZE, test_transformers.TOKENS
TIMES = (130.5, 700.0)


@dataclass(frozen=True)
class Case:
    """A network, its diffusers call for a state of one row at a time, and the scheduler its time is of."""

    network: Callable[[], Any]
    call: Callable[[Any, torch.Tensor, float, Requests], torch.Tensor]
    scheduler: dict[str, Any]
    sized: bool = False
    tokens: int | None = None


def call_unet(network: Any, state: torch.Tensor, t: float, given: Requests) -> torch.Tensor:
    return network(state, torch.tensor([t]), **given).sample  # a Python number would be cut to an integer


def call_conditional(network: Any, state: torch.Tensor, t: float, given: Requests) -> torch.Tensor:
    pooled = {name: values for name, values in given.items() if name != "encoder_hidden_states"}
    return network(state, torch.tensor([t]), given["encoder_hidden_states"], added_cond_kwargs=pooled).sample


def call_dit(network: Any, state: torch.Tensor, t: float, given: Requests) -> torch.Tensor:
    return network(state, timestep=torch.tensor([t]), class_labels=given["class_labels"]).sample[:, :1]


def rows_of(call: Callable[..., torch.Tensor]) -> Callable[[Any, torch.Tensor, float, Requests], torch.Tensor]:
    return lambda network, state, t, given: call(network, state, torch.tensor([t]), given)


DDPM = {"_class_name": "DDPMScheduler"}
CASES = {
    "unet": Case(lambda: unet(num_class_embeds=None), call_unet, DDPM),
    "unet with classes": Case(unet, call_unet, DDPM),
    "stable diffusion": Case(conditional, call_conditional, DDPM),
    "sdxl": Case(partial(conditional, **SDXL), call_conditional, DDPM),
    "dit": Case(random_dit, call_dit, DDPM),
    **{
        name: Case(
            f.network, f.call, dict(f.scheduler.config, _class_name=type(f.scheduler).__name__), True, test_transformers.TOKENS
        )
        for name, f in test_transformers.FAMILIES.items()
    },
    **{
        name: Case(
            f.network,
            rows_of(f.call),
            dict(f.scheduler.config, _class_name=type(f.scheduler).__name__),
            True,
            None if "cogvideox" in name else test_time_only.TOKENS,
        )
        for name, f in test_time_only.FAMILIES.items()
    },
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Case, Any, Adapter]:
    """A case, its network without hooks, and the adapter of another that has the same weights."""
    chosen = CASES[request.param]
    torch.manual_seed(0)
    network = redraw(chosen.network())
    again = type(network)(**{key: value for key, value in network.config.items() if not key.startswith("_")})
    again.load_state_dict(network.state_dict())
    adapter = families()[type(network).__name__](again, chosen.scheduler)
    if chosen.sized:
        adapter.set_size(*SIZE)
    if chosen.tokens is not None:
        adapter.set_tokens(chosen.tokens)
    return chosen, network, adapter.requires_grad_(False).eval()


def test_every_family_is_here() -> None:
    assert {type(one.network()).__name__ for one in CASES.values()} == set(families())


@torch.no_grad()
def test_native_and_adapter_are_the_network(case: tuple[Case, Any, Adapter]) -> None:
    chosen, network, adapter = case
    state, given = torch.randn(2, *adapter.sample_shape), adapter.draw_requests(2, 1)
    rows = [(state[i : i + 1], TIMES[i], {name: values[i : i + 1] for name, values in given.items()}) for i in range(2)]
    expected = [chosen.call(network, one, t, requests) for one, t, requests in rows]
    assert relative(expected[1].numpy(), chosen.call(network, rows[1][0], TIMES[0], rows[1][2]).numpy()) > 1e-4
    native = adapter.native(state, torch.tensor(TIMES), **given)
    torch.testing.assert_close(native, torch.cat(expected), rtol=1e-4, atol=1e-5)
    for (one, t, requests), wanted in zip(rows, expected, strict=True):
        torch.testing.assert_close(adapter.at_timestep(one, t, **requests), wanted, rtol=1e-4, atol=1e-5)


def test_every_family_passes_the_check(case: tuple[Case, Any, Adapter]) -> None:
    """The export's own comparison, at times of the scheduler's levels."""
    assert check_adapter(case[2]).error < TOLERANCE / 10


@pytest.mark.parametrize("case", [name for name in CASES if name != "unet"], indirect=True)
@torch.no_grad()
def test_native_under_guidance(case: tuple[Case, Any, Adapter]) -> None:
    """Both branches at the image's own time."""
    adapter = case[2]
    both = guided(adapter, 2.0, 0 if adapter.family == "UNet2DModel" else None)
    state, given = torch.randn(2, *adapter.sample_shape), both.draw_requests(2, 1)
    found = both.native(state, torch.tensor(TIMES), **given)
    for i, t in enumerate(TIMES):
        one = both.at_timestep(state[i : i + 1], t, **{name: values[i : i + 1] for name, values in given.items()})
        torch.testing.assert_close(found[i : i + 1], one, rtol=1e-4, atol=1e-4)
