"""Files that somebody gives a verb: budgets, reports, prompts, archives of images. Read, or refused in one line."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mteo_deploy import arrays, dataset
from mteo_deploy.errors import InputError
from mteo_deploy.gates import Budgets
from mteo_deploy.prompts import tokenise
from mteo_deploy.quality import Statistics
from mteo_deploy.report import Report
from mteo_deploy.requests import read as read_requests
from mteo_deploy.text import read_text, text_lines


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "max_p50_ms = " + "[" * 20000 + "]" * 20000,
        "max_error = 1" + "0" * 400,
        "max_error = " + "9" * 5000,
        "max_error = nan",
        "max_error = inf",
        "max_error = true",
        "max_error = '25'",
        "max_eror = 25",
        "max_error",
    ],
    ids=["deep", "400 digits", "5000 digits", "nan", "inf", "bool", "text", "name", "no value"],
)
def test_budgets_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(text)
    with pytest.raises(InputError) as error:
        Budgets.read(tmp_path / "b.toml")
    assert len(str(error.value)) < 500


def test_text_as_editors_leave_it(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_bytes("\ufeffmax_p50_ms = 25\r\nmax_error = 1e-3\r\n".encode())
    assert Budgets.read(path) == Budgets(max_p50_ms=25, max_error=1e-3)
    path.write_bytes("\ufeffa\u2028b\r\n\r\n c \r\n".encode())
    assert text_lines(read_text(path, "prompts")) == ["a\u2028b", "c"]
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match="prompts in UTF-8"):
        read_text(path, "prompts")
    for wrong in (tmp_path, tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(InputError, match="expected prompts"):
            read_text(wrong, "prompts")


def test_a_report_that_is_none(tmp_path: Path) -> None:
    for text in ("[" * 100_000, "{}", '{"passed": 1, "checks": 3}', "\x00"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(InputError):
            Report.read(tmp_path / "r.json")


def test_prompts_of_half_a_character() -> None:
    entry = {"templates": {"prompt": {}, "negative": {}}, "tokens": 4}
    with pytest.raises(InputError, match=r"U\+DCFF"):
        tokenise(entry, [], ["a \udcff"])


def damaged_npz(path: Path) -> None:
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 255, (8, 28, 28), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros((3, 28, 28), np.uint8))


def bomb_npz(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w", force_zip64=True) as file:
        for _ in range(1100):
            file.write(bytes(1 << 20))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("hello"),
        damaged_npz,
        one_array,
        bomb_npz,
        lambda path: np.savez(path, images=np.array([{}], dtype=object)),
        lambda path: np.savez(path, mu=np.array(["a"]), sigma=np.eye(1)),
        lambda path: np.savez(path, mu=np.array([np.nan]), sigma=np.eye(1)),
        lambda path: np.savez(path, mu=np.zeros(2), sigma=np.eye(3)),
    ],
    ids=["empty", "text", "damaged", "npy", "bomb", "objects", "words", "NaN", "shapes"],
)
def test_npz_that_are_none(make: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    make(path)
    with pytest.raises(InputError, match=r"x\.npz"):
        _ = Statistics.load(path) or dataset.read(path, (8, 8), 1)


def test_request_inputs_that_are_no_npz(tmp_path: Path) -> None:
    for make in (one_array, damaged_npz):
        make(tmp_path / "x.npz")
        with pytest.raises(InputError, match=r"numpy\.savez"):
            read_requests(tmp_path / "x.npz")


def bad_zip(path: Path, where: bytes, offset: int, flip: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.png", picture())
    data = bytearray(path.read_bytes())
    for mark in where.split():
        data[data.find(b"PK" + bytes.fromhex(mark.decode())) + offset] ^= flip
    path.write_bytes(data)


def cut_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("x.png")
        entry.size = len(picture())
        archive.addfile(entry, io.BytesIO(picture()))
    path.write_bytes(path.read_bytes()[:560])


def link_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("x.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: bad_zip(path, b"0102", 16, 1),
        lambda path: bad_zip(path, b"0102", 8, 1),
        lambda path: bad_zip(path, b"0102", 10, 99),
        cut_tar,
        link_tar,
        lambda path: zipfile.ZipFile(path, "w").close(),
    ],
    ids=["crc", "encrypted", "method", "cut tar", "link tar", "empty zip"],
)
def test_archives_that_are_damaged(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(InputError, match="x"):
        dataset.read(tmp_path / "x", (8, 8), 1)


def test_a_folder_with_other_things_in_it(tmp_path: Path) -> None:
    import os

    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert dataset.read(tmp_path, (8, 8), 1).shape == (1, 1, 8, 8)
    (tmp_path / "b.png").write_bytes(picture()[:40])
    with pytest.raises(InputError, match=r"b\.png"):
        dataset.read(tmp_path, (8, 8), 1)
    for pipe in ("pipe.png", "pipe.npz"):
        (tmp_path / "pipe.png").rename(tmp_path / pipe)
        with pytest.raises(InputError):
            dataset.read(tmp_path / pipe, (8, 8), 1)
    with pytest.raises(InputError, match="no regular file"), arrays.npz(tmp_path / "pipe.npz", "an npz", "none"):
        pass
