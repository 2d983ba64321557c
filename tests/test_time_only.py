"""Families whose modulation depends on the time alone, small and random, from torch to an engine: Qwen-Image, AuraFlow,
Lumina 2, CogVideoX and Sana; their published configurations on the meta device.

A family is a row of ``FAMILIES``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from families import (
    check_checkpointing,
    engine_error,
    ordinary_states,
    parameters_of,
    random_requests,
    redraw,
    save_pipeline,
    step_weights,
)
from helpers import failed, relative
from networks import auraflow, cogvideox, lumina, qwen, sana

from mteo_deploy.bundle import Bundle
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, families, load_backbone
from mteo_deploy.exporters.cogvideox import CogVideoXAdapter
from mteo_deploy.exporters.describe import describe, parameter_times
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.rotary import RealRotations, Rotation
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import noise_for
from mteo_deploy.verification import verify

SIZE, TOKENS = (4, 8), 6

Requests = dict[str, torch.Tensor]


def call_qwen(network: Any, state: torch.Tensor, t: torch.Tensor, requests: Requests) -> torch.Tensor:
    """As diffusers' pipeline does: patches of 2x2 in rows."""
    rows, columns = SIZE[0] // 2, SIZE[1] // 2
    places = [(2 * i, 2 * j) for i in range(rows) for j in range(columns)]
    packed = torch.stack([state[:, :, i : i + 2, j : j + 2].flatten(1) for i, j in places], 1)
    shapes, times = [[(1, rows, columns)]] * len(state), t.expand(len(state)) / 1000
    output = network(packed, timestep=times, img_shapes=shapes, return_dict=False, **requests)[0]
    found = torch.zeros_like(state)
    for k, (i, j) in enumerate(places):
        found[:, :, i : i + 2, j : j + 2] = output[:, k].reshape(-1, 4, 2, 2)
    return found


def call_auraflow(network: Any, state: torch.Tensor, t: torch.Tensor, requests: Requests) -> torch.Tensor:
    return network(state, timestep=(t / 1000).expand(len(state)), return_dict=False, **requests)[0]


def call_lumina(network: Any, state: torch.Tensor, t: torch.Tensor, requests: Requests) -> torch.Tensor:
    return -network(state, timestep=(1 - t / 1000).expand(len(state)), return_dict=False, **requests)[0]


def call_plain(network: Any, state: torch.Tensor, t: torch.Tensor, requests: Requests) -> torch.Tensor:
    return network(state, timestep=t.expand(len(state)), return_dict=False, **requests)[0]


def call_rotary(network: Any, state: torch.Tensor, t: torch.Tensor, requests: Requests) -> torch.Tensor:
    """CogVideoX-5b's positions, of the size it was made for."""
    size = SIZE[0] // 2, SIZE[1] // 2
    turns = get_3d_rotary_pos_embed(16, ((0, 0), size), size, state.shape[1])
    return network(state, timestep=t.expand(len(state)), image_rotary_emb=turns, return_dict=False, **requests)[0]


@dataclass(frozen=True)
class Family:
    """How to make one, call it as its pipeline does, and what baking must do to it.

    Attributes:
        sites: how many.
        time: parts of parameter names that no graph may hold.
        fates: of a step graph's constants that came of sites: how many became part of a norm, were merged with an RMS norm's
            own scale, stayed vectors for want of a layer that all evaluations could share, or went to the prelude.
        exported: whether it goes on to an engine.
    """

    network: Callable[[], Any]
    call: Callable[[Any, torch.Tensor, torch.Tensor, Requests], torch.Tensor]
    scheduler: Any
    sites: int
    time: tuple[str, ...]
    fates: dict[str, int]
    exported: bool = True


FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
DDIM = partial(CogVideoXDDIMScheduler, prediction_type="v_prediction", timestep_spacing="trailing")

FAMILIES = {
    "qwen-image": Family(
        qwen,
        call_qwen,
        FLOW,
        5,
        ("timestep_embedder", "img_mod", "txt_mod", "norm_out"),
        {"norm": 14, "prelude": 2, "vector": 6},
    ),
    "auraflow": Family(
        auraflow,
        call_auraflow,
        FLOW,
        4,
        ("time_step_proj", "norm1.linear", "norm1_context.linear", "norm_out"),
        {"norm": 10, "vector": 8, "prelude": 2},  # of the first block's text, which no evaluation has changed yet
    ),
    "lumina2": Family(
        lumina, call_lumina, FLOW, 3, ("timestep_embedder", "norm1.linear", "norm_out.linear_1"), {"merged": 8, "norm": 1}
    ),
    "cogvideox-2b": Family(
        cogvideox,
        call_plain,
        DDIM(),
        3,
        ("time_embedding", "norm1.linear", "norm2.linear", "norm_out.linear"),
        {"norm": 10, "vector": 3},
    ),
    "cogvideox-5b": Family(
        partial(cogvideox, use_rotary_positional_embeddings=True),
        call_rotary,
        DDIM(),
        3,
        ("time_embedding",),
        {},
        exported=False,
    ),
    "sana": Family(sana, call_plain, FLOW, 2, ("time_embed",), {"norm": 6, "vector": 2}),
}
EXPORTED = [name for name, family in FAMILIES.items() if family.exported]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    family = FAMILIES[request.param]
    return save_pipeline(tmp_path_factory.mktemp("pipelines") / request.param, redraw(family.network()), family.scheduler)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Adapter:
    return load_backbone(model, size=SIZE, tokens=None if "cogvideox" in model.name else TOKENS)


@pytest.fixture(scope="module")
def bundle(model: Path, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / model.name
    made = export(path, model=adapter, steps=2, plain=True, quiet=True)
    build(made, engine="onnxruntime", realisation="baked", threads=1, quiet=True)
    return path


every = pytest.mark.parametrize("model", FAMILIES, indirect=True)
exported = pytest.mark.parametrize("model", EXPORTED, indirect=True)


def prompts(adapter: Adapter, count: int, seed: int) -> Requests:
    """Random request inputs; a mask has tokens first and then padding, another number of them in each row."""
    masks = {r.name: (torch.arange(TOKENS) < 2 + torch.arange(count)[:, None]).long() for r in adapter.requests if r.mask}
    return adapter.draw_requests(count, seed) | masks


@every
def test_adapter_is_the_model(model: Path, adapter: Adapter) -> None:
    family, network = FAMILIES[model.name], adapter.network_class.from_pretrained(model / "transformer")
    state, given, t = torch.randn(3, *adapter.sample_shape), prompts(adapter, 3, 1), torch.tensor([300.0])
    assert adapter.sample_shape[-3:] == (4, *SIZE) and len(adapter.sites) == family.sites
    with torch.no_grad():
        expected = family.call(network, state, t, given)
        torch.testing.assert_close(adapter.at_timestep(state, 300.0, **given), expected)
        torch.testing.assert_close(family.call(adapter.network, state, t, given), expected)  # and unmodified again
        for name in given:
            other = adapter.at_timestep(state, 300.0, **{**given, name: given[name].roll(1, 0)})
            assert relative(other.numpy(), expected.numpy()) > 1e-4, name
        base = adapter.embeddings(t)
        assert len({id(one) for one in base}) == 1
        for index in range(len(base)):  # each site has its say
            moved = [one + 0.5 * (i == index) for i, one in enumerate(base)]
            assert relative(adapter(state, *moved, **given).numpy(), expected.numpy()) > 1e-4, adapter.sites[index]


@every
def test_a_step_is_the_pipelines(model: Path, adapter: Adapter) -> None:
    """Direction of time and sign of the output: Euler's steps are those of the pipeline's own scheduler."""
    family, steps = FAMILIES[model.name], 4
    plan = adapter.compile_plan(steps, "euler", "scheduler")
    scheduler = type(family.scheduler).from_config(family.scheduler.config)
    handed = np.linspace(1, 1 / steps, steps) if model.name in ("qwen-image", "lumina2") else None  # as these pipelines do
    scheduler.set_timesteps(steps) if handed is None else scheduler.set_timesteps(sigmas=handed)
    noise, given = noise_for(adapter.sample_shape, 4, range(2)), prompts(adapter, 2, 2)
    found, sample = ordinary_states(adapter, plan, noise, given), torch.from_numpy(noise) * plan.initial_scale
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            output = family.call(adapter.network, sample, t.float(), given)
            sample = scheduler.step(output, t, sample, return_dict=False)[0]
            assert relative(found[i], sample.numpy()) < 1e-4, i


@every
def test_inspect_needs_no_weights(model: Path, adapter: Adapter) -> None:
    outline = load_backbone(model, size=SIZE, tokens=None if "cogvideox" in model.name else TOKENS, weights=False)
    assert next(outline.parameters()).is_meta
    assert describe(outline) == describe(adapter)


@exported
def test_states_equal_torch(bundle: Path, adapter: Adapter) -> None:
    assert max(engine_error(bundle, realisation, adapter) for realisation in NAMES) < 1e-4


@exported
def test_no_weight_of_the_time_is_left(model: Path, bundle: Path, adapter: Adapter) -> None:
    """Not in a step graph, not in the prelude; and that is what ``inspect`` says beforehand."""
    family, removed = FAMILIES[model.name], parameter_times(adapter)["removed"]
    graphs = step_weights(bundle)
    assert len(graphs) == 4
    for graph, names in graphs.items():
        assert not [name for name in names if any(part in name for part in family.time)], graph
        assert not removed & {f"network.{name}" for name in names}, graph
    sizes = {name: parameter.numel() for name, parameter in adapter.named_parameters()}
    assert sum(sizes[name] for name in removed) >= parameters_of(adapter.network, family.time) > 0


@exported
def test_what_became_of_the_sites(model: Path, bundle: Path) -> None:
    """Scale and shift are absorbed, and gates where a norm is before them."""
    found = Bundle.open(bundle).manifest["compiler"]["sites"]
    details = [where["baked"] for site in found for where in site["constants"].values()]
    kinds = {
        "rule C": "norm",
        "merged with": "merged",
        "the layer would store its weight": "vector",
        "the value it acts on": "vector",
        "hoisted": "prelude",
    }
    fates = Counter(next((kind for start, kind in kinds.items() if text.startswith(start)), text) for text in details)
    assert len(found) == FAMILIES[model.name].sites and fates == FAMILIES[model.name].fates


@exported
def test_distill_lowers_the_error(model: Path, adapter: Adapter, tmp_path: Path) -> None:
    recipe = Recipe(trajectories=8, iterations=6, batch=8, teacher_evaluations=8, lr=0.02)
    prompts = random_requests(adapter, 5, tmp_path / "prompts.npz")
    found = distill(adapter, tmp_path / "e.safetensors", steps=2, recipe=recipe, requests=prompts, quiet=True)
    assert found.training["error_after"] < found.training["error_before"]


@every
def test_checkpointing(model: Path, adapter: Adapter) -> None:
    check_checkpointing(adapter, by_block=model.name not in ("qwen-image", "lumina2"))


@pytest.mark.parametrize("model", ["cogvideox-2b"], indirect=True)
def test_verify_takes_videos(bundle: Path) -> None:
    report = verify(bundle, seconds=0, quiet=True)
    assert report.passed, failed(report)


def test_rotations_are_complex_products() -> None:
    """What a network computes with complex numbers, at the same places, is what it computes without."""
    values, factors = torch.randn(2, 5, 3, 8), torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    expected = apply_rotary_emb_qwen(values, factors, use_real=False)
    with RealRotations():
        found = apply_rotary_emb_qwen(values, Rotation.of(factors), use_real=False)
    torch.testing.assert_close(found, expected)
    assert torch.view_as_complex(torch.zeros(1, 2)).is_complex()


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (partial(qwen, use_layer3d_rope=True), "use_layer3d_rope"),
        (partial(lumina, out_channels=8), "4 input and 8 output"),
        (partial(cogvideox, ofs_embed_dim=12), "ofs_embed_dim 12"),
        (partial(cogvideox, patch_size_t=1), "patch_size_t 1"),
        (partial(sana, guidance_embeds=True), "Sprint"),
    ],
)
def test_other_kinds_are_refused(network: Callable[[], Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        families()[type(built := network()).__name__](built, {"_class_name": "FlowMatchEulerDiscreteScheduler"})


@pytest.mark.parametrize(("model", "largest"), [("auraflow", "8x8"), ("lumina2", "16x16")], indirect=["model"])
def test_sizes_that_are_refused(model: Path, largest: str) -> None:
    with pytest.raises(InputError, match=f"up to {largest} for this network; found 4x18"):
        load_backbone(model, size=(4, 18), weights=False)


@pytest.mark.parametrize("model", ["lumina2"], indirect=True)
def test_tokens_that_are_refused(model: Path) -> None:
    with pytest.raises(InputError, match="--tokens of up to 11"):
        load_backbone(model, tokens=12, weights=False)


@pytest.mark.parametrize("model", ["cogvideox-5b"], indirect=True)
def test_videos_of_another_size(model: Path) -> None:
    """Positions of a narrower video lie in the middle of those that the network was trained on."""
    found = load_backbone(model, size=(4, 4))
    assert found.sample_shape == (3, 4, 4, 4) and isinstance(found, CogVideoXAdapter) and found.turns is not None
    expected = get_3d_rotary_pos_embed(16, ((0, 1), (2, 3)), (2, 2), 3)
    torch.testing.assert_close(found.turns, expected)


PUBLISHED = {
    "Qwen-Image": (QwenImageTransformer2DModel, {}, "qwen-image", 121, 20_430_401_088, 6_911_047_680, 13_480_015_680),
    "AuraFlow": (AuraFlowTransformer2DModel, {}, "auraflow", 41, 6_833_439_744, 2_294_028_288, 4_504_783_872),
    "Lumina-Image 2.0": (
        Lumina2Transformer2DModel,
        {"cap_feat_dim": 2304},
        "lumina2",
        29,
        2_609_769_152,
        268_173_568,
        2_180_550_208,
    ),
    "CogVideoX-2b": (CogVideoXTransformer3DModel, {}, "cogvideox-2b", 61, 1_693_783_872, 357_801_728, 1_328_115_904),
    "CogVideoX-5b": (
        CogVideoXTransformer3DModel,
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        "cogvideox-2b",
        85,
        5_570_283_072,
        799_259_648,
        4_758_437_440,
    ),
    "Sana 1.6B": (SanaTransformer2DModel, {}, "sana", 21, 1_604_462_752, 35_987_840, 1_357_496_032),
}
"""Class, configuration, family; sites, parameters, how many baking removes, and how many are left in the step graphs."""


BESIDE = {
    "sana": ("scale_shift_table",),  # which is added to the time's part
    "qwen-image": ("blocks.59.attn.to_add_out", "blocks.59.txt_mlp"),  # of the last block's text, which nothing reads
}
"""What disappears beside the time's weights."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration(name: str) -> None:
    """Exactly the time's weights disappear, and :data:`BESIDE`."""
    cls, config, family, sites, parameters, removed, steps = PUBLISHED[name]
    with torch.device("meta"):
        network = cls(**config)
    found = families()[cls.__name__](network, {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    times, sizes = parameter_times(found), {name: p.numel() for name, p in found.named_parameters()}
    assert (len(found.sites), found.parameter_count) == (sites, parameters)
    assert sum(sizes[one] for one in times["removed"]) == removed
    assert sum(sizes[one] for one in times["steps"]) == steps
    parts = (*FAMILIES[family].time, *BESIDE.get(family, ()))
    assert times["removed"] == {one for one in sizes if any(part in one for part in parts)}
