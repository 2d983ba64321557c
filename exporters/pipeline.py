"""What a pipeline directory has beside its backbone and goes into the bundle too, and what is left out, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from numpy.typing import NDArray

from mteo_deploy.decoding import check_tile, decode_in_tiles
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.decoder import CLASSES, Decoder, load_decoder
from mteo_deploy.exporters.directory import DECODERS, INDEX
from mteo_deploy.exporters.text import TextEncoder, load_text_encoder
from mteo_deploy.exporters.trace import trace_decoder, trace_text_encoder


@dataclass(frozen=True)
class Pipeline:
    """The parts of a pipeline that are exported beside the backbone.

    Attributes:
        decoder: of its VAE; None for a pipeline that has none, or one left out.
        text_encoder: of its prompts; None likewise.
        tile: height and width of the tiles of latents that the decoder gets of larger images; None: it gets whole ones.
        left_out: what a bundle has not, though the pipeline's index names it, ``decoder``, ``text encoder`` or the name of
            another part -> why.
    """

    decoder: Decoder | None = None
    text_encoder: TextEncoder | None = None
    tile: int | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def traces(self, adapter: Adapter, dynamic: Collection[str], batch: int | None = None) -> dict[str, Callable[[], ir.Model]]:
        """Name of a graph -> what traces it.

        Args:
            batch: the only size of the batch that is wanted; None for a dynamic one.
        """
        found: dict[str, Callable[[], ir.Model]] = {}
        if self.decoder is not None:
            channels, *size = adapter.sample_shape
            shape = (channels, *(n if self.tile is None else min(n, self.tile) for n in size))
            found["decoder"] = partial(trace_decoder, self.decoder, shape, self._open(dynamic), batch)
        if self.text_encoder is not None:
            found["text_encoder"] = partial(trace_text_encoder, self.text_encoder, batch)
        return found

    def _open(self, dynamic: Collection[str]) -> Collection[str]:
        """The axes that the decoder leaves open: tiles have sizes of their own."""
        return dynamic if self.tile is None else {*dynamic, "height", "width"}

    def decoder_json(self, dynamic: Collection[str]) -> dict[str, Any]:
        """What a sampler has to know of the decoder beside its graph; ``open`` where it takes any height and width."""
        assert self.decoder is not None
        is_open = {"height", "width"} <= {*self._open(dynamic)}
        return {**self.decoder.to_json(), "open": is_open, "tile": self.tile}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents in torch, in tiles where the bundle's are."""
        assert self.decoder is not None
        if self.tile is None or max(latents.shape[-2:]) <= self.tile:
            return self.decoder(latents)
        decoder = self.decoder

        def decode(part: NDArray[Any]) -> NDArray[Any]:
            return decoder(torch.from_numpy(part)).numpy()

        return torch.from_numpy(decode_in_tiles(decode, latents.numpy(), self.tile, decoder.to_json()["scale"]))


def load_pipeline(adapter: Adapter, tile: int | None = None, latents: bool = False) -> Pipeline:
    """The other parts of the pipeline that a backbone was loaded from; none, for one that is of no pipeline.

    Args:
        tile: of latents, for a decoder that gets larger images in tiles.
        latents: the bundle gives latents: the pipeline's VAE is left out.

    Raises:
        InputError: for a part that is there and does not fit, a VAE that is not supported, unless it is left out, or a tile
            where there is no decoder.
    """
    decoder, text = _decoder(adapter, latents), load_text_encoder(adapter)
    reasons = {name: part for name, part in (("decoder", decoder), ("text encoder", text)) if isinstance(part, str)}
    if tile is not None and not isinstance(decoder, Decoder):
        raise InputError(f"expected --tile with a pipeline whose VAE is decoded; {adapter.source} has none; leave it out")
    if tile is not None:
        check_tile(tile)
    texts = text if isinstance(text, TextEncoder) else None
    if texts is None:
        left = frozenset() if adapter.pipeline is None else adapter.pipeline.leave_out
        adapter.loras.refuse_text(text if isinstance(text, str) else "its pipeline has none", left)
    others = {} if adapter.pipeline is None else adapter.pipeline.left_out()
    return Pipeline(decoder if isinstance(decoder, Decoder) else None, texts, tile, reasons | others)


def _decoder(adapter: Adapter, latents: bool) -> Decoder | str | None:
    """The pipeline's decoder; why it has none, where it is left out; None for a pipeline whose samples need none."""
    pipeline = adapter.pipeline
    part = None if pipeline is None else next((name for name in DECODERS if name in pipeline.parts), None)
    if pipeline is None or part is None:
        return None
    cls, where = pipeline.parts[part][1], pipeline.path / part
    if latents or part in pipeline.leave_out:
        return f"the {part} ({cls}) was left out with {'--latents' if latents else '--leave-out'}: samples are latents"
    if cls not in CLASSES or not where.is_dir():
        found = f"a {cls}" if where.is_dir() else f"a {cls} in {INDEX}, and no directory {where}"
        raise InputError(
            f"expected a {part} of class {' or '.join(CLASSES)}, which decodes the samples; found {found}; for a bundle that "
            "gives latents pass --latents to export"
        )
    return load_decoder(where, cls, adapter.sample_shape[0], None if pipeline.kind is None else pipeline.kind.latents)
