"""Directories: whole or not at all, wherever the target is; only what is ours is deleted, and what a killed writer left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mteo_deploy import directories
from mteo_deploy.bundle import MANIFEST, Bundle, whole_directory
from mteo_deploy.directories import recover
from mteo_deploy.errors import InputError
from mteo_deploy.files import scratches

OURS = {"kind": "mteo-deploy bundle", "schema": 1, "files": {"graphs/step.onnx": {}, "weights.bin": {}}}
WRITER = """
import os, signal, sys
from pathlib import Path
from mteo_deploy import directories
from mteo_deploy.bundle import whole_directory

target, exchanges, dies_after = Path(sys.argv[1]), sys.argv[2] == "exchange", int(sys.argv[3])
replace, calls = os.replace, 0

def replace_and_die(source, place):
    global calls
    replace(source, place)
    calls += 1
    if calls == dies_after:
        os.kill(os.getpid(), signal.SIGKILL)

if not exchanges:
    directories._exchange = lambda one, other: False
if len(sys.argv) > 4:
    directories._can_be_renamed = lambda place: False
with whole_directory(target, replace="manifest.json") as directory:
    (directory / "graphs").mkdir()
    (directory / "graphs" / "step.onnx").write_text("new")
    (directory / "weights.bin").write_text("new")
    manifest = '{"kind": "mteo-deploy bundle", "schema": 1, "files": {"graphs/step.onnx": {}}, "new": true}'
    (directory / "manifest.json").write_text(manifest)
    if dies_after == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace_and_die
"""


def older(path: Path) -> Path:
    """What an earlier export left, as far as its names go."""
    (path / "graphs").mkdir(parents=True)
    (path / "graphs" / "step.onnx").write_text("old")
    (path / "weights.bin").write_text("old")
    (path / "README.md").write_text("old")
    (path / "engines" / "onnxruntime-cpu-0123").mkdir(parents=True)
    (path / "engines" / "onnxruntime-cpu-0123" / "engine.json").write_text("{}")
    (path / MANIFEST).write_text(json.dumps(OURS))
    return path


def snapshot(path: Path) -> dict[str, str]:
    files = [p for p in path.rglob("*") if p.is_file() and not any(part.endswith(".tmp") for part in p.relative_to(path).parts)]
    return {p.relative_to(path).as_posix(): p.read_text() for p in files}


def write(target: Path, name: str = "file") -> None:
    with whole_directory(target, replace=MANIFEST) as directory:
        (directory / name).write_text("new")


def killed(target: Path, *arguments: object) -> None:
    done = subprocess.run([sys.executable, "-c", WRITER, str(target), *map(str, arguments)], check=False)
    assert done.returncode == -signal.SIGKILL


# --- what may be replaced --------------------------------------------------------------------------------------------


def test_an_older_bundle_is_replaced_by_one_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader never finds the name gone: no second rename is made where the kernel can swap."""
    target = older(tmp_path / "bundle")
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail(f"renamed {paths}"))
    write(target)
    assert snapshot(target) == {"file": "new"} and os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("thesis.tex", "thesis.tex"),
        ("graphs/notes.txt", "graphs/notes.txt"),
        ("reference/deep/down.txt", "reference/deep/down.txt"),
        ("engines/readme.txt", "engines/readme.txt"),
        ("engines/mine/work.txt", "engines/mine"),
        ("src/app.js", "src"),
    ],
)
def test_a_file_that_is_not_ours_is_named_and_kept(name: str, found: str, tmp_path: Path) -> None:
    target = older(tmp_path / "bundle")
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_text("a year of work")
    before = snapshot(target)
    with pytest.raises(InputError, match=rf"found {found}; nothing was deleted; pass another -o"):
        write(target)
    assert snapshot(target) == before and os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    "manifest",
    [
        '{"name": "My web app", "start_url": "/"}',
        "{}",
        "[1]",
        "not json",
        "[" * 100_000,
        '{"kind": "mteo-deploy bundle", "schema": 999, "files": {}}',
        '{"kind": "mteo-deploy bundle", "schema": "1", "files": {}}',
    ],
)
def test_a_manifest_of_something_else_is_refused(manifest: str, tmp_path: Path) -> None:
    target = tmp_path / "app"
    target.mkdir()
    (target / MANIFEST).write_text(manifest)
    with pytest.raises(InputError, match=r"expected a new path or an older result.*found a manifest\.json of something else"):
        write(target)
    assert snapshot(target) == {MANIFEST: manifest}


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = older(tmp_path / "bundle")
    with pytest.raises(InputError, match="found mine"), whole_directory(target, replace=MANIFEST):
        (target / "mine").write_text("a minute of work")
    assert (target / "mine").exists() and os.listdir(tmp_path) == ["bundle"]


def test_links_inside_go_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    """A listed file may be a link, as in the Hub's cache, and ``engines/`` may lie on another disk."""
    target, elsewhere = older(tmp_path / "bundle"), tmp_path / "elsewhere"
    shutil.move(target / "engines", elsewhere)
    (target / "engines").symlink_to(elsewhere)
    (elsewhere / "blob").write_text("shared")
    (target / "graphs" / "step.onnx").unlink()
    (target / "graphs" / "step.onnx").symlink_to(elsewhere / "blob")
    write(target)
    assert snapshot(target) == {"file": "new"}
    assert (elsewhere / "blob").read_text() == "shared" and (elsewhere / "onnxruntime-cpu-0123" / "engine.json").is_file()


@pytest.mark.parametrize("inside", ["folder", "link"])
def test_place_of_an_engine_that_holds_more_than_files(inside: str, tmp_path: Path) -> None:
    place = tmp_path / "onnxruntime-cpu-0"
    place.mkdir()
    (place / "engine.json").write_text("broken")
    with whole_directory(place, replace="engine.json") as directory:
        (directory / "engine.json").write_text("{}")
    (place / "x").mkdir() if inside == "folder" else (place / "x").symlink_to(tmp_path)
    with pytest.raises(InputError, match="found x; nothing was deleted"), whole_directory(place, replace="engine.json"):
        pass


# --- where the target may be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["empty", "older", "nothing"])
def test_a_link_stays_and_its_end_is_written(there: str, tmp_path: Path) -> None:
    large, link = tmp_path / "disk" / "large", tmp_path / "out"
    large.parent.mkdir()
    if there != "nothing":
        large.mkdir() if there == "empty" else older(large)
    link.symlink_to(large)
    write(link)
    assert link.is_symlink() and snapshot(large) == {"file": "new"}
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"] and os.listdir(large.parent) == ["large"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to(tmp_path / "about")
    (tmp_path / "about").symlink_to(tmp_path / "round")
    with pytest.raises(InputError, match="links in a circle"):
        write(tmp_path / "round")
    (tmp_path / "far").symlink_to(tmp_path / "not mounted" / "bundle")
    with pytest.raises(InputError, match=r"not mounted is not; pass another -o"):
        write(tmp_path / "far")
    (tmp_path / "loose").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="found a file"):
        write(tmp_path / "loose")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["v1.0", "a\nb", "x" * 250, "[x]*?", "-o", " "])
def test_names(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    with pytest.raises(InputError, match="found file"):
        write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="File name too long"):
        write(tmp_path / ("x" * 300))
    assert not os.listdir(tmp_path)


def test_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its inode: whoever works in it still does."""
    here = older(tmp_path / "here")
    monkeypatch.chdir(here)
    inode = here.stat().st_ino
    write(Path("."))
    assert snapshot(here) == {"file": "new"} and here.stat().st_ino == inode and os.listdir(tmp_path) == ["here"]
    (here / "below").mkdir()
    monkeypatch.chdir(here / "below")
    with pytest.raises(InputError, match="expected a new path"):
        write(Path(".."))


def test_a_mount_point_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bind mounts too, which only the kernel's list tells from directories."""
    target = older(tmp_path / "volume")
    (target / "lost+found").mkdir()
    monkeypatch.setattr(directories, "_mounted", lambda: {str(target)})
    inode = target.stat().st_ino
    write(target)
    assert target.stat().st_ino == inode and sorted(os.listdir(target)) == ["file", "lost+found"]


def test_mount_points_are_found() -> None:
    assert "/" in directories._mounted() and "/proc" in directories._mounted()
    assert not directories._can_be_renamed(Path("/proc"))


def test_a_full_disk_while_a_mount_point_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, replace = older(tmp_path / "volume"), os.replace
    before = snapshot(target)
    monkeypatch.setattr(directories, "_can_be_renamed", lambda place: False)

    def fail(source: Path, place: Path) -> None:
        if place == target / "late":
            raise OSError(28, "No space left on device")
        replace(source, place)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        write(target, "late")
    assert snapshot(target) == before and not [name for name in os.listdir(target) if name.startswith(".")]


# --- a writer that dies ----------------------------------------------------------------------------------------------


def test_what_killed_writers_left_is_swept_and_a_living_one_is_not_disturbed(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with whole_directory(target, replace=MANIFEST) as mine:
        (mine / "file").write_text("mine")
        killed(target, "exchange", 0)
        killed(target, "exchange", 0)
        assert len(scratches(tmp_path, ".bundle.")) == 2, "the second swept what the first left, and not this one"
    assert snapshot(target) == {"file": "mine"}
    shutil.rmtree(target)
    write(target)
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_directory_of_another_name_is_not_swept(tmp_path: Path) -> None:
    killed(tmp_path / "bundle", "exchange", 0)
    (left,) = os.listdir(tmp_path)
    write(tmp_path / "bundl")
    (tmp_path / ".bundle.notes.tmp").mkdir()
    (tmp_path / ".bundle.abcdefgh.tmp").symlink_to(tmp_path / "bundl")
    assert (tmp_path / left).is_dir()
    write(tmp_path / "bundle")
    assert sorted(os.listdir(tmp_path)) == [".bundle.abcdefgh.tmp", ".bundle.notes.tmp", "bundl", "bundle"]


def test_killed_between_two_renames(tiny_bundle: Path, tmp_path: Path) -> None:
    """Where names cannot be exchanged the name is gone for a moment; the next to open it finds the older bundle."""
    target = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    killed(target, "rename", 1)
    assert not target.exists()
    assert Bundle.open(target).plan.steps == 3
    assert os.listdir(tmp_path) == ["bundle"]


def test_killed_after_the_exchange(tmp_path: Path) -> None:
    target = older(tmp_path / "bundle")
    killed(target, "rename", 2)
    assert json.loads((target / MANIFEST).read_text())["new"], "the new one is in place"
    write(target)
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("dies_after", range(11))
def test_killed_while_a_mount_point_is_filled(dies_after: int, tmp_path: Path) -> None:
    """At each rename: the older bundle, or the new one, whole."""
    target = older(tmp_path / "volume")
    before = snapshot(target)
    arguments = [sys.executable, "-c", WRITER, str(target), "rename", str(dies_after), "inside"]
    done = subprocess.run(arguments, check=False)
    assert done.returncode == (0 if dies_after == 10 else -signal.SIGKILL), "nine renames: five out, one aside, three in"
    recover(target)
    found = snapshot(target)
    assert found == before or ("new" in json.loads(found[MANIFEST]) and set(found) >= {"graphs/step.onnx", "weights.bin"})
    assert (found != before) == (dies_after >= 9)
    write(target)
    assert os.listdir(target) == ["file"]
