"""What a pipeline directory has beside its backbone and goes into the bundle too, and what is left out, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from mteo_deploy.exporters.base import Adapter, pipeline_parts
from mteo_deploy.exporters.decoder import CLASSES, Decoder, load_decoder


@dataclass(frozen=True)
class Pipeline:
    """The parts of a pipeline that are exported beside the backbone.

    Attributes:
        decoder: of its VAE; None for a pipeline that has none, or one left out.
        left_out: what a bundle has not, though the pipeline's index names it: ``decoder`` -> why.
    """

    decoder: Decoder | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def load_pipeline(adapter: Adapter) -> Pipeline:
    """The other parts of the pipeline that a backbone was loaded from; none, for one that is of no pipeline.

    Raises:
        InputError: for a part that is there and does not fit.
    """
    if adapter.pipeline is None:
        return Pipeline()
    parts = pipeline_parts(adapter.pipeline)
    vae = parts.get("vae")
    if vae is None:
        return Pipeline()
    if vae not in CLASSES:
        return Pipeline(left_out={"decoder": f"a VAE of class {vae} is not supported, {' and '.join(CLASSES)} are"})
    return Pipeline(load_decoder(adapter.pipeline / "vae", vae, adapter.sample_shape[0]))
