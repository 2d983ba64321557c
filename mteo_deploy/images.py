"""Arrays to images: grids, single files, npz. Videos go to npz."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import InputError
from mteo_deploy.files import check_file, check_folder, destination, write_atomic, written


def to_uint8(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``[n, channels, height, width]`` in [-1, 1] to uint8 ``[n, height, width, channels]``.

    Raises:
        InputError: for values that are not finite, which no pixel stands for.
    """
    finite = np.isfinite(images)
    if not finite.all():
        first = int(np.argmin(finite.reshape(len(images), -1).all(axis=1)))
        raise InputError(
            f"expected finite images; image {first} of {len(images)} has NaN or infinity; write .npz to look at it"
        )
    pixels = np.clip(images * 127.5 + 127.5, 0, 255).round().astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def grid(images: NDArray[np.float32], columns: int | None = None, gap: int = 2) -> NDArray[np.uint8]:
    """Tile images row by row, white between them: uint8 ``[height, width, channels]``."""
    return tiled(to_uint8(images), columns, gap)


def tiled(pixels: NDArray[np.uint8], columns: int | None = None, gap: int = 2) -> NDArray[np.uint8]:
    """:func:`grid` of pixels ``[n, height, width, channels]``."""
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
    """Write :func:`png` to a file, whole or not at all."""
    write_atomic(path, png(pixels, scale))


def kind_of(path: Path, folder: bool = False) -> str:
    """What an output is by its name: ``png``, ``npz`` or ``folder``.

    Args:
        folder: it was given as one: with a slash at its end.

    Raises:
        InputError: for another ending of what is no folder yet.
    """
    ending = path.suffix.lower()
    if not folder and ending in (".png", ".npz"):
        return ending[1:]
    if not (folder or ending == "" or path.is_dir()):
        raise InputError(f"expected an output ending in .png or .npz, or a folder (then end it in a slash); found {path}")
    return "folder"


def check_output(path: Path, sample_shape: tuple[int, ...] | None = None, folder: bool = False) -> None:
    """Refuse an output that images cannot be written to, before any work is done.

    Args:
        sample_shape: of one image, where it is known already.
        folder: as :func:`kind_of` takes it.

    Raises:
        InputError: for another ending than .png or .npz, a place that cannot be written, or a PNG of what is no image.
    """
    kind = kind_of(path, folder)
    if sample_shape is not None and kind != "npz" and (what := _no_image(sample_shape)):
        shape = "x".join(map(str, sample_shape))
        raise InputError(f"expected an output ending in .npz for samples of {shape}, which {what}; found {path}")
    if kind != "folder":
        check_file(path)
        if path.exists() and not path.is_file():
            raise InputError(f"expected a file at {path}; found a device or a pipe; pass another -o/--output")
        return
    place = destination(path)
    if os.path.lexists(place) and not place.is_dir():
        raise InputError(f"expected a folder at {path}; found something else; pass another -o/--output")
    check_folder(place)


def _no_image(shape: tuple[int, ...]) -> str:
    """Why samples of a shape are no images; empty where they are."""
    if len(shape) != 3:
        return f"are {({2: 'signals', 4: 'videos'}).get(len(shape), f'arrays of {len(shape)} axes')}"
    if shape[0] not in (1, 3):
        return f"have {shape[0]} channels where images have 1 or 3 (latents, where no VAE decodes them)"
    return ""


def save(images: NDArray[np.float32], path: Path) -> None:
    """Write images as ``.npz`` (array ``images``, float32 as sampled), ``.png`` (a grid), or a folder of PNG files.

    Raises:
        InputError: as :func:`check_output`; for images that are not finite; when the disk cannot take them.
    """
    check_output(path, images.shape[1:])
    kind = kind_of(path)
    if kind == "npz":
        with written(path) as new:
            np.savez_compressed(new, images=images)
    elif kind == "png":
        write_png(grid(images), path, scale=2)
    else:
        for i, pixels in enumerate(to_uint8(images)):
            write_png(pixels, path / f"{i:05}.png")
