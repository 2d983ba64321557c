"""What to sample, in one record, and its request inputs batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.errors import InputError
from mteo_deploy.prompts import SIZES, Texts, check_texts
from mteo_deploy.requests import Arrays, Request, take_all

Array = NDArray[np.float32]


@dataclass(frozen=True)
class SampleRequest:
    """What to sample.

    Attributes:
        num, seed: image ``i`` of ``num`` depends on ``(seed, i)`` and its own request inputs only.
        batch: images per engine call.
        requests: what the backbone wants beside the noise, e.g. ``{"class_labels": [3]}``: one value, or one per image.
        size: height and width of the state, where the bundle leaves them open; None for the backbone's own.
        latents: leave the last states as they are where the bundle could decode them.
        prompt, negative_prompt: for a bundle with a text encoder: one text for all images, or one for each. ``requests`` then
            has what they do not make.
        tile: as :meth:`Sampler.decode` takes it.
        finite: images that are not finite are an error.
    """

    num: int = 1
    seed: int = 0
    batch: int = 16
    requests: Mapping[str, Any] | None = None
    size: tuple[int, int] | None = None
    latents: bool = False
    prompt: Texts | None = None
    negative_prompt: Texts | None = None
    tile: int | None = None
    finite: bool = True

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            InputError: for each of them.
        """
        if self.num < 1 or self.batch < 1:
            raise InputError(f"expected --num and --batch of 1 or more; found {self.num} and {self.batch}")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"expected a seed in [0, 2**64); found {self.seed}")
        if self.prompt is None and self.negative_prompt is not None:
            raise InputError("expected --negative-prompt with --prompt; found no --prompt")

    @property
    def starts(self) -> range:
        """The first image of each batch."""
        return range(0, self.num, self.batch)

    def rows(self, start: int) -> range:
        """The images of the batch that begins with image ``start``."""
        return range(start, min(start + self.batch, self.num))


Prompted = Callable[[SampleRequest, Texts, Texts | None, int], Mapping[str, Any]]
"""From prompts and negative ones for a number of images to request inputs by name."""


def parts_of(asked: SampleRequest, requests: Sequence[Request], prompted: Prompted) -> Callable[[range], Arrays]:
    """From the images of a batch to their request inputs. Prompts of their own are encoded with their batch.

    Raises:
        InputError: for request inputs or prompts that do not fit, before anything is drawn.
    """
    own, texts = dict(asked.requests or {}), [text for text in (asked.prompt, asked.negative_prompt) if text is not None]

    def joined(prompt: Texts, negative: Texts | None, count: int) -> dict[str, Any]:
        made = dict(prompted(asked, prompt, negative, count))
        if twice := sorted(made.keys() & own.keys() - {*SIZES}):
            raise InputError(f"expected {', '.join(twice)} from --prompt or --requests; found both; leave one out")
        return made

    prompt, negative = asked.prompt, asked.negative_prompt
    if prompt is None or asked.num <= asked.batch or not any(map(_is_one_each, texts)):
        made = {} if prompt is None else joined(prompt, negative, asked.num)
        whole = take_all(requests, {**made, **own}, asked.num)
        return lambda rows: {name: np.ascontiguousarray(values[rows.start : rows.stop]) for name, values in whole.items()}
    check_texts(prompt, negative, asked.num)
    named = {request.name: request for request in requests}
    taken = {name: named[name].take(value, asked.num) if name in named else value for name, value in own.items()}

    def part(rows: range) -> Arrays:
        made = joined(_of(prompt, rows), None if negative is None else _of(negative, rows), len(rows))
        others = {name: values[rows.start : rows.stop] if name in named else values for name, values in taken.items()}
        found = take_all(requests, {**made, **others}, len(rows))
        return {name: np.ascontiguousarray(values) for name, values in found.items()}

    part(asked.rows(0))  # a clear error before the loop runs
    return part


def _is_one_each(text: Texts) -> bool:
    return not isinstance(text, str) and len(text) > 1


def _of(text: Texts, rows: range) -> Texts:
    """The texts of some images: the one for all of them, or theirs."""
    return text[rows.start : rows.stop] if _is_one_each(text) else text


def together(asked: SampleRequest, draw: Callable[[int], Array], progress: Callable[[int], None] | None) -> Array:
    """All images of a request in one array.

    Args:
        draw: from the first image of a batch to the batch's images.
        progress: called with the number of images finished.
    """
    found: Array | None = None
    for start in asked.starts:
        part, rows = draw(start), asked.rows(start)
        if len(rows) == asked.num:
            found = part
        elif found is None:
            found = np.empty((asked.num, *part.shape[1:]), part.dtype)
        if found is not part:
            found[rows.start : rows.stop] = part
        if progress:
            progress(len(rows))
    assert found is not None, "one batch or more"
    return found
