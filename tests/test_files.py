"""Files: whole or not at all, on a full disk too; the older one stays; what leads elsewhere is written where it leads."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mteo_deploy.errors import InputError
from mteo_deploy.files import Scratch, check_file, save_tensors, sweep, write_atomic, written

WRITERS: dict[str, Callable[[Path], None]] = {
    "bytes": lambda path: write_atomic(path, bytes(5000)),
    "text": lambda path: write_atomic(path, "é" * 5000),
    "tensors": lambda path: save_tensors(save_file, {"a": np.zeros(5000, np.float32)}, path),
}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does, for this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", WRITERS)
def test_full_disk(what: str, tmp_path: Path) -> None:
    path = tmp_path / "below" / "file.bin"
    with files_of_at_most(1000), pytest.raises(InputError, match=r"could not write .*file\.bin.*File too large.*free space"):
        WRITERS[what](path)
    assert os.listdir(path.parent) == []
    path.write_text("older")
    with files_of_at_most(1000), pytest.raises(InputError, match="what was there before is as it was"):
        WRITERS[what](path)
    assert path.read_text() == "older" and os.listdir(path.parent) == ["file.bin"]
    WRITERS[what](path)
    assert path.stat().st_size > 4000 and os.listdir(path.parent) == ["file.bin"]


def test_an_error_on_the_way_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("older")

    def stop_half_way() -> None:
        with written(path) as new:
            new.write_text("ne")
            raise KeyError("planned")

    with pytest.raises(KeyError, match="planned"):
        stop_half_way()
    assert path.read_text() == "older" and os.listdir(tmp_path) == ["file"]


def test_modes_are_those_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    write_atomic(tmp_path / "new", "x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == usual
    (tmp_path / "new").chmod(0o640)
    write_atomic(tmp_path / "new", "y")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    save_tensors(save_file, {"a": np.zeros(1)}, tmp_path / "t.safetensors", {"key": "value"})
    assert stat.S_IMODE((tmp_path / "t.safetensors").stat().st_mode) == 0o644, "safetensors writes 0600"
    np.testing.assert_array_equal(load_file(tmp_path / "t.safetensors")["a"], [0])


def test_a_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("older")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later")
    write_atomic(tmp_path / "link", "new")
    write_atomic(tmp_path / "dangling", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "real").read_text() == (tmp_path / "later").read_text() == "new"


def test_devices_and_pipes_are_written_to(tmp_path: Path) -> None:
    """Renaming something over ``/dev/null`` would be the end of it."""
    write_atomic(Path(os.devnull), "x")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(InputError, match=r"could not write /dev/full: No space left on device"):
        write_atomic(Path("/dev/full"), "x")
    code = "import sys; from pathlib import Path; from mteo_deploy.files import write_atomic; "
    code += "write_atomic(Path(sys.argv[1]), 'hello')"
    for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
        assert done.stdout == "hello"
    with (tmp_path / "out").open("w") as file:
        subprocess.run([sys.executable, "-c", code, "/dev/stdout"], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "hello" and os.listdir(tmp_path) == ["out"]


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "far").symlink_to(tmp_path / "gone" / "file")
    for name, words in {
        ".": "expected a file at .*; found a folder",
        "file/below": "expected a folder at .*file; found none",
        "file/far/below": "expected a folder at .*file; found none",
        "round": "circle",
        "far": "gone is not",
        "x" * 300: "File name too long",
        "a\0b": "null",
    }.items():
        with pytest.raises(InputError, match=words):
            check_file(tmp_path / name)
    for name in ("file", "new", "new/below", "a\nb", "-o"):
        check_file(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["far", "file", "round"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_places_of_somebody_else() -> None:
    code = (
        "import os, sys; from pathlib import Path; from mteo_deploy.files import check_file; "
        "from mteo_deploy.directories import check_directory; import mteo_deploy.bundle\n"
        "from mteo_deploy.errors import InputError\n"
        "os.setuid(65534)\n"
        "for check in (check_file, check_directory):\n"
        "    try: check(Path(sys.argv[1]))\n"
        "    except InputError as error: print(error)"
    )
    with tempfile.TemporaryDirectory() as name:  # pytest's own is for its user only
        Path(name).chmod(0o755)
        (Path(name) / "theirs").mkdir(mode=0o755)
        (Path(name) / "locked").touch(mode=0o444)

        def said(target: str) -> str:
            command = [sys.executable, "-c", code, target]
            return subprocess.run(command, cwd=name, capture_output=True, text=True, check=True).stdout

        assert said("theirs/new").count("theirs is read-only, or not yours to write; pass another -o") == 2
        assert "cannot write locked: it is read-only" in said("locked")


# --- scratch directories ---------------------------------------------------------------------------------------------


def test_scratch_directories_go_with_their_owner_and_after_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mteo_deploy.files import Scratch; s = Scratch('a-', Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert os.listdir(tmp_path) == [], "the process ended"
    done = subprocess.run([sys.executable, "-c", f"{code}; os.kill(os.getpid(), 9)", str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 1
    mine = Scratch("b-", tmp_path)
    with Scratch("a-", tmp_path) as directory:
        assert sorted(os.listdir(tmp_path)) == sorted([directory.name, mine.path.name]), "what the killed one left is gone"
        sweep(tmp_path, "a-")
        assert directory.is_dir(), "it has an owner"
    mine.close()
    mine.close()
    assert os.listdir(tmp_path) == []


def test_a_forked_child_leaves_its_parents_directory(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mteo_deploy.files import Scratch\n"
        "s = Scratch('a-', Path(sys.argv[1]))\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait(); print(s.path.is_dir())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True" and os.listdir(tmp_path) == []
