"""What a pipeline directory has beside its backbone and goes into the bundle too, and what is left out, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

import onnx_ir as ir

from mteo_deploy.exporters.base import Adapter, pipeline_parts
from mteo_deploy.exporters.decoder import CLASSES, Decoder, load_decoder
from mteo_deploy.exporters.text import TextEncoder, load_text_encoder
from mteo_deploy.exporters.trace import trace_decoder, trace_text_encoder


@dataclass(frozen=True)
class Pipeline:
    """The parts of a pipeline that are exported beside the backbone.

    Attributes:
        decoder: of its VAE; None for a pipeline that has none, or one left out.
        text_encoder: of its prompts; None likewise.
        left_out: what a bundle has not, though the pipeline's index names it, ``decoder`` or ``text encoder`` -> why.
    """

    decoder: Decoder | None = None
    text_encoder: TextEncoder | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def traces(self, adapter: Adapter, dynamic: Collection[str]) -> dict[str, Callable[[], ir.Model]]:
        """Name of a graph -> what traces it."""
        found: dict[str, Callable[[], ir.Model]] = {}
        if self.decoder is not None:
            found["decoder"] = partial(trace_decoder, self.decoder, adapter.sample_shape, dynamic)
        if self.text_encoder is not None:
            found["text_encoder"] = partial(trace_text_encoder, self.text_encoder)
        return found


def load_pipeline(adapter: Adapter) -> Pipeline:
    """The other parts of the pipeline that a backbone was loaded from; none, for one that is of no pipeline.

    Raises:
        InputError: for a part that is there and does not fit.
    """
    decoder, text = _decoder(adapter), load_text_encoder(adapter)
    reasons = {name: part for name, part in (("decoder", decoder), ("text encoder", text)) if isinstance(part, str)}
    return Pipeline(decoder if isinstance(decoder, Decoder) else None, text if isinstance(text, TextEncoder) else None, reasons)


def _decoder(adapter: Adapter) -> Decoder | str | None:
    vae = None if adapter.pipeline is None else pipeline_parts(adapter.pipeline).get("vae")
    if adapter.pipeline is None or vae is None:
        return None
    if vae not in CLASSES:
        return f"a VAE of class {vae} is not supported, {' and '.join(CLASSES)} are"
    return load_decoder(adapter.pipeline / "vae", vae, adapter.sample_shape[0])
