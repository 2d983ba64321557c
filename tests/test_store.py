"""What lies under ``engines/``: what is ours is opened and cleaned, what is not is named, never opened, never deleted."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import altered, edit_json

from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.engines import cache, store
from mteo_deploy.engines.build import build
from mteo_deploy.errors import BundleError, InputError
from mteo_deploy.sampler import Sampler


def engine_of(bundle: Path) -> Path:
    (path,) = (bundle / "engines").glob("onnxruntime-*")
    return path


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        server.bind(path.name)
        os.chdir(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("a year of work")


def _note(path: Path) -> None:
    path.write_text("a year of work")


THINGS = [_fifo, _device, _socket, _sparse, _folder, _note]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such files here")


@pytest.mark.parametrize("put", THINGS)
@pytest.mark.parametrize("where", ["engines", "engine"])
def test_a_stray_disables_nothing(where: str, put: Callable[[Path], None], bundle_copy: Path) -> None:
    """Beside the engines and in one of them; cleaned, it is still there."""
    place = (bundle_copy / "engines" if where == "engines" else engine_of(bundle_copy)) / "x"
    put(place)
    assert Sampler.load(bundle_copy)(num=1).shape == (1, 1, 8, 8)
    done = CliRunner().invoke(main, ["cache", "list", str(bundle_copy)])
    assert done.exit_code == 0 and "fits the bundle" in done.stdout
    assert ("x, " in done.stdout) if where == "engines" else ("no file of the build: x" in done.stdout)
    done = CliRunner().invoke(main, ["cache", "clean", "--all", str(bundle_copy)])
    assert done.exit_code == 0 and "deleted onnxruntime-cpu-" in done.stdout
    assert os.path.lexists(place) and cache.records(Bundle.open(bundle_copy)) == []
    if put is _folder:
        assert (place / "mine.txt").read_text() == "a year of work"


@pytest.mark.parametrize("put", THINGS)
def test_a_record_that_is_none(put: Callable[[Path], None], bundle_copy: Path) -> None:
    directory = engine_of(bundle_copy)
    (directory / "engine.json").unlink()
    put(directory / "engine.json")
    with pytest.raises(BundleError, match=r"expected a built engine.*run: mteo-deploy build"):
        Sampler.load(bundle_copy)
    (entry,) = cache.entries(Bundle.open(bundle_copy))
    assert not entry["fits"]
    if put in (_note, _sparse):  # a file of that name in a directory of that name is ours
        assert entry["reason"].startswith("engine.json cannot be read (")
        assert [one["name"] for one in cache.clean(Bundle.open(bundle_copy))] == [directory.name]
        assert not (bundle_copy / "engines").exists()
    else:
        assert entry["kind"] == "stray" and cache.clean(Bundle.open(bundle_copy)) == []
        assert os.path.lexists(directory / "engine.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "nested too deep"),
        ('{"parts": 1e999}', "is not finite"),
        ('{"key": ' + "9" * 5000 + "}", "an integer of 5000 digits"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("[]", "Expected `object`, got `array`"),
        ('{"parts": {}}', "missing required field"),
    ],
)
def test_a_record_of_another_structure(text: str, reason: str, bundle_copy: Path) -> None:
    (engine_of(bundle_copy) / "engine.json").write_text(text)
    (entry,) = cache.entries(Bundle.open(bundle_copy))
    assert entry["reason"].startswith("engine.json cannot be read (") and reason in entry["reason"]
    with pytest.raises(BundleError) as error:
        Sampler.load(bundle_copy)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: record.update(realisation="quick"), "realisation"),
        (lambda record: record["parts"].update(engine=["onnxruntime"]), "engine"),
        (lambda record: record["parts"]["options"].update(threads="two"), "threads"),
        (lambda record: record["parts"]["options"].update(threads=-1), "batch and threads are 1 or more"),
        (lambda record: record["parts"]["options"].update(precision="int1"), "is none of fp32, bf16"),
        (lambda record: record["parts"]["options"].update(turbo=True), "turbo"),
        (lambda record: record.update(files={"../../manifest.json": "0" * 64}), "is no name"),
        (lambda record: record.update(files={"x": "0"}), "has no SHA-256"),
    ],
)
def test_a_record_with_other_fields(change: Callable[[dict[str, object]], None], reason: str, bundle_copy: Path) -> None:
    edit_json(engine_of(bundle_copy) / "engine.json", change)
    (entry,) = cache.entries(Bundle.open(bundle_copy))
    assert entry["reason"].startswith("engine.json cannot be read (") and reason in entry["reason"]


def test_links_are_not_followed(bundle_copy: Path, tmp_path: Path) -> None:
    """``engines/`` as a link is refused by name; an engine that is a link to another bundle's is none of this bundle's."""
    other = tmp_path / "other"
    shutil.copytree(bundle_copy, other)
    name = engine_of(bundle_copy).name
    shutil.rmtree(bundle_copy / "engines")
    (bundle_copy / "engines").mkdir()
    (bundle_copy / "engines" / name).symlink_to(other / "engines" / name)
    with pytest.raises(BundleError, match="a link, which is not followed; passed over"):
        Sampler.load(bundle_copy)
    assert cache.clean(Bundle.open(bundle_copy), everything=True) == []
    (bundle_copy / "engines" / name).unlink()
    (bundle_copy / "engines").rmdir()
    (bundle_copy / "engines").symlink_to(other / "engines")
    for use in (Sampler.load, lambda path: cache.clean(Bundle.open(path)), lambda path: build(path, quiet=True)):
        with pytest.raises(BundleError, match=r"expected a directory at .*engines; found a link; nothing behind it"):
            use(bundle_copy)
    assert Sampler.load(other)(num=1).shape == (1, 1, 8, 8)


def test_the_cleaning_of_a_link_in_an_engine(bundle_copy: Path, tmp_path: Path) -> None:
    """A listed file that is a link goes, what it leads to stays: so do the Hub's caches keep them."""
    directory, mine = engine_of(bundle_copy), tmp_path / "mine.txt"
    mine.write_text("a year of work")
    (directory / "x.blob").symlink_to(mine)
    edit_json(directory / "engine.json", lambda record: record.update(files={"x.blob": "0" * 64}))
    assert [entry["name"] for entry in cache.clean(Bundle.open(bundle_copy))] == [directory.name]
    assert mine.read_text() == "a year of work" and not directory.exists()


def test_what_a_build_works_in_is_left_alone(bundle_copy: Path) -> None:
    """A build that runs keeps its scratch directory; of one that died it is cleaned."""
    bundle, code = (
        Bundle.open(bundle_copy),
        (
            "import sys; from mteo_deploy.bundle import Bundle; from mteo_deploy.engines import cache\n"
            "with cache.scratch(Bundle.open(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
        ),
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(bundle_copy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        (left,) = (entry for entry in cache.entries(bundle) if entry["kind"] == "left")
        assert left["reason"] == store.RUNNING and cache.clean(bundle) == []
        process.kill()
    assert [entry["name"] for entry in cache.clean(bundle)] == [left["name"]]


CLEAN = """
import sys
from mteo_deploy import Bundle, Sampler, build
from mteo_deploy.engines import cache, store
bundle = Bundle.open(sys.argv[1])
assert Sampler.load(sys.argv[1])(num=1).shape == (1, 1, 8, 8)
assert cache.clean(bundle) == [] and [one.kind for one in store.entries(bundle)] == ["built"]
for use in (lambda: cache.clean(bundle, everything=True), lambda: build(bundle, quiet=True)):
    try:
        use()
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_read_only(bundle_copy: Path) -> None:
    """Sampled and listed as ever; nothing to clean is nothing to write; a build is refused in one line."""
    python = [sys.executable, "-c", CLEAN, str(bundle_copy)]
    if os.geteuid() == 0:  # who may write whatever the modes say
        mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mount, str(bundle_copy), *python]
        if (
            shutil.which("unshare") is None
            or subprocess.run([*command[:6], "true"], capture_output=True, check=False).returncode
        ):
            pytest.skip("no namespaces here")
    else:
        command = python
        for path in [bundle_copy, bundle_copy / "engines"]:
            path.chmod(0o555)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for path in [bundle_copy, bundle_copy / "engines"]:
        path.chmod(0o755)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [f"InputError cannot write into {bundle_copy}"] * 2
    assert (engine_of(bundle_copy) / "engine.json").is_file(), done.stderr


def test_too_many_names(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ENTRIES", 3)
    for i in range(3):
        (bundle_copy / "engines" / f"{i}").touch()
    with pytest.raises(BundleError, match=r"expected 3 names in .*engines at most"):
        cache.entries(Bundle.open(bundle_copy))


def test_a_file_that_grew_is_not_read(tiny_bundle: Path, tmp_path: Path) -> None:
    """Its size is in the record; one without it is read up to what can be."""
    path = altered(tiny_bundle, tmp_path / "bundle")
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    directory = build(path, engine="openvino", realisation="fused", threads=1, seconds=0.1, quiet=True)
    blob = directory / "fused-1.blob"
    assert json.loads((directory / "engine.json").read_text())["bytes"][blob.name] == blob.stat().st_size
    with blob.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match=r"its files were altered \(fused-1\.blob: has 1,099,511,627,776 bytes\)"):
        Sampler.load(path)
    edit_json(directory / "engine.json", lambda record: record.pop("bytes"))
    with pytest.raises(BundleError, match=r"its files were altered \(fused-1\.blob: has 1,099,511,627,776 bytes\)"):
        Sampler.load(path)


def test_no_lock_in_a_file_that_is_none(bundle_copy: Path) -> None:
    with pytest.raises(InputError, match="cannot write into"), cache.locked(Bundle(bundle_copy / "nowhere" / "at all", {})):
        pass
