"""Images of a data set: a folder, a zip or tar of one, or an npz, as somebody made it: damaged, linked, or made to do harm."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.arrays import check_ratio, npz
from mteo_deploy.errors import InputError, border

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
MODES = {1: "L", 3: "RGB"}
LARGEST = 1 << 28
"""Bytes of one image file."""
WAY_OUT = "repair it, or leave it out"


def read(source: Path, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """Every image of a folder, a zip or tar of one, or an npz (its first uint8 array ``[count, height, width(, channels)]``).

    Args:
        size: height and width; other images are resized (bicubic).
        channels: 1 or 3; images are converted to gray or RGB.

    Returns:
        uint8 ``[count, channels, height, width]``.

    Raises:
        InputError: when there is none, or one that cannot be read, which it names.
    """
    from PIL import Image

    def fit(image: Image.Image) -> NDArray[np.uint8]:
        image, (height, width) = image.convert(MODES[channels]), size
        return np.asarray(image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC))

    def decoded(name: str, data: bytes) -> NDArray[np.uint8]:
        with border(f"expected an image at {name}", WAY_OUT):
            return fit(Image.open(BytesIO(data)))

    if channels not in MODES:
        raise InputError(f"expected samples of 1 or 3 channels, as images have; found {channels}")
    if source.suffix == ".npz" and source.is_file():
        with border(f"expected images in {source}", WAY_OUT):
            images = [fit(Image.fromarray(image.squeeze())) for image in _in_array(source)]
    else:
        images = [decoded(f"{source}: {name}", data) for name, data in _files(source)]
    if not images:
        raise InputError(f"expected images in {source}; found none (endings looked for: {', '.join(sorted(IMAGE_SUFFIXES))})")
    pixels = np.stack(images).reshape(len(images), *size, channels)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every image file in a folder, zip or tar, in name order for folders and zips."""
    with border(f"expected an image folder, or a zip or tar of one, at {source}", WAY_OUT):
        if source.is_dir():
            yield from _in_folder(source)
        elif source.is_file() and zipfile.is_zipfile(source):
            yield from _in_zip(source)
        elif source.is_file() and tarfile.is_tarfile(source):
            yield from _in_tar(source)
        else:
            raise InputError(f"expected an image folder, a zip or tar of one, or an npz at {source}; found none of these")


def _in_folder(source: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            name = str(path.relative_to(source))
            _check_size(source, name, path.stat().st_size)
            yield name, path.read_bytes()


def _in_zip(source: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(source) as archive:
        entries = [one for one in archive.infolist() if Path(one.filename).suffix.lower() in IMAGE_SUFFIXES]
        check_ratio(source, sum(one.file_size for one in entries))
        for one in sorted(entries, key=lambda one: one.filename):
            _check_size(source, one.filename, one.file_size)
            yield one.filename, archive.read(one)


def _in_tar(source: Path) -> Iterator[tuple[str, bytes]]:
    """Of regular files alone: a link in it may name any file of this machine."""
    with tarfile.open(source) as archive:
        for member in archive:
            check_ratio(source, member.offset_data + member.size)
            if member.isreg() and Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                _check_size(source, member.name, member.size)
                file = archive.extractfile(member)
                data = b"" if file is None else file.read()
                if len(data) != member.size:
                    raise InputError(f"expected {member.size} bytes of {member.name} in {source}; found {len(data)}; {WAY_OUT}")
                yield member.name, data


def _check_size(source: Path, name: str, size: int) -> None:
    if size > LARGEST:
        raise InputError(f"expected images of {LARGEST} bytes or less in {source}; found {name} of {size}; leave it out")


def _in_array(source: Path) -> NDArray[np.uint8]:
    with npz(source, "an npz of images", WAY_OUT) as arrays:
        found = [array for array in map(arrays.__getitem__, arrays.files) if array.dtype == np.uint8 and array.ndim in (3, 4)]
    if not found:
        raise InputError(
            f"expected a uint8 array [count, height, width] or [count, height, width, channels] in {source}; found none"
        )
    return found[0]
