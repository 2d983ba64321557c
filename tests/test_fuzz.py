"""Every file that a verb reads, damaged and crafted: either the images are the same, or one line says why not.

Some tens of examples of each in every run, always the same; thousands of new ones with ``MTEO_FUZZ=2000`` in the environment.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_trust import everywhere, tensor

from mteo_deploy import dataset
from mteo_deploy.bundle import MANIFEST, Bundle
from mteo_deploy.cli import main
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import MteoError
from mteo_deploy.gates import Budgets
from mteo_deploy.graph_files import GraphError, reached
from mteo_deploy.manifest import digest
from mteo_deploy.prompts import open_tokenizers, tokenise
from mteo_deploy.sampler import Sampler
from mteo_deploy.text import one_line

ASKED = int(os.environ.get("MTEO_FUZZ", "0"))
LIMIT = 20.0
"""Seconds that one example may take, on a machine that does other things too."""


def examples(count: int) -> Callable[[Any], Any]:
    """``count`` examples that are always the same, or as many new ones as ``MTEO_FUZZ`` asks for."""
    return settings(
        max_examples=ASKED or count,
        derandomize=not ASKED,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if ASKED else [])],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def within_limit() -> Iterator[None]:
    """Fails what takes too long; what never ends is killed, with a traceback of where it was."""
    faulthandler.dump_traceback_later(10 * LIMIT, exit=True)
    clock = time.monotonic()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.monotonic() - clock < LIMIT


def refused(call: Callable[[], Any]) -> Any:
    """What the call gives; None where one of our errors refuses it, in one line."""
    with within_limit():
        try:
            return call()
        except MteoError as error:
            line = one_line(error)  # as the verbs print it
    assert line
    return None


def tree(path: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file and directory."""
    return {str(one): (one.lstat().st_size, one.lstat().st_mtime_ns) for one in path.rglob("*")}


class Kept:
    """A built bundle whose files are changed for one example each, and the images that it draws."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = self.draw()
        self.files = {name: (path / name).read_bytes() for name in (MANIFEST, "embeddings.safetensors", "tables.safetensors")}
        self.record = next(path.glob("engines/*/engine.json"))
        self.files[self.record.relative_to(path).as_posix()] = self.record.read_bytes()

    def draw(self) -> Any:
        with Sampler.load(self.path) as sampler:
            return sampler(num=1, seed=3)

    def check(self, name: str, content: bytes, same: bool = True) -> None:
        """With this content of a file: ``inspect`` ends in 0 or 2, with one line; sampling in the same images or an error."""
        (self.path / name).write_bytes(content)
        before = tree(self.path)
        try:
            with within_limit():
                done = CliRunner().invoke(main, ["inspect", str(self.path)])
            assert done.exit_code in (0, 2), (done.output, done.exception)
            if done.exit_code == 2:
                assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ")
            drawn = refused(self.draw)
            assert drawn is None or np.isfinite(drawn).all()
            if same and drawn is not None:
                np.testing.assert_array_equal(drawn, self.images)
            assert tree(self.path) == before
        finally:
            (self.path / name).write_bytes(self.files[name])


@pytest.fixture(scope="module")
def kept(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("fuzz") / "bundle")))


# --- what is done to a file ------------------------------------------------------------------------------------------

Edit = tuple[str, float, bytes]
EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "repeat"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=3,
)


def edited(content: bytes, edits: list[Edit]) -> bytes:
    """Bytes flipped, cut, put in or repeated at places between the beginning (0) and the end (1)."""
    for kind, place, data in edits:
        at = int(place * max(0, len(content) - 1))
        if kind == "flip":
            flipped = bytes([content[at] ^ (data[0] or 1)]) if content else b""
            content = content[:at] + flipped + content[at + 1 :]
        elif kind == "cut":
            content = content[:at] + content[at + data[0] :]
        elif kind == "insert":
            content = content[:at] + data + content[at:]
        else:
            content = content[:at] + content[at : at + data[0]] * 2 + content[at + data[0] :]
    return content


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.integers(-3, 3),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(
            ["", "../x", "/etc/passwd", "a\0b", "nan", "0x1p99999", "graphs/weights.bin", "manifest.json", "9" * 500]
        ),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["replace", "remove", "rename", "double"]), st.lists(st.floats(0, 0.999), max_size=7), VALUES),
    min_size=1,
    max_size=2,
)


def changed(data: Any, changes: list[tuple[str, list[float], Any]]) -> Any:
    """Parts of JSON replaced, removed, renamed or doubled; a part is found by a number in [0, 1) for each level."""
    for kind, places, value in changes:
        parent, at, here = None, None, data
        for place in places:
            keys = list(here) if isinstance(here, dict) else list(range(len(here))) if isinstance(here, list) else []
            if not keys:
                break
            parent, at = here, keys[int(place * len(keys))]
            here = parent[at]
        if parent is None:
            data = value if kind == "replace" else data
        elif kind == "replace":
            parent[at] = value
        elif kind == "remove":
            del parent[at]
        elif isinstance(parent, dict):
            parent[str(value)[:40]] = parent.pop(at) if kind == "rename" else here
        else:
            parent.insert(at, here)
    return data


def as_bytes(data: Any) -> bytes:
    return json.dumps(data).encode()


# --- bundles ---------------------------------------------------------------------------------------------------------


@examples(60)
@given(EDITS)
def test_a_damaged_manifest(kept: Kept, edits: list[Edit]) -> None:
    kept.check(MANIFEST, edited(kept.files[MANIFEST], edits))


@examples(60)
@given(CHANGES)
def test_a_crafted_manifest(kept: Kept, changes: Any) -> None:
    """Whose digest is right: it may be another bundle, but one that opens, or is refused in one line."""
    data = changed(json.loads(kept.files[MANIFEST]), changes)
    if isinstance(data, dict):
        with suppress(TypeError, UnicodeError):  # what has no canonical form has no digest
            data["digest"] = digest(data)
    kept.check(MANIFEST, as_bytes(data), same=False)


@examples(40)
@given(CHANGES)
def test_a_crafted_manifest_of_schema_1(kept: Kept, changes: Any) -> None:
    data = json.loads(kept.files[MANIFEST]) | {"schema": 1}
    del data["digest"]
    kept.check(MANIFEST, as_bytes(changed(data, changes)), same=False)


@examples(40)
@given(EDITS, CHANGES, st.booleans())
def test_a_damaged_record_of_an_engine(kept: Kept, edits: list[Edit], changes: Any, crafted: bool) -> None:
    name = kept.record.relative_to(kept.path).as_posix()
    content = kept.files[name]
    kept.check(name, as_bytes(changed(json.loads(content), changes)) if crafted else edited(content, edits), same=False)


@examples(20)
@given(EDITS, st.sampled_from(["embeddings.safetensors", "tables.safetensors"]))
def test_a_damaged_file_of_a_bundle(kept: Kept, edits: list[Edit], name: str) -> None:
    kept.check(name, edited(kept.files[name], edits))


# --- embedding sets --------------------------------------------------------------------------------------------------


@examples(100)
@given(EDITS)
def test_a_damaged_embedding_set(kept: Kept, tmp_path_factory: pytest.TempPathFactory, edits: list[Edit]) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(edited(kept.files["embeddings.safetensors"], edits))
    found, right = refused(lambda: EmbeddingSet.load(path)), EmbeddingSet.load(kept.path / "embeddings.safetensors")
    if found is not None:
        assert (found.checksum, found.sha256()) == (right.checksum, right.sha256())


@examples(80)
@given(CHANGES, st.sampled_from(["header", "metadata"]))
def test_a_crafted_embedding_set(kept: Kept, tmp_path_factory: pytest.TempPathFactory, changes: Any, what: str) -> None:
    content = kept.files["embeddings.safetensors"]
    (length,) = struct.unpack("<Q", content[:8])
    header, path = json.loads(content[8 : 8 + length]), tmp_path_factory.getbasetemp() / "crafted.safetensors"
    if what == "metadata":
        header["__metadata__"]["mteo"] = json.dumps(changed(json.loads(header["__metadata__"]["mteo"]), changes))
    else:
        header = changed(header, changes)
    raw = as_bytes(header)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])
    refused(lambda: EmbeddingSet.load(path))
    with within_limit():
        done = CliRunner().invoke(main, ["inspect", str(path)])
    assert done.exit_code in (0, 2), (done.output, done.exception)


# --- graphs ----------------------------------------------------------------------------------------------------------

MODELS = [one.SerializeToString() for one in everywhere(tensor(offset="8")).values()]


def external_of(message: Any) -> Iterator[tuple[str, str]]:
    """Every location and key of external data anywhere in a message, as protobuf itself reads it."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for one in value if not hasattr(value, "ListFields") else [value]:
            if isinstance(one, onnx.TensorProto) and (one.external_data or one.data_location):
                yield from ((one.name, entry.value) for entry in one.external_data if entry.key == "location")
            yield from external_of(one)


@examples(300)
@given(st.sampled_from(MODELS), EDITS)
def test_a_damaged_graph(content: bytes, edits: list[Edit]) -> None:
    """What protobuf reads of it reaches no file that we did not see."""
    content = edited(content, edits)
    with within_limit():
        try:
            found = reached(content)
        except GraphError:
            return
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception:  # what protobuf refuses, an engine refuses
        return
    assert {location for _, location in external_of(model)} <= {one.location for one in found.external}


@examples(25)
@given(EDITS)
def test_a_damaged_graph_in_a_bundle(kept: Kept, edits: list[Edit]) -> None:
    """Every hash and the digest made right again: it opens, or is refused; an engine sees it in no other test."""
    name = "graphs/conditioned.onnx"
    path = kept.path / name
    content, manifest = path.read_bytes(), json.loads(kept.files[MANIFEST])
    crafted = edited(content, edits)
    manifest["files"][name] = {"bytes": len(crafted), "sha256": hashlib.sha256(crafted).hexdigest()}
    manifest["digest"] = digest(manifest)
    try:
        path.write_bytes(crafted)
        (kept.path / MANIFEST).write_bytes(as_bytes(manifest))
        refused(lambda: Bundle.open(kept.path))
    finally:
        path.write_bytes(content)
        (kept.path / MANIFEST).write_bytes(kept.files[MANIFEST])


# --- tokenizers, budgets, data -----------------------------------------------------------------------------------------


def tokenizer_json() -> bytes:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "castle": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.enable_padding(length=8, pad_id=1, pad_token="[PAD]")
    made.enable_truncation(8)
    return str(made.to_str()).encode()


TOKENIZER = tokenizer_json()


@examples(80)
@given(EDITS, CHANGES, st.booleans())
def test_a_damaged_tokenizer(tmp_path_factory: pytest.TempPathFactory, edits: list[Edit], changes: Any, crafted: bool) -> None:
    content = as_bytes(changed(json.loads(TOKENIZER), changes)) if crafted else edited(TOKENIZER, edits)
    directory = tmp_path_factory.getbasetemp()
    (directory / "tokenizer.json").write_bytes(content)
    plain = {"before": "", "after": "", "lower": False, "first": 0, "skip": 0}
    entry = {"tokenizers": ["tokenizer.json"], "tokens": 8, "templates": {"prompt": plain, "negative": plain}}
    bundle = Bundle(directory, {"text_encoder": entry})
    found = refused(lambda: tokenise(entry, open_tokenizers(bundle), ["a castle", ""]))
    assert found is None or found["input_ids"].ndim == 2


@examples(100)
@given(st.one_of(EDITS.map(lambda edits: edited(b"max_p50_ms = 25.5\nmax_error = 1e-3\n", edits)), st.binary(max_size=60)))
def test_damaged_budgets(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "budgets.toml"
    path.write_bytes(content)
    found = refused(lambda: Budgets.read(path))
    assert found is None or all(value is None or abs(value) < 1e300 for value in vars(found).values())


def archives() -> dict[str, bytes]:
    """Two images of 4 x 4 in each kind of file that ``evaluate`` reads."""
    pixels, image, packed, taped, arrays = np.arange(32, dtype=np.uint8).reshape(2, 4, 4), *(io.BytesIO() for _ in range(4))
    Image.fromarray(pixels[0]).save(image, "png")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for i in range(2):
            file.writestr(f"{i}.png", image.getvalue())
    with tarfile.open(fileobj=taped, mode="w") as tape:
        for i in range(2):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(image.getvalue())
            tape.addfile(member, io.BytesIO(image.getvalue()))
    np.savez(arrays, images=pixels)
    return {"zip": packed.getvalue(), "tar": taped.getvalue(), "npz": arrays.getvalue()}


ARCHIVES = archives()


@examples(100)
@given(st.sampled_from(sorted(ARCHIVES)), EDITS)
def test_damaged_data(tmp_path_factory: pytest.TempPathFactory, kind: str, edits: list[Edit]) -> None:
    path = tmp_path_factory.getbasetemp() / f"data.{kind}"
    path.write_bytes(edited(ARCHIVES[kind], edits))
    found = refused(lambda: dataset.read(path, (4, 4), 1))
    assert found is None or (found.shape[1:] == (1, 4, 4) and found.dtype == np.uint8)
