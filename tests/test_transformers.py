"""PixArt, SD3 and FLUX, small and random, from torch to an engine; their published configurations on the meta device.

A family is a row of ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from families import (
    check_checkpointing,
    engine_error,
    ordinary_states,
    parameters_of,
    prelude_weights,
    random_requests,
    redraw,
    save_pipeline,
    step_weights,
)
from helpers import failed, relative
from networks import flux, pixart, sd3

from mteo_deploy.bundle import Bundle
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, families, load_backbone
from mteo_deploy.exporters.describe import describe, parameter_times
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.guidance import guided
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import noise_for
from mteo_deploy.verification import verify

SIZE, TOKENS = (4, 8), 5
ROWS, COLUMNS = SIZE[0] // 2, SIZE[1] // 2

Requests = dict[str, torch.Tensor]


def call_flux(network: Any, state: torch.Tensor, t: float, requests: Requests) -> torch.Tensor:
    """As diffusers' pipeline does: patches of 2x2 in rows, their places beside them."""
    places = [(i, j) for i in range(ROWS) for j in range(COLUMNS)]
    patches = [state[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1) for i, j in places]
    ids, none = torch.tensor([[0.0, i, j] for i, j in places]), torch.zeros(TOKENS, 3)
    times = torch.full(state.shape[:1], t / 1000)
    output = network(torch.stack(patches, 1), timestep=times, img_ids=ids, txt_ids=none, return_dict=False, **requests)[0]
    found = torch.zeros_like(state)
    for k, (i, j) in enumerate(places):
        found[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = output[:, k].reshape(-1, 4, 2, 2)
    return found


def call_sd3(network: Any, state: torch.Tensor, t: float, requests: Requests) -> torch.Tensor:
    return network(state, timestep=torch.full(state.shape[:1], t), return_dict=False, **requests)[0]


def call_pixart(network: Any, state: torch.Tensor, t: float, requests: Requests) -> torch.Tensor:
    sizes = {name: requests[name] for name in ("resolution", "aspect_ratio") if name in requests}
    prompt = {name: requests[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}
    times = torch.full(state.shape[:1], t)
    return network(state, timestep=times, added_cond_kwargs=sizes, return_dict=False, **prompt)[0].chunk(2, dim=1)[0]


@dataclass(frozen=True)
class Family:
    """How to make one, call it as it is, and what its step graphs must not hold: in the ``prelude``, or ``removed``.

    Attributes:
        sites: how many.
        exported: whether it goes on to an engine: one row of each kind does.
        meets: the request inputs that the embedding of the output's norm meets; without any, all modulation is constant.
    """

    network: Callable[[], Any]
    call: Callable[[Any, torch.Tensor, float, Requests], torch.Tensor]
    scheduler: Any
    sites: int
    prelude: tuple[str, ...]
    removed: tuple[str, ...]
    exported: bool = True
    meets: str = ""


POOLED = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "text_embedder", "context_embedder")
EMBEDDER = ("timestep_embedder",)
DYNAMIC, FLOW = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "FlowMatchEulerDiscreteScheduler"
CAPTION = ("caption_projection", "attn2.to_k", "attn2.to_v")

FAMILIES = {
    "flux-dev": Family(
        partial(flux, guidance_embeds=True),
        call_flux,
        DYNAMIC,
        4,
        (*POOLED, "norm.linear", "guidance_embedder"),
        EMBEDDER,
        meets="pooled_projections, guidance",
    ),
    "flux-schnell": Family(flux, call_flux, FlowMatchEulerDiscreteScheduler(), 4, POOLED, EMBEDDER, exported=False),
    "sd3.5": Family(
        partial(sd3, dual_attention_layers=(0,), qk_norm="rms_norm"),
        call_sd3,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        5,
        POOLED,
        EMBEDDER,
        meets="pooled_projections",
    ),
    "sd3": Family(sd3, call_sd3, DYNAMIC, 5, POOLED, EMBEDDER, exported=False),
    "pixart-alpha": Family(
        partial(pixart, use_additional_conditions=True),
        call_pixart,
        DDIMScheduler(),
        3,
        (*CAPTION, "adaln_single.linear", "resolution_embedder"),
        EMBEDDER,
        meets="resolution, aspect_ratio",
    ),
    "pixart-sigma": Family(pixart, call_pixart, DDIMScheduler(), 3, CAPTION, ("timestep_embedder", "adaln_single.linear")),
}
EXPORTED = [name for name, family in FAMILIES.items() if family.exported]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    family = FAMILIES[request.param]
    return save_pipeline(tmp_path_factory.mktemp("pipelines") / request.param, redraw(family.network()), family.scheduler)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Adapter:
    return load_backbone(model, size=SIZE, tokens=TOKENS)


@pytest.fixture(scope="module")
def bundle(model: Path, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / model.name
    made = export(path, model=adapter, steps=2, plain=True, quiet=True)
    build(made, engine="onnxruntime", realisation="baked", threads=1, quiet=True)
    return path


every = pytest.mark.parametrize("model", FAMILIES, indirect=True)
exported = pytest.mark.parametrize("model", EXPORTED, indirect=True)


@every
def test_adapter_is_the_model(model: Path, adapter: Adapter) -> None:
    family, network = FAMILIES[model.name], adapter.network_class.from_pretrained(model / "transformer")
    state, given = torch.randn(3, *adapter.sample_shape), adapter.draw_requests(3, 1)
    given |= {r.name: 1 + torch.arange(3.0) for r in adapter.requests if r.default is not None}
    assert adapter.sample_shape == (4, *SIZE) and len(adapter.sites) == family.sites
    with torch.no_grad():
        expected = family.call(network, state, 300.0, given)
        torch.testing.assert_close(adapter.at_timestep(state, 300.0, **given), expected)
        torch.testing.assert_close(family.call(adapter.network, state, 300.0, given), expected)  # and unmodified again
        for name in given:
            other = adapter.at_timestep(state, 300.0, **{**given, name: given[name].roll(1, 0)})
            assert relative(other.numpy(), expected.numpy()) > 1e-4, name
        base = adapter.embeddings(torch.tensor([300.0]))
        assert len({id(one) for one in base}) == 1
        for index in range(len(base)):  # each site has its say
            moved = [one + 0.5 * (i == index) for i, one in enumerate(base)]
            assert relative(adapter(state, *moved, **given).numpy(), expected.numpy()) > 1e-3, adapter.sites[index]


@every
def test_inspect_needs_no_weights(model: Path, adapter: Adapter) -> None:
    outline = load_backbone(model, size=SIZE, tokens=TOKENS, weights=False)
    assert next(outline.parameters()).is_meta
    assert describe(outline) == describe(adapter)


def test_pixart_sigma_has_longer_prompts(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline", pixart(), DDIMScheduler())
    index = pipeline / "model_index.json"
    assert load_backbone(pipeline, weights=False).tokens == 120
    index.write_text(index.read_text().replace("PixArtAlphaPipeline", "PixArtSigmaPipeline"))
    found = load_backbone(pipeline, weights=False)
    assert found.tokens == 300 and found.requests[0].shape == (300, 10)


@exported
def test_states_equal_torch(bundle: Path, adapter: Adapter) -> None:
    assert max(engine_error(bundle, realisation, adapter) for realisation in NAMES) < 1e-4


@exported
def test_nothing_of_the_time_is_left_in_the_steps(model: Path, bundle: Path, adapter: Adapter) -> None:
    """What requests meet is the prelude's, the rest is gone; and what ``inspect`` says beforehand is what export does."""
    family, steps, prelude = FAMILIES[model.name], step_weights(bundle), prelude_weights(bundle)
    for graph, names in steps.items():
        assert not [name for name in names if any(part in name for part in (*family.prelude, *family.removed))], graph
    for part in family.prelude:
        assert [name for name in prelude if part in name], part
    assert not [name for name in prelude if any(part in name for part in family.removed)]
    own = {name for name, _ in adapter.network.named_parameters()}
    foreseen = {time: {name.removeprefix("network.") for name in names} for time, names in parameter_times(adapter).items()}
    assert own & prelude <= foreseen["prelude"] and foreseen["removed"] | foreseen["prelude"] | foreseen["steps"] == own
    for names in steps.values():
        assert own & names <= foreseen["steps"]
    assert {name for name in foreseen["prelude"] if name.endswith(".bias")} <= prelude


@exported
def test_what_became_of_the_sites(model: Path, bundle: Path) -> None:
    """Constant modulation is absorbed into the norms, gates stay vectors; what meets a request is hoisted."""
    compiler = Bundle.open(bundle).manifest["compiler"]
    assert all("flops" in graph["work"] for graph in compiler["graphs"])
    found = compiler["sites"]
    details = [
        text for site in found for where in site["constants"].values() for kind, text in where.items() if kind == "baked"
    ]
    assert len(found) == FAMILIES[model.name].sites and details
    if FAMILIES[model.name].meets:
        assert all(text.startswith("hoisted: meets") for text in details)
        assert details[-1] == f"hoisted: meets {FAMILIES[model.name].meets} before its layer"
        return
    kept = [text for text in details if not text.startswith("rule")]
    assert len(kept) == 4 and all("kept as a vector" in text for text in kept)  # two gates in each block
    assert len(details) - len(kept) >= 2


@every
def test_guidance(model: Path, adapter: Adapter) -> None:
    """Both branches in one call: masks and prompts have a negative of their own, sizes and FLUX's guidance are the same."""
    both = guided(adapter, 2.0)
    own = {f"negative_{request.name}" for request in adapter.requests if request.name not in adapter.negatives}
    assert {request.name for request in both.requests} == {r.name for r in adapter.requests} | own | {"guidance_scale"}
    state, given = torch.randn(2, *adapter.sample_shape), both.draw_requests(2, 1)
    positive = {request.name: given[request.name] for request in adapter.requests}
    negative = {name: given.get(f"negative_{name}", values) for name, values in positive.items()}
    with torch.no_grad():
        a, b = (adapter.at_timestep(state, 300.0, **one) for one in (negative, positive))
        torch.testing.assert_close(both.at_timestep(state, 300.0, **given), a + 2.0 * (b - a), rtol=1e-4, atol=1e-4)


@exported
def test_distill_lowers_the_error(model: Path, adapter: Adapter, tmp_path: Path) -> None:
    recipe = Recipe(trajectories=8, iterations=6, batch=8, teacher_evaluations=8, lr=0.02)
    prompts = random_requests(adapter, 5, tmp_path / "prompts.npz")
    found = distill(adapter, tmp_path / "e.safetensors", steps=2, recipe=recipe, requests=prompts, quiet=True)
    assert found.training["error_after"] < found.training["error_before"]


@every
def test_checkpointing(adapter: Adapter) -> None:
    check_checkpointing(adapter, by_block=True)


@pytest.mark.parametrize("model", ["flux-dev"], indirect=True)
def test_verify_and_the_pipelines_schedule(model: Path, bundle: Path, adapter: Adapter) -> None:
    """The bundle's steps are those that diffusers' pipeline takes at this size, by its own scheduler."""
    report = verify(bundle, seconds=0, quiet=True)
    assert report.passed, failed(report)
    tokens, slope = ROWS * COLUMNS, (1.15 - 0.5) / (4096 - 256)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(DYNAMIC.config)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 2, 2), mu=tokens * slope + 0.5 - 256 * slope)
    noise, given = noise_for(adapter.sample_shape, 4, range(3)), adapter.draw_requests(3, 2)
    sample = torch.from_numpy(noise)
    with torch.no_grad():
        for t in scheduler.timesteps:
            sample = scheduler.step(call_flux(adapter.network, sample, float(t), given), t, sample, return_dict=False)[0]
    found = ordinary_states(adapter, Bundle.open(bundle).plan, noise, given)[-1]
    assert relative(found, sample.numpy()) < 1e-5


SD35 = {"qk_norm": "rms_norm", "joint_attention_dim": 4096}
PUBLISHED = {
    "FLUX.1-dev": (FluxTransformer2DModel, {"guidance_embeds": True}, 11_901_408_320, 0.274, 0.721),
    "FLUX.1-schnell": (FluxTransformer2DModel, {}, 11_891_178_560, 0.274, 0.722),
    "SD3.5-large": (
        SD3Transformer2DModel,
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192, **SD35},
        8_056_627_520,
        0.334,
        0.661,
    ),
    "SD3.5-medium": (
        SD3Transformer2DModel,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            **SD35,
        },
        2_243_171_520,
        0.343,
        0.648,
    ),
    "PixArt-alpha 1024": (PixArtTransformer2DModel, {"caption_channels": 4096}, 611_349_152, 0.016, 0.852),
    "PixArt-Sigma 1024": (
        PixArtTransformer2DModel,
        {"caption_channels": 4096, "use_additional_conditions": False},
        610_856_096,
        0.016,
        0.852,
    ),
}
"""Class, configuration, parameters; share of them in modulation and the time's embedder, and share left in the step graphs."""

MODULATION = (
    "norm1.linear",
    "norm1_context.linear",
    "norm.linear",
    "norm_out.linear",
    "adaln_single.linear",
    "timestep_embedder",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration(name: str) -> None:
    cls, config, parameters, modulation, steps = PUBLISHED[name]
    with torch.device("meta"):
        network = cls(**config)
    found = families()[cls.__name__](
        network,
        {"_class_name": "DDPMScheduler"} if cls is PixArtTransformer2DModel else {**DYNAMIC.config, "_class_name": FLOW},
    )
    times, sizes = parameter_times(found), {name: p.numel() for name, p in found.named_parameters()}
    assert found.parameter_count == parameters
    assert round(parameters_of(network, MODULATION) / parameters, 3) == modulation
    assert round(sum(sizes[one] for one in times["steps"]) / parameters, 3) == steps
    assert not [one for one in times["steps"] if any(part in one for part in MODULATION)]
    assert found.sample_shape[1:] == (128, 128)


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (partial(flux, out_channels=4), "16 input and 4 output"),
        (partial(flux, patch_size=2), "patch_size 2"),
    ],
)
def test_other_kinds_are_refused(network: Callable[[], Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        families()[type(built := network()).__name__](built, {"_class_name": "FlowMatchEulerDiscreteScheduler"})


@pytest.mark.parametrize("model", ["sd3"], indirect=True)
def test_sizes_that_are_refused(model: Path) -> None:
    with pytest.raises(InputError, match="up to 16x16"):
        load_backbone(model, size=(8, 18))
    with pytest.raises(InputError, match="multiples of 2; found 8x7"):
        load_backbone(model, size=(8, 7))
