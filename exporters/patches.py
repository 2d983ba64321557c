"""Latents in patches of 2x2, packed into tokens, as the pipelines of FLUX and Qwen-Image feed their networks."""

from __future__ import annotations

import torch


def pack(state: torch.Tensor) -> torch.Tensor:
    """``[batch, channels, height, width]`` to ``[batch, height/2 * width/2, channels * 4]``."""
    channels, rows, columns = state.shape[1], state.shape[2] // 2, state.shape[3] // 2
    patches = state.reshape(-1, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(-1, rows * columns, 4 * channels)


def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`pack`, for so many rows and columns of patches."""
    channels = tokens.shape[-1] // 4
    patches = tokens.reshape(-1, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(-1, channels, 2 * rows, 2 * columns)
