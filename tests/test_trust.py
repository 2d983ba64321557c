"""Bundles as strangers keep and make them: links as in the Hub's cache, altered numbers, graphs that reach elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import altered, edit_json
from onnx import TensorProto, helper

from mteo_deploy import reading
from mteo_deploy.bundle import MANIFEST, Bundle
from mteo_deploy.engines.build import build
from mteo_deploy.errors import BundleError
from mteo_deploy.graph_files import GraphError, reached
from mteo_deploy.manifest import digest
from mteo_deploy.sampler import Sampler

Manifest = dict[str, Any]


def in_the_hubs_cache(bundle: Path, cache: Path) -> Path:
    """The files of a bundle as huggingface_hub keeps them: blobs by their hash, and links to these in a snapshot."""
    snapshot, blobs = cache / "models--org--name" / "snapshots" / "0123", cache / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for path in bundle.rglob("*"):
        if path.is_file() and "engines" not in path.parts:
            blob, link = blobs / hashlib.sha256(path.read_bytes()).hexdigest(), snapshot / path.relative_to(bundle)
            shutil.copyfile(path, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kept", ["hard links", "copies"])
def test_a_bundle_in_the_hubs_cache(
    engine: str, kept: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It samples what the bundle itself samples, by hard links, and by copies where there are none; nothing stays behind."""
    snapshot = in_the_hubs_cache(tiny_bundle, tmp_path / "cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if kept == "copies":
        monkeypatch.setattr(os, "link", no_links)
    images = []
    for path in (altered(tiny_bundle, tmp_path / "plain"), snapshot):
        build(path, engine=engine, realisation="baked", threads=1, seconds=0.1, quiet=True)
        with Sampler.load(path, engine=engine) as sampler:
            images.append(sampler(num=2, seed=5))
    np.testing.assert_array_equal(*images)
    assert not list(tmp_path.rglob(".open.*"))
    assert all(path.is_symlink() for path in (snapshot / "graphs").iterdir())


def no_links(source: object, target: object) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_a_copy_that_was_renamed_and_has_other_times(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "a")
    path = path.rename(tmp_path / "other name")
    for file in path.rglob("*"):
        os.utime(file, (1e9, 1e9))
    link = tmp_path / "link"
    link.symlink_to(path)
    assert Bundle.open(link).file("graphs/weights.bin") == path / "graphs" / "weights.bin"


@pytest.mark.parametrize("swapped", ["content", "file", "link"])
def test_a_file_that_changed_after_it_was_checked(swapped: str, tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b")
    weights, opened = path / "graphs" / "weights.bin", Bundle.open(path)
    content = bytearray(weights.read_bytes())
    weights.unlink()
    weights.write_bytes(content)
    with opened.opened("graphs/step_00.onnx") as graph:  # another file of the same content
        assert graph == path / "graphs" / "step_00.onnx"
    content[len(content) // 2] ^= 1
    if swapped == "content":
        with weights.open("r+b") as file:
            file.write(content)
    else:
        (tmp_path / "else").write_bytes(content)
        os.replace(tmp_path / "else", weights)
    if swapped == "link":
        weights.rename(tmp_path / "else")
        weights.symlink_to(tmp_path / "else")
    os.utime(weights, ns=(1, 1))
    with pytest.raises(BundleError, match=r"weights\.bin was altered"), opened.opened("graphs/step_00.onnx"):
        pass
    with pytest.raises(BundleError, match="names no file"):
        opened.file("graphs/other.bin")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "is a directory"),
        (os.mkfifo, "is a FIFO"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.symlink_to(path), "cannot be resolved"),
        (lambda path: path.symlink_to("nothing"), "is missing"),
        (lambda path: os.truncate(path, 2**42), "truncated|expected"),
    ],
)
def test_what_is_no_file_of_that_size(make: Callable[[Path], object], words: str, tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b")
    file = path / "graphs" / "weights.bin"
    file.unlink()
    if "truncated" in words:
        file.touch()
    make(file)
    with pytest.raises(BundleError, match=f"graphs/weights.bin .*({words})"):
        Bundle.open(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [("graphs/weights.bin", "of which graphs take"), ("graphs/fused.onnx", "at most"), ("tables.safetensors", "at most")],
)
def test_a_sparse_file_of_terabytes_is_not_hashed(name: str, words: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """The manifest says the same size, so that only what such a file can be tells."""
    path = altered(tiny_bundle, tmp_path / "b")
    os.truncate(path / name, 2**42)
    edit_json(path / MANIFEST, lambda manifest: manifest["files"][name].update(bytes=2**42))
    with pytest.raises(BundleError, match=words):
        Bundle.open(path)


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_any_altered_number_is_noticed(tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b")
    text = (path / MANIFEST).read_text()
    row = json.loads(text)["plan"]["evaluations"][1]["carry"]
    digit = row[4]
    (path / MANIFEST).write_text(text.replace(row, row[:4] + ("1" if digit != "1" else "2") + row[5:]))
    with pytest.raises(BundleError, match="its digest is another one"):
        Bundle.open(path)
    edit_json(path / MANIFEST, lambda manifest: None)  # who makes the digest right again has made another bundle
    assert Bundle.open(path).plan != Bundle.open(tiny_bundle).plan


def test_the_digest_is_that_of_the_canonical_json(tiny_bundle: Path) -> None:
    """Computed here by the words of docs/security.md alone."""
    manifest = json.loads((tiny_bundle / MANIFEST).read_text())
    stored = manifest.pop("digest")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert stored == hashlib.sha256(text.encode()).hexdigest() == digest({**manifest, "digest": "any"})


def test_schema_1_opens_with_a_word(tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = altered(tiny_bundle, tmp_path / "b", lambda manifest: manifest.update(schema=1))
    edit_json(path / MANIFEST, lambda manifest: manifest.pop("digest", None))
    assert Bundle.open(path).plan == Bundle.open(tiny_bundle).plan
    assert Bundle.open(path).manifest["schema"] == 1
    assert [record.message for record in caplog.records if "of schema 1" in record.message and str(path) in record.message]
    assert len([record for record in caplog.records if str(path) in record.message]) == 1


def nan_weight(manifest: Manifest) -> None:
    manifest["plan"]["evaluations"][0]["weights"][0] = "nan"


def reaches_before_the_first(manifest: Manifest) -> None:
    manifest["plan"]["evaluations"][0]["weights"] *= 2


CRAFTED: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "nan": (nan_weight, "finite.*plan"),
    "history": (reaches_before_the_first, "evaluation 0 reaches 2"),
    "steps": (lambda m: m["plan"].update(steps=10**9), "steps"),
    "steps of another type": (lambda m: m["plan"].update(steps="3"), "steps"),
    "a huge exponent": (lambda m: m["plan"].update(initial_scale="0x1p99999"), "initial_scale|hexadecimal"),
    "shape": (lambda m: m["backbone"].update(sample_shape=[1, -8, 8]), "sample_shape"),
    "too many files": (
        lambda m: m["files"].update({f"f{i}": {"bytes": 0, "sha256": "0" * 64} for i in range(30_000)}),
        "files",
    ),
    "capitals": (lambda m: m["files"].update({"Graphs/weights.bin": m["files"]["graphs/weights.bin"]}), "capitals"),
    "no ASCII": (lambda m: m["files"].update({"graphs/é": {"bytes": 0, "sha256": "0" * 64}}), "letters, digits"),
    "NUL": (lambda m: m["files"].update({"a\0b": {"bytes": 0, "sha256": "0" * 64}}), "letters, digits"),
    "engines": (lambda m: m["files"].update({"engines/x": {"bytes": 0, "sha256": "0" * 64}}), "no file of an export"),
    "itself": (lambda m: m["files"].update({"manifest.json": {"bytes": 0, "sha256": "0" * 64}}), "no file of an export"),
    "sha": (lambda m: m["files"]["graphs/weights.bin"].update(sha256="0" * 63), "sha256"),
    "batch": (lambda m: m.update(batch=0), "batch"),
    "batch in words": (lambda m: m.update(batch="static"), "batch"),
    "axes": (lambda m: m.update(dynamic=["depth"]), "dynamic"),
    "precision": (lambda m: m.update(precision="fp7"), "precision"),
    "an input from nowhere": (lambda m: m["realisations"]["fused"]["inputs"].append("label"), "nothing gives"),
    "inputs": (lambda m: m["realisations"]["baked"][0].update(outputs=["x"]), "expected graphs/step_00.onnx with"),
    "count": (lambda m: m["reference"].update(count=True), "count"),
    "a part that is gone": (lambda m: m.pop("requests"), "requests"),
    "training": (lambda m: m["embeddings"].update(training={"guidance": 3}), "guidance"),
    "a realisation nobody knows": (lambda m: m["realisations"].update(unrolled={}), "unrolled"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_manifest(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """Its digest is right: types, ranges and what fits what are checked all the same."""
    change, words = CRAFTED[name]
    path = altered(tiny_bundle, tmp_path / "b")
    edit_json(path / MANIFEST, change)
    with pytest.raises(BundleError, match=words) as raised:
        Bundle.open(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "too deep"),
        ('{"schema": 2, "files": {}, "x": ' + "9" * 400 + "}", "400 digits"),
        ('{"schema": 2, "files": {}, "x": NaN}', "NaN is not"),
        ('{"schema": 2, "files": {}, "x": 1e999}', "1e999 is not"),
        ('{"schema": 2, "files": {}, "x": 1, "x": 2}', "'x' is there twice"),
        ('{"schema": 2, "files": {}, "x": "\\ud800"}', "no Unicode"),
    ],
)
def test_json_that_is_no_manifest(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=f"not a bundle manifest.*{words}"):
        Bundle.open(tmp_path)


def test_a_manifest_of_gigabytes(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).touch()
    os.truncate(tmp_path / MANIFEST, 2**40)
    with pytest.raises(BundleError, match="bytes, expected 67,108,864 at most"):
        Bundle.open(tmp_path)


# --- graphs ----------------------------------------------------------------------------------------------------------


def tensor(location: str = "w.bin", name: str = "w", dims: tuple[int, ...] = (2, 3), **entries: str) -> TensorProto:
    found = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        found.external_data.add(key=key, value=value)
    return found


def model(*nodes: onnx.NodeProto, tensors: tuple[TensorProto, ...] = (), **fields: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        list(nodes), "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])], list(tensors)
    )
    return helper.make_model(graph, **fields)


def everywhere(one: TensorProto) -> dict[str, onnx.ModelProto]:
    """A model for each place of ONNX that can hold a tensor."""
    constant = helper.make_node("Constant", [], ["c"], value=one)
    several = helper.make_node("Constant", [], ["c"])
    several.attribute.append(onnx.AttributeProto(name="many", type=onnx.AttributeProto.TENSORS, tensors=[one]))
    sparse = onnx.SparseTensorProto(values=one, indices=helper.make_tensor("i", TensorProto.INT64, [1], [0]), dims=[2])
    indices = onnx.SparseTensorProto(values=helper.make_tensor("v", TensorProto.FLOAT, [1], [0]), indices=one, dims=[2])
    body = helper.make_graph([constant], "body", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)
    nested = helper.make_graph([branch], "outer", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    graphs = onnx.NodeProto(
        op_type="Loop", attribute=[onnx.AttributeProto(name="g", type=onnx.AttributeProto.GRAPHS, graphs=[nested])]
    )
    function = helper.make_function("local", "f", ["a"], ["c"], [constant], [helper.make_opsetid("", 20)])
    default = helper.make_function("local", "f", ["a"], ["c"], [], [helper.make_opsetid("", 20)])
    default.attribute_proto.append(helper.make_attribute("v", one))
    found = {
        "initialiser": model(tensors=(one,)),
        "attribute": model(constant),
        "tensors": model(several),
        "sparse attribute": model(helper.make_node("Constant", [], ["c"], sparse_value=sparse)),
        "sparse indices": model(helper.make_node("Constant", [], ["c"], sparse_value=indices)),
        "branch": model(branch),
        "branch of a branch": model(graphs),
        "function": model(functions=[function]),
        "function's default": model(functions=[default]),
        "sparse initialiser": model(),
        "training": model(),
        "training's algorithm": model(),
    }
    found["sparse initialiser"].graph.sparse_initializer.append(sparse)
    found["training"].training_info.add().initialization.CopyFrom(body)
    found["training's algorithm"].training_info.add().algorithm.CopyFrom(body)
    return found


@pytest.mark.parametrize("place", everywhere(tensor()))
def test_external_data_are_found_wherever_they_are(place: str) -> None:
    found = reached(everywhere(tensor(offset="8"))[place].SerializeToString())
    assert found.ends() == {"w.bin": 8 + 24}
    with pytest.raises(GraphError, match="expected the name of a file beside it"):
        reached(everywhere(tensor("../w.bin"))[place].SerializeToString())


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (tensor("/etc/passwd"), "beside it"),
        (tensor("*/_ORT_MEM_ADDR_/*", offset="140000000"), "beside it"),
        (tensor("a\\b"), "beside it"),
        (tensor(""), "beside it"),
        (tensor(".."), "beside it"),
        (tensor("a\0b"), "beside it"),
        (tensor(offset="-8"), "expected one of bytes"),
        (tensor(offset="9" * 30), "expected one of bytes"),
        (tensor(length="23"), "23 bytes; expected 24"),
        (tensor(dims=(-1, 3)), "negative size"),
        (tensor(dims=(1,) * 40), "more than 32 axes"),
        (tensor(dims=(2**62, 2**62)), "expected one of bytes"),
        (tensor(basepath="/"), "an entry 'basepath'"),
        (TensorProto(name="w", dims=[2], data_type=1, data_location=TensorProto.EXTERNAL), "beside it"),
        (TensorProto(name="w", dims=[2], data_type=8, data_location=TensorProto.EXTERNAL), "beside it"),
    ],
)
def test_external_data_that_are_refused(one: TensorProto, words: str) -> None:
    with pytest.raises(GraphError, match=words):
        reached(model(tensors=(one,)).SerializeToString())


@pytest.mark.parametrize(
    ("domain", "operator", "words"),
    [
        ("com.example", "Anything", "the domain 'com.example'"),
        ("com.microsoft", "EPContext", "EPContext"),
        ("com.microsoft", "PythonOp", "PythonOp"),
    ],
)
def test_operators_that_are_refused(domain: str, operator: str, words: str) -> None:
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    with pytest.raises(GraphError, match=words):
        reached(model(node).SerializeToString())
    reached(model(helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")).SerializeToString())


def test_a_message_in_two_parts() -> None:
    """protobuf merges them, and so makes external data of halves that look harmless alone."""
    one, other = model(), model(tensors=(tensor(),))
    with pytest.raises(GraphError, match="one graph"):
        reached(one.SerializeToString() + other.SerializeToString())
    with pytest.raises(GraphError, match="one graph"):
        reached(b"")


def test_inputs_and_outputs_as_onnx_reads_them(tiny_bundle: Path) -> None:
    for path in (tiny_bundle / "graphs").glob("*.onnx"):
        graph = onnx.load(str(path), load_external_data=False).graph
        found = reached(path.read_bytes())
        names = {value.name for value in graph.initializer}
        assert found.inputs == [value.name for value in graph.input if value.name not in names]
        assert found.outputs == [value.name for value in graph.output]
        stored = [value for value in graph.initializer if value.external_data]
        assert sorted(one.tensor for one in found.external) == sorted(value.name for value in stored)


@pytest.mark.parametrize("what", ["unlisted", "short"])
def test_weights_that_the_manifest_does_not_cover(what: str, tiny_bundle: Path, tmp_path: Path) -> None:
    path = altered(tiny_bundle, tmp_path / "b")
    if what == "unlisted":
        edit_json(path / MANIFEST, lambda manifest: manifest["files"].pop("graphs/weights.bin"))
    else:
        os.truncate(path / "graphs" / "weights.bin", 1000)
        path = altered(path, tmp_path / "c")
    with pytest.raises(BundleError, match="no hash covers graphs/weights.bin" if what == "unlisted" else "behind the end"):
        Bundle.open(path)


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../b", "C:x", "a\\b", "", ".hidden", "a//b", "a/./b", "x" * 300, "a/b/c/d/e", "a\n"]
)
def test_names_that_are_refused(name: str) -> None:
    assert reading.name_problem(name)


@pytest.mark.parametrize("name", ["manifest.json", "graphs/step_00.onnx", "tokenizers/tokenizer_2.json", "a/b/c/d-e+f.bin"])
def test_names_that_are_taken(name: str) -> None:
    assert reading.name_problem(name) is None
