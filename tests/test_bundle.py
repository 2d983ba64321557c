"""The bundle: whole or not at all, and nothing altered gets through."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import altered, edit_json

from mteo_deploy import assets, directories
from mteo_deploy.bundle import MANIFEST, SCHEMA, Bundle, sha256_file, whole_directory
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.exporters import compiler
from mteo_deploy.exporters.export import export
from mteo_deploy.inspection import inspect


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- opening ---------------------------------------------------------------------------------------------------------


def test_round_trip(tiny_bundle: Path, learned: EmbeddingSet) -> None:
    bundle = Bundle.open(str(tiny_bundle))
    assert bundle.plan == learned.plan
    assert bundle.sample_shape == (1, 8, 8)
    assert [entry["graph"] for entry in bundle.step_graphs] == [f"graphs/step_{i:02}.onnx" for i in range(3)]
    reference = bundle.reference()
    count = bundle.manifest["reference"]["count"]
    assert reference["noise"].shape == (count, 1, 8, 8)
    assert reference["states"].shape == reference["kept"].shape == (3, count, 1, 8, 8)
    for name, entry in bundle.manifest["files"].items():
        assert sha256_file(tiny_bundle / name) == entry["sha256"]
    found = EmbeddingSet.load(bundle.file("embeddings.safetensors"))
    assert found.sha256() == learned.sha256()


def test_every_file_is_in_the_manifest(tiny_bundle: Path) -> None:
    written = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*") if p.is_file()}
    listed = set(Bundle.open(tiny_bundle).manifest["files"])
    assert {name for name in written - listed if not name.startswith("engines/")} == {MANIFEST}
    assert listed <= written


@pytest.mark.parametrize("name", ["graphs/weights.bin", "graphs/step_01.onnx", "embeddings.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "longer"])
def test_damaged_file(name: str, damage: str, bundle_copy: Path) -> None:
    path = bundle_copy / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "longer":
        path.write_bytes(content + b"\0")
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    words = {"missing": "is missing", "altered": "was altered"}.get(damage, "truncated")
    with pytest.raises(BundleError, match=f"{name}.*{words}.*export again"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "graphs/../../outside.bin", "graphs\\..\\x"])
def test_path_that_leaves_the_bundle(name: str, bundle_copy: Path) -> None:
    outside = bundle_copy.parent / "outside.bin"
    outside.write_bytes(b"secret")
    entry = {"bytes": 6, "sha256": sha256_file(outside)}
    edit_json(bundle_copy / MANIFEST, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(bundle_copy)


def test_a_directory_on_the_way_is_no_link(bundle_copy: Path) -> None:
    (bundle_copy / "graphs").rename(bundle_copy.parent / "elsewhere")
    (bundle_copy / "graphs").symlink_to(bundle_copy.parent / "elsewhere")
    with pytest.raises(BundleError, match="graphs/, which is a link to a directory"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("schema", [SCHEMA + 1, "2", None])
def test_other_schema(schema: Any, bundle_copy: Path) -> None:
    edit_json(bundle_copy / MANIFEST, lambda manifest: manifest.update(schema=schema))
    with pytest.raises(BundleError, match=f"schema {SCHEMA} or older; found {schema}; upgrade mteo-deploy"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_not_a_bundle(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "thing")
    with pytest.raises(BundleError, match=r"expected a bundle .*manifest\.json.*mteo-deploy export"):
        Bundle.open(tmp_path / "thing")


@pytest.mark.parametrize(
    "text", ["", "{ not json", "[]", "3", "{}", '{"schema": 1, "files": [1]}', '{"schema": 1, "files": {"a": 1}}']
)
def test_manifest_that_is_none(text: str, bundle_copy: Path) -> None:
    (bundle_copy / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"not a bundle manifest.*export again"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("key", ["plan", "realisations", "conditioned", "reference", "backbone", "precision"])
def test_manifest_without_a_part(key: str, bundle_copy: Path) -> None:
    edit_json(bundle_copy / MANIFEST, lambda manifest: manifest.pop(key))
    with pytest.raises(BundleError, match=key):
        Bundle.open(bundle_copy)


def test_graph_that_no_hash_covers(bundle_copy: Path) -> None:
    """A graph that runs must be among the files that were checked."""
    edit_json(bundle_copy / MANIFEST, lambda manifest: manifest["files"].pop("graphs/step_01.onnx"))
    with pytest.raises(BundleError, match=r"step_01\.onnx"):
        Bundle.open(bundle_copy)


def test_graph_count_must_fit_the_plan(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b", lambda manifest: manifest["realisations"]["baked"].pop())
    with pytest.raises(BundleError, match="2 step graphs for 3 evaluations"):
        _ = Bundle.open(path).step_graphs


def test_reference_that_is_no_safetensors_file(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(
        tiny_bundle, tmp_path / "b", files=lambda b: (b / "reference" / "reference.safetensors").write_bytes(b"\xff" * 99)
    )
    with pytest.raises(BundleError, match=r"stored reference as a safetensors file.*cannot be read"):
        Bundle.open(path).reference()


# --- writing ---------------------------------------------------------------------------------------------------------


def test_whole_directory_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    def stop_half_way() -> None:
        with whole_directory(tmp_path / "new") as directory:
            (directory / "half").write_text("written")
            raise KeyError("planned")

    with pytest.raises(KeyError, match="planned"):
        stop_half_way()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [1, 2])
def test_old_result_survives_a_failed_rename(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two names cannot be exchanged at once: moving the old result aside may fail, and so may moving the new one in."""
    target, calls, replace = tmp_path / "result", 0, os.replace
    target.mkdir()
    old = '{"kind": "mteo-deploy bundle", "schema": 1, "files": {}}'
    (target / MANIFEST).write_text(old)
    monkeypatch.setattr(directories, "_exchange", lambda one, other: False)

    def fail_once(source: Any, destination: Any) -> None:
        nonlocal calls
        calls += 1
        no_space() if calls == failing else replace(source, destination)

    monkeypatch.setattr(os, "replace", fail_once)
    with (
        pytest.raises(InputError, match="No space left on device; nothing was kept"),
        whole_directory(target, replace=MANIFEST) as directory,
    ):
        (directory / MANIFEST).write_text("new")
    assert (target / MANIFEST).read_text() == old
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("failing", ["graph", "embedding set"])
def test_full_disk_during_export(
    failing: str, tiny_model: Path, tiny_embeddings: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle_copy / MANIFEST).read_bytes()
    if failing == "graph":
        monkeypatch.setattr(compiler.ir, "save", no_space)
    else:
        monkeypatch.setattr(EmbeddingSet, "save", no_space)
    with pytest.raises(InputError, match="No space left on device; nothing was kept; free space"):
        export(bundle_copy, model=tiny_model, embeddings=tiny_embeddings, quiet=True)
    assert [path.name for path in bundle_copy.parent.iterdir()] == ["bundle"]
    assert (bundle_copy / MANIFEST).read_bytes() == before
    assert Bundle.open(bundle_copy).manifest["files"]


def test_export_replaces_an_older_bundle(tiny_model: Path, bundle_copy: Path) -> None:
    found = export(bundle_copy, model=tiny_model, steps=1, plain=True, quiet=True)
    assert found.plan.steps == 1
    assert not list(bundle_copy.rglob("step_01.onnx")), "of the older bundle"
    assert not (bundle_copy / "engines").exists()
    assert [path.name for path in bundle_copy.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_export_does_not_overwrite_anything_else(kind: str, tiny_model: Path, tiny_embeddings: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    else:
        target.write_text("years of work")
    with pytest.raises(InputError, match=r"expected a new path or an older result.*-o/--output"):
        export(target, model=tiny_model, embeddings=tiny_embeddings, quiet=True)
    assert (target / "thesis.tex" if kind == "folder" else target).read_text() == "years of work"


def test_export_where_nothing_can_be_written(tiny_model: Path, tiny_embeddings: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write into .*expected a folder at .*file; found none"):
        export(tmp_path / "file" / "bundle", model=tiny_model, embeddings=tiny_embeddings, quiet=True)


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_out_of_range(steps: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--steps of 1 or more; found {steps}"):
        export(tmp_path / "b", steps=steps, quiet=True)


def test_step_count_without_a_packaged_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--steps 7 in mnist; found .*euler-4; .*distill --steps 7 -o"):
        export(tmp_path / "b", steps=7, quiet=True)


def test_which_set_of_a_directory(tmp_path: Path) -> None:
    """The one there is of a step count, Euler's of several, or the one asked for."""
    (tmp_path / "embeddings").mkdir()
    for name in ("dpmpp-2m-5", "dpmpp-2m-4", "euler-4", "euler-14"):
        (tmp_path / "embeddings" / f"{name}.safetensors").touch()
    assert assets.embeddings(5, model=tmp_path).stem == "dpmpp-2m-5"
    assert assets.embeddings(4, model=tmp_path).stem == assets.embeddings(4, "ddim", tmp_path).stem == "euler-4"
    assert assets.embeddings(4, "dpmpp-2m", tmp_path).stem == "dpmpp-2m-4"
    with pytest.raises(InputError, match="for --steps 5 --solver euler in"):
        assets.embeddings(5, "euler", tmp_path)


def test_model_without_a_set_names_both_ways_out(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--embeddings FILE.*mteo-deploy distill.*--steps 3.*--plain"):
        export(tmp_path / "b", model=tiny_model, steps=3, quiet=True)


def test_set_of_another_step_count(tiny_model: Path, tiny_embeddings: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"for --steps 5; found one for 3; .*mteo-deploy distill"):
        export(tmp_path / "b", model=tiny_model, embeddings=tiny_embeddings, steps=5, quiet=True)


def test_set_of_another_backbone(tiny_model: Path, learned: EmbeddingSet, tmp_path: Path) -> None:
    other = EmbeddingSet(learned.deltas, learned.plan, "0" * 64)
    with pytest.raises(InputError, match="found one made for 000000000000"):
        export(tmp_path / "b", model=tiny_model, embeddings=other, quiet=True)


def test_unsupported_model_class(tiny_model: Path, tiny_embeddings: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    edit_json(copy / "model_index.json", lambda index: index.update(unet=["diffusers", "UNet3DConditionModel"]))
    with pytest.raises(InputError, match=r"expected a backbone of class UNet2DModel.*has.*unet: UNet3DConditionModel"):
        export(tmp_path / "b", model=copy, embeddings=tiny_embeddings, quiet=True)


# --- inspecting ------------------------------------------------------------------------------------------------------


def test_inspect_bundle(tiny_bundle: Path, learned: EmbeddingSet) -> None:
    found = json.loads(json.dumps(inspect(tiny_bundle)))
    assert found["kind"] == "bundle" and found["schema"] == SCHEMA
    assert [row["sigma"] for row in found["plan"]["evaluations"]] == [e.sigma for e in learned.plan.evaluations]
    assert found["embeddings"]["parameters"] == learned.parameters
    assert len(found["engines"]) == 1 and found["engines"][0].startswith("onnxruntime-cpu-")
    assert found["files"]["graphs/weights.bin"] == (tiny_bundle / "graphs" / "weights.bin").stat().st_size


def test_inspect_embedding_set(tiny_embeddings: Path, learned: EmbeddingSet) -> None:
    found = json.loads(json.dumps(inspect(tiny_embeddings)))
    assert (found["kind"], found["sha256"], found["parameters"]) == ("embedding set", learned.sha256(), learned.parameters)
    assert set(found["sites"]) == set(learned.deltas) and set(found["sites"].values()) == {64}
    np.testing.assert_allclose(
        [row["carry"] for row in found["plan"]["evaluations"]], [e.carry for e in learned.plan.evaluations]
    )
