"""The embedding set: its file, its checks, and that zero deltas are the pretrained network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from helpers import network_of
from safetensors import safe_open
from safetensors.numpy import save_file

from mteo_deploy import assets
from mteo_deploy.distillation import Recipe
from mteo_deploy.embeddings import FORMAT, VERSION, EmbeddingSet, merge
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter, site_dict
from mteo_deploy.exporters.choice import pretrained_set


def with_header(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the file with its metadata changed."""
    with safe_open(source, "numpy") as file:
        header = json.loads(file.metadata()["mteo"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    change(header)
    save_file(tensors, target, {"mteo": json.dumps(header)})
    return target


def test_round_trip(learned: EmbeddingSet, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "set.safetensors"
    learned.save(path)
    again = EmbeddingSet.load(path)
    assert (again.plan, again.backbone, again.training) == (learned.plan, learned.backbone, learned.training)
    assert again.deltas.keys() == learned.deltas.keys()
    for name, delta in learned.deltas.items():
        assert delta.dtype == np.float32
        np.testing.assert_array_equal(again.deltas[name], delta)
    assert again.sha256() == learned.sha256()
    assert [p.name for p in path.parent.iterdir()] == ["set.safetensors"]


def test_sha256_sees_values_and_plan(learned: EmbeddingSet, tiny_adapter: Adapter) -> None:
    name = next(iter(learned.deltas))
    nudged = {**learned.deltas, name: np.nextafter(learned.deltas[name], np.float32(9))}
    other_plan = replace(learned, plan=replace(learned.plan, schedule="logsnr"))
    hashes = {found.sha256() for found in (learned, replace(learned, deltas=nudged), other_plan)}
    assert len(hashes) == 3
    assert replace(learned, training={}).sha256() == learned.sha256()


def test_check_accepts_its_own_backbone(learned: EmbeddingSet, tiny_adapter: Adapter) -> None:
    learned.check(tiny_adapter.fingerprint(), site_dict(tiny_adapter.sites))


def test_wrong_backbone(learned: EmbeddingSet, tiny_adapter: Adapter) -> None:
    with pytest.raises(
        InputError, match=f"backbone {'f' * 12}; found one made for {learned.backbone[:12]}.*mteo-deploy distill"
    ):
        learned.check("f" * 64, site_dict(tiny_adapter.sites))


@pytest.mark.parametrize("case", ["width", "evaluations", "missing", "extra"])
def test_wrong_shape_names_site_and_shapes(case: str, learned: EmbeddingSet, tiny_adapter: Adapter) -> None:
    site, deltas = "mid_block.resnets.1", dict(learned.deltas)
    expected, found = r"\(3, 64\)", {"width": r"\(3, 65\)", "evaluations": r"\(2, 64\)"}.get(case, "none")
    if case == "extra":
        site, expected, found = "mid_block.resnets.9", "none", r"\(3, 64\)"
        deltas[site] = np.zeros((3, 64), np.float32)
    elif case == "missing":
        del deltas[site]
    else:
        deltas[site] = np.zeros((3, 65) if case == "width" else (2, 64), np.float32)
    message = f"of shape {expected} at site '{site}'; found {found}; .*mteo-deploy distill"
    with pytest.raises(InputError, match=message):
        replace(learned, deltas=deltas).check(tiny_adapter.fingerprint(), site_dict(tiny_adapter.sites))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found nothing there"):
        EmbeddingSet.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all, not even near", b"\xff" * 64])
def test_not_a_safetensors_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="expected an embedding set as a safetensors file"):
        EmbeddingSet.load(path)


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_truncated_file(kept: int, tiny_embeddings: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    path.write_bytes(tiny_embeddings.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"expected an embedding set as a safetensors file.*cannot be read"):
        EmbeddingSet.load(path)


def test_other_safetensors_file(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="made by `mteo-deploy distill`"):
        EmbeddingSet.load(tmp_path / "model.safetensors")


def test_newer_version(tiny_embeddings: Path, tmp_path: Path) -> None:
    path = with_header(tiny_embeddings, tmp_path / "set.safetensors", lambda header: header.update(version=VERSION + 1))
    with pytest.raises(InputError, match=f"version {VERSION} or older.*has {VERSION + 1}; upgrade mteo-deploy"):
        EmbeddingSet.load(path)


@pytest.mark.parametrize("key", ["version", "backbone", "plan", "training"])
def test_header_without_a_field(key: str, tiny_embeddings: Path, tmp_path: Path) -> None:
    path = with_header(tiny_embeddings, tmp_path / "set.safetensors", lambda header: header.pop(key))
    with pytest.raises(InputError, match=r"set\.safetensors"):
        EmbeddingSet.load(path)


def test_header_of_another_kind(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "set.safetensors", {"mteo": json.dumps([FORMAT])})
    with pytest.raises(InputError, match="holds no such metadata"):
        EmbeddingSet.load(tmp_path / "set.safetensors")


def test_broken_plan(tiny_embeddings: Path, tmp_path: Path) -> None:
    path = with_header(tiny_embeddings, tmp_path / "set.safetensors", lambda header: header["plan"].update(sigmas=[1.0]))
    with pytest.raises(InputError, match=r"set\.safetensors: bad metadata.*sigmas"):
        EmbeddingSet.load(path)


def test_zero_delta_is_the_unmodified_network(tiny_model: Path, tiny_adapter: Adapter) -> None:
    network = UNet2DModel.from_pretrained(tiny_model / "unet", use_safetensors=True)
    zero = pretrained_set(tiny_adapter, 3, "heun")
    with_deltas = network_of(tiny_adapter, zero)
    state = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32))
    with torch.no_grad():
        for i, evaluation in enumerate(zero.plan.evaluations):
            plain = network(state, torch.tensor(evaluation.timestep, dtype=torch.float32)).sample
            torch.testing.assert_close(with_deltas(i, state), plain, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(tiny_adapter.at_timestep(state, evaluation.timestep), plain, rtol=1e-5, atol=1e-6)


def test_a_delta_at_any_site_matters(tiny_adapter: Adapter) -> None:
    """The control of the test above: no site is deaf."""
    zero = pretrained_set(tiny_adapter, 1, "euler")
    state = torch.ones(1, *tiny_adapter.sample_shape)
    with torch.no_grad():
        plain = network_of(tiny_adapter, zero)(0, state)
        for site in tiny_adapter.sites:
            moved = replace(zero, deltas={**zero.deltas, site.name: zero.deltas[site.name] + 1})
            assert (network_of(tiny_adapter, moved)(0, state) - plain).abs().max() > 1e-4, site.name


def _scaled(found: EmbeddingSet, factor: float, **training: Any) -> EmbeddingSet:
    deltas = {site: (factor * delta).astype(np.float32) for site, delta in found.deltas.items()}
    return replace(found, deltas=deltas, training=found.training | training)


def test_merge_is_the_weighted_sum(learned: EmbeddingSet, tmp_path: Path) -> None:
    other = _scaled(learned, 3.0, seconds=5.0)
    mean = merge([learned, other])
    part = merge([learned, other], tmp_path / "part.safetensors", [0.5, 0.1])
    for site, delta in learned.deltas.items():
        np.testing.assert_allclose(mean.deltas[site], 2 * delta, rtol=1e-6)
        np.testing.assert_allclose(part.deltas[site], 0.8 * delta, rtol=1e-6)
        assert part.deltas[site].dtype == np.float32
    again = EmbeddingSet.load(tmp_path / "part.safetensors")
    assert again.sha256() == part.sha256() and (again.plan, again.backbone) == (learned.plan, learned.backbone)
    assert [(one["weight"], one["sha256"]) for one in again.training["merged"]] == [
        (0.5, learned.sha256()),
        (0.1, other.sha256()),
    ]
    assert again.training["merged"][1]["training"]["seconds"] == 5.0
    assert merge([part]).sha256() == part.sha256()  # a merged set can be merged


def test_merge_keeps_what_export_asks_a_set_for(learned: EmbeddingSet) -> None:
    recipe, guidance = {"precision": "int8", "keep": ["conv_in"]}, {"scale": 2.0, "null_class": 10}
    one = replace(learned, training={"recipe": recipe, "guidance": guidance})
    merged = merge([one, one])
    assert merged.precision == ("int8", ("conv_in",)) and merged.guidance == (2.0, 10)
    assert merge([learned]).precision == learned.precision and merge([learned]).guidance == learned.guidance


@pytest.mark.parametrize("what", ["backbone", "plan", "guidance", "precision"])
def test_merge_refuses_sets_that_differ(what: str, learned: EmbeddingSet, tmp_path: Path) -> None:
    other = {
        "backbone": replace(learned, backbone="f" * 64),
        "plan": replace(learned, plan=replace(learned.plan, schedule="logsnr")),
        "guidance": _scaled(learned, 1.0, guidance={"scale": 3.0}),
        "precision": _scaled(learned, 1.0, recipe={"precision": "int8"}),
    }[what]
    with pytest.raises(InputError, match=f"expected sets of one {what} to merge; found different ones"):
        merge([learned, other], tmp_path / "merged.safetensors")
    assert not list(tmp_path.iterdir())


def test_merge_says_what_it_expected(learned: EmbeddingSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected one embedding set or more to merge; found none"):
        merge([])
    for weights, found in (([1.0], "1.0"), ([1.0, float("nan")], "1.0, nan")):
        with pytest.raises(InputError, match=f"expected a finite weight for each of 2 sets; found {found}"):
            merge([learned, learned], weights=weights)
    with pytest.raises(InputError, match=r"expected an output file ending in \.safetensors"):
        merge([learned], tmp_path / "merged.bin")
    with pytest.raises(InputError, match="expected an embedding set"):
        merge([tmp_path / "none.safetensors"])
    site = next(iter(learned.deltas))
    wide = replace(learned, deltas={**learned.deltas, site: np.zeros((4, 3), np.float32)})
    with pytest.raises(InputError, match=f"at site '{site}'"):
        merge([learned, wide])


@pytest.mark.parametrize("name", assets.backbones())
def test_packaged_sets_are_made_from_nothing_by_the_commands_of_their_card(name: str) -> None:
    """One recipe for every number of evaluations, without ``--init``, whose set would have to be made first."""
    directory = assets.backbones()[name]
    card = (directory / "README.md").read_text(encoding="utf-8")
    (commands,) = (block for block in re.findall(r"(?:^ {4}.+\n)+", card, re.MULTILINE) if "distill" in block)
    asked = dict(re.findall(r"--([\w-]+) ([\w.]+)", commands))
    assert {"teacher", "trajectories", "iterations", "batch", "learn", "weights"} <= asked.keys()
    for plan, path in assets.embedding_sets(directory).items():
        (part,) = EmbeddingSet.load(path).training["merged"]
        recipe, reference = part["training"]["recipe"], part["training"]["reference"]
        assert f"{part['weight']:g}" == asked["weights"] and "init" not in part["training"], plan
        default = asdict(Recipe())
        for option in ("teacher", "trajectories", "iterations", "batch", "loss"):
            assert str(recipe[option]) == asked.get(option, str(default[option])), (plan, option)
        assert recipe["learn"] == [asked["learn"]] and recipe["teacher_evaluations"] == int(asked["teacher-evaluations"])
        assert f"{part['training']['parameters']:,} " in card
        assert 0 <= reference["evaluations"] - recipe["teacher_evaluations"] < int(plan.rpartition("-")[2])
        scale = (part["training"]["guidance"] or {}).get("scale")
        assert scale == (float(asked["guidance-scale"]) if "guidance-scale" in asked else None)


@pytest.mark.parametrize("place", [0.05, 0.4, 0.6, 0.8, 0.999])
def test_a_flipped_bit_is_refused(place: float, tiny_embeddings: Path, tmp_path: Path) -> None:
    """In the header's text or in any tensor."""
    content = bytearray(tiny_embeddings.read_bytes())
    content[int(place * len(content))] ^= 1
    (tmp_path / "set.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"set\.safetensors"):
        EmbeddingSet.load(tmp_path / "set.safetensors")


@pytest.mark.parametrize("version", [1, 2])
def test_a_set_without_a_checksum(
    version: int, tiny_embeddings: Path, learned: EmbeddingSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Older versions wrote none: it opens with a word. Since version 2 there is one."""

    def older(header: dict[str, Any]) -> None:
        del header["checksum"]
        header["version"] = version

    path = with_header(tiny_embeddings, tmp_path / "set.safetensors", older)
    if version == 2:
        with pytest.raises(InputError, match="expected a checksum"):
            EmbeddingSet.load(path)
        return
    assert EmbeddingSet.load(path).sha256() == learned.sha256()
    assert [record.message for record in caplog.records if "has no checksum" in record.message and str(path) in record.message]


def test_packaged_sets_have_a_checksum(caplog: pytest.LogCaptureFixture) -> None:
    for model in assets.backbones().values():
        for path in assets.embedding_sets(model).values():
            EmbeddingSet.load(path)
    assert not caplog.records


CRAFTED = {
    "two axes": ({"site": np.zeros((3, 2, 2), np.float32)}, "expected .3, width. at 'site'"),
    "one axis": ({"site": np.zeros(3, np.float32)}, "expected .3, width. at 'site'"),
    "rows": ({"site": np.zeros((4, 2), np.float32)}, "expected .3, width. at 'site'"),
    "NaN": ({"site": np.full((3, 2), np.nan, np.float32)}, "finite numbers; found others at 'site'"),
    "type": ({"site": np.zeros((3, 2), np.float16)}, "of type F32; found F16"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_tensors_of_another_kind(name: str, tiny_embeddings: Path, tmp_path: Path) -> None:
    """Each with the checksum that it would have."""
    deltas, words = CRAFTED[name]
    learned = EmbeddingSet.load(tiny_embeddings)
    made = EmbeddingSet(deltas, learned.plan, learned.backbone, learned.training)
    header = {"format": FORMAT, "version": VERSION, "backbone": made.backbone, "training": made.training}
    metadata = {"mteo": json.dumps({**header, "plan": made.plan.to_json(), "checksum": made.checksum})}
    save_file(deltas, tmp_path / "set.safetensors", metadata)
    with pytest.raises(InputError, match=words):
        EmbeddingSet.load(tmp_path / "set.safetensors")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training", None),
        ("training", {"guidance": 3}),
        ("training", {"recipe": {"precision": 8}}),
        ("training", {"merged": 3}),
        ("training", {"merged": [{"weight": "1"}]}),
        ("training", {"plain_plan": {}}),
        ("backbone", None),
        ("version", "2"),
        ("version", True),
        ("version", 10**30),
        ("plan", []),
        ("checksum", 3),
    ],
)
def test_metadata_of_another_kind(name: str, value: object, tiny_embeddings: Path, tmp_path: Path) -> None:
    path = with_header(tiny_embeddings, tmp_path / "set.safetensors", lambda header: header.update({name: value}))
    with pytest.raises(InputError, match=r"set\.safetensors"):
        EmbeddingSet.load(path)
