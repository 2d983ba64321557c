"""Images in and out of arrays: grids, single files, npz. Videos go to npz."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
MODES = {1: "L", 3: "RGB"}


def to_uint8(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``[n, channels, height, width]`` in [-1, 1] to uint8 ``[n, height, width, channels]``."""
    pixels = np.clip(np.nan_to_num(images) * 127.5 + 127.5, 0, 255).round().astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def grid(images: NDArray[np.float32], columns: int | None = None, gap: int = 2) -> NDArray[np.uint8]:
    """Tile images row by row, white between them: uint8 ``[height, width, channels]``."""
    pixels = to_uint8(images)
    n, height, width, channels = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(pixels):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet


def png(pixels: NDArray[np.uint8], scale: int = 1) -> bytes:
    """PNG file of uint8 ``[height, width, channels]`` (1 or 3 channels), each pixel ``scale`` times as large.

    Raises:
        InputError: for another number of channels.
    """
    from PIL import Image

    if pixels.shape[-1] not in (1, 3):
        raise InputError(f"expected images of 1 or 3 channels to write as PNG; found {pixels.shape[-1]}; write .npz instead")
    squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    file = BytesIO()
    Image.fromarray(squeezed.repeat(scale, 0).repeat(scale, 1)).save(file, "PNG", optimize=True)
    return file.getvalue()


def write_png(pixels: NDArray[np.uint8], path: Path, scale: int = 1) -> None:
    """Write :func:`png` to a file."""
    made = png(pixels, scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made)


def check_output(path: Path, sample_shape: tuple[int, ...] | None = None) -> None:
    """Refuse an output that :func:`save` cannot write, before any work is done.

    Args:
        sample_shape: of one image, where it is known already.

    Raises:
        InputError: for another ending than .png or .npz, a folder that is a file, or a PNG of what is no image.
    """
    if sample_shape is not None and len(sample_shape) != 3 and path.suffix != ".npz":
        shape = "x".join(map(str, sample_shape))
        raise InputError(f"expected an output ending in .npz for samples of {shape}, which are videos; found {path}")
    if path.suffix not in ("", ".png", ".npz"):
        raise InputError(f"expected an output ending in .png or .npz, or a folder; found {path}")
    if path.is_dir() if path.suffix else path.is_file():
        raise InputError(f"expected {'a file' if path.suffix else 'a folder'} at {path}; found the other; pass another -o")


def save(images: NDArray[np.float32], path: Path) -> None:
    """Write images as ``.npz`` (array ``images``, float32 as sampled), ``.png`` (a grid), or a folder of PNG files."""
    check_output(path, images.shape[1:])
    if path.suffix == ".npz":
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, images=images)
    elif path.suffix == ".png":
        write_png(grid(images), path, scale=2)
    else:
        for i, pixels in enumerate(to_uint8(images)):
            write_png(pixels, path / f"{i:05}.png")


def _files(source: Path) -> Iterator[bytes]:
    """The bytes of every image file in a folder, zip or tar, in name order for folders and zips."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield path.read_bytes()
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                    yield archive.read(name)
    elif source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            for member in archive:
                file = archive.extractfile(member) if Path(member.name).suffix.lower() in IMAGE_SUFFIXES else None
                if file is not None:
                    yield file.read()
    else:
        raise InputError(f"expected an image folder, a zip or tar of one, or an npz at {source}; found none of these")


def _in_array(source: Path) -> NDArray[np.uint8]:
    with np.load(source, allow_pickle=False) as arrays:
        found = [arrays[name] for name in arrays if arrays[name].dtype == np.uint8 and arrays[name].ndim in (3, 4)]
    if not found:
        raise InputError(
            f"expected a uint8 array [count, height, width] or [count, height, width, channels] in {source}; found none"
        )
    return found[0]


def read(source: Path, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """Every image of a folder, a zip or tar of one, or an npz (its first uint8 array ``[count, height, width(, channels)]``).

    Args:
        size: height and width; other images are resized (bicubic).
        channels: 1 or 3; images are converted to gray or RGB.

    Returns:
        uint8 ``[count, channels, height, width]``.

    Raises:
        InputError: when there is none.
    """
    from PIL import Image

    def fit(image: Image.Image) -> NDArray[np.uint8]:
        image, (height, width) = image.convert(MODES[channels]), size
        return np.asarray(image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC))

    if channels not in MODES:
        raise InputError(f"expected samples of 1 or 3 channels, as images have; found {channels}")
    if source.suffix == ".npz" and source.is_file():
        images = [fit(Image.fromarray(image.squeeze())) for image in _in_array(source)]
    else:
        images = [fit(Image.open(BytesIO(data))) for data in _files(source)]
    if not images:
        raise InputError(f"expected images in {source}; found none (endings looked for: {', '.join(sorted(IMAGE_SUFFIXES))})")
    pixels = np.stack(images).reshape(len(images), *size, channels)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
