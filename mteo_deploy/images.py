"""Arrays to images: grids, single files, npz. Videos go to npz."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import InputError


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
