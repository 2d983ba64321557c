"""Latents cut into patches, one token each; in a token FLUX and Qwen-Image go channel by channel, Lumina 2 place by place."""

from __future__ import annotations

import torch


def pack(state: torch.Tensor, size: int = 2, channels_last: bool = False) -> torch.Tensor:
    """``[batch, channels, height, width]`` to ``[batch, height/size * width/size, channels * size * size]``.

    Args:
        size: height and width of a patch.
        channels_last: in a token the channels of a place are neighbours, else the places of a channel.
    """
    channels, rows, columns = state.shape[1], state.shape[2] // size, state.shape[3] // size
    patches = state.reshape(-1, channels, rows, size, columns, size)
    ordered = patches.permute(0, 2, 4, 3, 5, 1) if channels_last else patches.permute(0, 2, 4, 1, 3, 5)
    return ordered.reshape(-1, rows * columns, channels * size**2)


def unpack(tokens: torch.Tensor, rows: int, columns: int, size: int = 2, channels_last: bool = False) -> torch.Tensor:
    """Inverse of :func:`pack`, for so many rows and columns of patches."""
    channels = tokens.shape[-1] // size**2
    if channels_last:
        patches = tokens.reshape(-1, rows, columns, size, size, channels).permute(0, 5, 1, 3, 2, 4)
    else:
        patches = tokens.reshape(-1, rows, columns, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(-1, channels, size * rows, size * columns)


def as_long(values: torch.Tensor, measure: torch.Tensor) -> torch.Tensor:
    """``values`` with the lengths that ``measure`` has along the last axis."""
    return values * (torch.norm(measure, dim=-1, keepdim=True) / torch.norm(values, dim=-1, keepdim=True))
