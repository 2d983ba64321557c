"""Decoding: latents to images, in parts that fit the memory.

A decoder's activations are hundreds of times as large as its image; those of a tile of the image are not. Tiles overlap by a
quarter, and what two of them have is blended from the one to the other, as diffusers' ``AutoencoderKL`` does in
``tiled_decode``. Each tile is decoded for itself, so norms and attention see a tile and not the image: the result is not the
image decoded whole, and how near it is depends on the VAE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.engines.base import Session
from mteo_deploy.engines.batches import BatchSizes
from mteo_deploy.errors import InputError

Array = NDArray[np.float32]
AT_ONCE = 1 << 20
"""Pixels that a decoder of open batch size is given in one call, if they are of several images."""
OVERLAP = 4
"""One part in so many of a tile, along each side, is the next one's too."""


def check_tile(tile: int) -> None:
    """Refuse a tile that cannot overlap by a quarter.

    Raises:
        InputError: for another than a positive multiple of 4.
    """
    if tile < OVERLAP or tile % OVERLAP:
        raise InputError(f"expected --tile as a multiple of {OVERLAP} latents (64, say); found {tile}")


def tile_of(entry: Mapping[str, Any], tile: int | None) -> int | None:
    """Height and width of a tile of latents; None for images decoded whole.

    Args:
        entry: of the decoder, as the manifest has it.
        tile: what was asked for: None for the bundle's own, 0 for none.

    Raises:
        InputError: for a decoder of one size only, or a tile that cannot be.
    """
    if tile is None or tile == 0:
        return entry.get("tile") if tile is None else None
    check_tile(tile)
    if not entry.get("open", False):
        raise InputError(
            "expected a decoder that takes any height and width for --tile; this bundle's takes one; export again with --tile "
            f"{tile}, or with --dynamic batch,height,width"
        )
    return tile


def decode_states(session: Session, entry: Mapping[str, Any], states: Array, tile: int | None) -> Array:
    """Images ``[batch, channels, height, width]`` of last states ``[batch, ...]``.

    Args:
        session: of the decoder's graph.
        entry: of the decoder, as the manifest has it.
        tile: as :func:`tile_of` gives it.
    """

    def decode(latents: Array) -> Array:
        pixels = latents.shape[2] * latents.shape[3] * entry["scale"] ** 2
        at_once = len(latents) if isinstance(session, BatchSizes) else max(1, AT_ONCE // pixels)
        parts = [latents[i : i + at_once] for i in range(0, len(latents), at_once)]
        return np.concatenate([np.asarray(session.run({"latents": np.ascontiguousarray(part)})[0]) for part in parts])

    if tile is None or max(states.shape[-2:]) <= tile:
        return decode(states)
    return decode_in_tiles(decode, states, tile, entry["scale"])


def decode_in_tiles(decode: Callable[[Array], Array], latents: Array, tile: int, scale: int) -> Array:
    """Images ``[batch, 3, height * scale, width * scale]`` of latents ``[batch, channels, height, width]``.

    Args:
        decode: of latents no higher and no wider than ``tile``, to an array of its own.
        tile: height and width of a tile of the latents, a multiple of 4; the last ones of a row or column are smaller.
        scale: pixels to a latent.
    """
    step, blended = tile - tile // OVERLAP, tile // OVERLAP * scale
    kept, height = tile * scale - blended, latents.shape[2]
    rows: list[Array] = []
    above: list[Array] = []
    for top in range(0, height, step):
        row = [decode(latents[:, :, top : top + tile, left : left + tile]) for left in range(0, latents.shape[3], step)]
        for one, other in zip(above, row, strict=False):
            _blend(one, other, blended, axis=2)
        for one, other in pairwise(row):
            _blend(one, other, blended, axis=3)
        rows.append(np.concatenate([one[:, :, :kept, :kept] for one in row], axis=3))
        above = row
    return np.concatenate(rows, axis=2)


def _blend(before: Array, tile: Array, extent: int, axis: int) -> None:
    """Let the beginning of a tile come out of the end of the one before it, in place."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    weight = (np.arange(extent, dtype=np.float32) / extent).reshape(-1, *[1] * (3 - axis))
    end, start = _part(before, slice(before.shape[axis] - extent, None), axis), _part(tile, slice(extent), axis)
    start[...] = end * (1 - weight) + start * weight


def _part(values: Array, where: slice, axis: int) -> Array:
    return values[(slice(None),) * axis + (where,)]
