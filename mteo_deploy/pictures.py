"""Images after every evaluation, for a reader's eyes: a few rows of noise on their way to images, beside the reference."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.images import to_uint8
from mteo_deploy.requests import Arrays
from mteo_deploy.sampler import Array, Sampler

ROWS = 4
CURVES, CURVE_HEIGHT = 3, 32
"""Of a signal: how many channels are drawn, and how high each."""
SIDE = 128
"""Pixels of the longer side above which an image is made smaller: a page should stay below a megabyte."""


@dataclass(frozen=True)
class Pictures:
    """Images in rows and columns.

    Attributes:
        rows, columns: what they are, in words.
        seed: of the noise that the rows begin with.
        pixels: uint8 ``[rows, columns, height, width, channels]``, 1 or 3 channels.
    """

    rows: list[str]
    columns: list[str]
    seed: int
    pixels: NDArray[np.uint8]


def collect(sampler: Sampler, seconds: float = 10.0) -> Pictures:
    """The first images of the stored noise: the noise, the state after every evaluation, and the reference trajectory.

    Args:
        seconds: that the reference trajectory may take; where it would take longer, torch's own image stands in its place.
    """
    reference, seed = sampler.bundle.reference(), sampler.bundle.manifest["reference"]["seed"]
    noise = reference["noise"][:ROWS]
    given = sampler.bundle.reference_requests(len(noise))
    states = sampler.states(noise, given)
    last = _reference_images(sampler, noise, given, seconds)
    columns = ["noise", *(f"evaluation {i}" for i in range(len(states)))]
    columns.append("torch" if last is None else f"reference, {len(sampler.reference_plan.evaluations)} evaluations")
    shown = [noise, *states, reference["states"][-1][: len(noise)] if last is None else last]
    pixels = np.stack([_pixels(images) for images in shown], axis=1)
    return Pictures([f"image {i}" for i in range(len(noise))], columns, seed, pixels)


def _reference_images(sampler: Sampler, noise: Array, given: Arrays, seconds: float) -> Array | None:
    """Images of the reference trajectory from the same noise; None where they would take longer than ``seconds``."""
    _ = sampler.conditioned_session  # opened before the clock starts
    clock = time.perf_counter()
    sampler.conditioned_states(sampler.plan, noise, given)
    each = (time.perf_counter() - clock) / len(sampler.plan.evaluations)
    plan = sampler.reference_plan
    if each * len(plan.evaluations) > seconds:
        return None
    images: Array = sampler.conditioned_states(plan, noise, given)[-1]
    return images


def _pixels(images: Array) -> NDArray[np.uint8]:
    """Smaller where too large; of latents, the first three channels as red, green and blue; of videos, the frame in the middle;
    of signals ``[n, channels, length]``, a curve for each of the first channels.

    What is not finite is grey.
    """
    if images.ndim == 5:
        images = images[:, images.shape[1] // 2]
    if images.ndim == 3:
        images = _curves(images)
    kept = images[:, : 3 if images.shape[1] >= 3 else 1]
    shown = np.clip(np.nan_to_num(kept, nan=0.0, posinf=0.0, neginf=0.0), -1, 1)
    factor = -(-max(shown.shape[2:]) // SIDE)
    height, width = (size // factor * factor for size in shown.shape[2:])
    blocks = shown[:, :, :height, :width].reshape(*shown.shape[:2], height // factor, factor, width // factor, factor)
    return to_uint8(blocks.mean(axis=(3, 5)))


def _curves(signals: Array) -> Array:
    """Signals drawn, dark on white: ``[n, channels, length]`` to ``[n, 1, height, width]``, one channel below the other."""
    kept = np.clip(np.nan_to_num(signals[:, :CURVES], nan=0.0, posinf=0.0, neginf=0.0), -1, 1)
    step = -(-kept.shape[2] // SIDE)
    width = kept.shape[2] // step
    means = kept[:, :, : width * step].reshape(*kept.shape[:2], width, step).mean(axis=3)
    heights = np.rint((1 - means) / 2 * (CURVE_HEIGHT - 1)).astype(np.int64)
    dark = np.arange(CURVE_HEIGHT)[:, None] == heights[:, :, None, :]
    shown = np.where(dark, -1.0, 1.0).astype(np.float32)
    return shown.reshape(len(signals), 1, -1, width)
