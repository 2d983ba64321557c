"""Time saved: what each kind of layer takes off an evaluation by being quantised, measured in the engine that will run it.

Engines choose kernels, layouts and fusions by a layer's operator and shape, so layers alike in both gain alike. A step graph
with every layer quantised runs in turns with the same graph that leaves one kind in float32; what that adds is what the kind
saves, with the conversions around it and as the engine runs it in earnest: profiles of single layers leave out the first and
change the second.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from mteo_deploy import latency
from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import backend, best_device
from mteo_deploy.engines.base import Session
from mteo_deploy.exporters.passes.layers import Layer, layers_of
from mteo_deploy.exporters.passes.quantize import Format, Quantize, declined
from mteo_deploy.exporters.passes.shapes import infer_shapes
from mteo_deploy.exporters.passes.share import Share, WeightFile
from mteo_deploy.exporters.running import Values
from mteo_deploy.files import Scratch

SECONDS, PAIRS = 20.0, 300
"""For all kinds of layers together, each time that they are measured; and runs of each kind at most."""


@dataclass(frozen=True)
class Kind:
    """Layers alike, and what quantising them does to the time of an evaluation.

    Attributes:
        name: operator, kernel and positions: ``Conv 3x3 at 28x28``.
        layers: their names.
        ratio: time with this kind alone in float32 over that with everything quantised: median, and the ends of its 95 %
            interval.
    """

    name: str
    layers: list[str]
    ratio: tuple[float, float, float]

    @property
    def slow(self) -> bool:
        """Whether float32 is faster, by more than the noise of the measurement."""
        return self.ratio[2] < 1

    @property
    def saved(self) -> float:
        """Share of the quantised graph's time that float32 would add; 0 where the measurement does not tell."""
        return self.ratio[0] - 1 if self.ratio[1] > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def time_saved(
    model: ir.Model,
    form: Format,
    scales: Mapping[str, float],
    keep: Collection[str],
    engine: str,
    values: Values,
    batches: Sequence[int] = (),
    seconds: float = SECONDS,
) -> list[Kind]:
    """Every kind of layer that can be quantised, in the order of the graph.

    Where some are slow, the others are measured again without them: what was quantised on both sides may not be any more.

    Args:
        model: a step graph in float32; left as it is.
        scales, keep: as :class:`~mteo_deploy.exporters.passes.quantize.Quantize` takes them.
        engine: a backend's name; its first device is measured.
        values: of the graph's inputs, others are left out; the first of ``batches``, or one image, is run.
        batches: sizes to make the graphs ready for; none for any.
        seconds: for all kinds together, each time.

    Raises:
        EngineError: for an engine that does not open the graphs.
        MissingPackageError: when the engine's package is not installed.
    """
    model = model.clone()
    infer_shapes(model)
    kinds: dict[str, list[str]] = {}
    for layer in layers_of(model.graph):
        if declined(layer, form, keep) is None:
            kinds.setdefault(kind_of(layer), []).append(layer.name)
    taken, size = [value.name or "" for value in model.graph.inputs], batches[0] if batches else 1
    feeds = {name: np.resize(values[name], (size, *values[name].shape[1:])) for name in taken}
    found: dict[str, Kind] = {}
    with _opener(engine, batches) as opened:

        def measure(off: Sequence[str], names: Collection[str]) -> list[Kind]:
            """Kinds, against a graph that leaves ``off`` in float32."""

            def session(but: Sequence[str]) -> Session:
                copy = model.clone()
                Quantize(form, scales, [*keep, *off, *but])(copy)
                return opened(copy)

            with closing(session([])) as whole:
                return [_kind(name, kinds[name], whole, session, feeds, seconds / len(names)) for name in names]

        while left := [name for name in kinds if name not in found or not found[name].slow]:
            off = [layer for name in kinds if name not in left for layer in kinds[name]]
            found |= {one.name: one for one in measure(off, left)}
            if not any(found[name].slow for name in left):
                break
    return [found[name] for name in kinds]


def _kind(
    name: str, layers: list[str], whole: Session, session: Callable[[list[str]], Session], feeds: Values, seconds: float
) -> Kind:
    """Time one kind."""
    with closing(session(layers)) as without:
        times = latency.compare(lambda: without.run(feeds), lambda: whole.run(feeds), seconds=seconds, pairs=PAIRS)
    return Kind(name, layers, (times.ratio, times.ratio_low, times.ratio_high))


def kind_of(layer: Layer) -> str:
    """What engines choose a kernel by: the operator, its kernel's size, and at how many positions it is applied."""
    convolution = layer.node.op_type == "Conv"
    shape = [size if isinstance(size, int) else "?" for size in layer.node.outputs[0].shape or ()]
    positions = shape[2:] if convolution else shape[1:-1]
    kernel = [*layer.weight.shape][2:] if convolution and layer.weight.shape is not None else []
    return (
        layer.node.op_type
        + (f" {'x'.join(map(str, kernel))}" if kernel else "")
        + (f" at {'x'.join(map(str, positions))}" if positions else "")
    )


@contextmanager
def _opener(engine: str, batches: Sequence[int]) -> Iterator[Any]:
    """Opens graphs in an engine, as ``build`` would; their files go with the block."""
    target = backend(engine)
    device = best_device(target)
    options = {"batch": list(batches)} if batches else {}
    with Scratch("mteo-deploy-timing-") as directory:
        loose, weights = Bundle(directory, {}), WeightFile(directory / "weights.bin")

        def opened(model: ir.Model) -> Session:
            Share(weights)(model)
            file = f"graph_{len(list(loose.path.glob('*.onnx')))}.onnx"
            ir.save(model, loose.path / file)
            return target.open(loose, file, device, options)

        yield opened
