"""``profile``: where the time of one sampling goes, layer by layer, beside the backbone with ordinary time conditioning."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import cache
from mteo_deploy.engines.base import ProfiledSession, Session
from mteo_deploy.errors import EngineError, InputError
from mteo_deploy.files import write_atomic
from mteo_deploy.progress import reporter
from mteo_deploy.sampler import Sampler, noise_for

GROUPS = {
    "convolution": "Conv FusedConv NhwcFusedConv ConvTranspose Convolution GroupConvolution Deconvolution "
    "CaskConvolution CaskDeconvolution CaskGemmConvolution",
    "matrix product": "MatMul Gemm FusedMatMul FusedGemm FullyConnected MatrixMultiply gemm",
    "attention": "Attention MultiHeadAttention Softmax ScaledDotProductAttention MHA",
    "norm": "InstanceNormalization GroupNorm GroupNormalization LayerNormalization SkipLayerNormalization RMSNormalization "
    "SimplifiedLayerNormalization ReduceMean MVN RMS RMSNorm Normalization",
    "activation": "Sigmoid QuickGelu Gelu FastGelu BiasGelu Silu Swish Erf Tanh Relu Elu",
    "arithmetic": "Add Sub Subtract Mul Multiply Div Divide Pow Power Sqrt Neg Exp Sin Cos Sum MulAdd "
    "PowerStatic Eltwise Subgraph Math ElementWise PointWiseV2",
    "layout and shape": "Reshape Transpose Concat Slice StridedSlice Gather Shape ShapeOf Expand Broadcast Squeeze Unsqueeze "
    "Split Cast Convert Identity Reorder ReorderInput ReorderOutput Tile Flatten ConstantOfShape Range Input Output Parameter "
    "Result Pad Reformat Shuffle NoOp Constant",
    "resize": "Resize Upsample Interpolate",
}
"""What a layer does -> the engines' names for such layers. A fused layer counts for what the engine calls it;
kernels that TensorRT made for many nodes (``kgen``) are none of these."""

_GROUP_OF = {kind: group for group, kinds in GROUPS.items() for kind in kinds.split()}


@dataclass(frozen=True)
class LayerCost:
    """One layer of one graph.

    Attributes:
        milliseconds: in one sampling of the whole plan: median of a run, times the runs in one sampling.
        runs: how often it runs in one sampling.
    """

    graph: str
    name: str
    kind: str
    group: str
    milliseconds: float
    runs: int


@dataclass(frozen=True)
class Profile:
    """Layers of the realisation, of the time-conditioned graph, and of what is run once beside either: decoder, text encoder.

    Times are the engine's own, taken with its profiling switched on, which costs time itself: they say where time goes, not
    how much a sampling takes (that is ``verify``'s).
    """

    bundle: str
    engine: str
    device: str
    precision: str
    realisation: str
    batch: int
    layers: list[LayerCost]
    conditioned: list[LayerCost]
    beside: list[LayerCost] = field(default_factory=list)

    def groups(self) -> dict[str, tuple[float, float]]:
        """What layers do -> milliseconds in one sampling, in the realisation and time-conditioned; the longest first."""
        found = {
            group: tuple(
                sum(layer.milliseconds for layer in layers if layer.group == group)
                for layers in (self.layers, self.conditioned)
            )
            for group in (*GROUPS, "other")
        }
        used = [(group, (ours, theirs)) for group, (ours, theirs) in found.items() if ours or theirs]
        return dict(sorted(used, key=lambda item: -max(item[1])))

    def graphs(self) -> dict[str, float]:
        """Graph -> milliseconds in one sampling: those of the realisation in the order they run, then those beside it."""
        found: dict[str, float] = {}
        for layer in [*self.layers, *self.beside]:
            found[layer.graph] = found.get(layer.graph, 0.0) + layer.milliseconds
        return found

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "groups": self.groups(), "graphs": self.graphs()}

    def chrome_trace(self) -> dict[str, Any]:
        """As rows of Chrome's trace viewer (``chrome://tracing``, Perfetto): layers end to end, in the order they run."""
        events: list[dict[str, Any]] = []
        rows = {self.realisation: self.layers, "time-conditioned": self.conditioned, "beside both": self.beside}
        for row, (title, layers) in enumerate((title, layers) for title, layers in rows.items() if layers):
            events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": title}})
            start = 0.0
            for layer in layers:
                length = layer.milliseconds * 1e3
                arguments = {"graph": layer.graph, "kind": layer.kind, "runs": layer.runs}
                event = {"ph": "X", "name": layer.name, "cat": layer.group, "pid": 0, "tid": row, "ts": start, "dur": length}
                events.append({**event, "args": arguments})
                start += length
        return {"displayTimeUnit": "ms", "traceEvents": events}

    def save(self, path: Path) -> None:
        """Write JSON: a Chrome trace for a path ending in ``.trace.json``, else :meth:`to_json`."""
        found = self.chrome_trace() if path.name.endswith(".trace.json") else self.to_json()
        write_atomic(path, json.dumps(found, indent=1) + "\n")


def profile(
    path: Path | str,
    *,
    engine: str = "auto",
    device: str | None = None,
    realisation: str | None = None,
    batch: int = 1,
    loops: int = 20,
    quiet: bool = False,
) -> Profile:
    """Time the layers of a built bundle and of the time-conditioned graph, whole samplings in turn; with each, one run of the
    decoder and of the text encoder, where there are any: a prompt of its own for every image, and no negative ones.

    Args:
        realisation: ``baked``, ``table`` or ``fused``; None for what the built engine was built for.
        batch: images per engine call.
        loops: samplings of each.

    Raises:
        InputError: for a batch or loop count below 1.
        BundleError, EngineError: as :meth:`Sampler.load`; EngineError too for an engine that does not tell, or tells only a
            part.
    """
    if batch < 1 or loops < 1:
        raise InputError(f"expected --batch and --loops of 1 or more; found {batch} and {loops}")
    bundle = Bundle.open(path)
    built = cache.find(bundle, engine, device)
    sessions: dict[str, ProfiledSession] = {}

    def open_graph(graph: str) -> Session:
        sessions[graph] = built.backend.profile(bundle, graph, built.device, built.options, batch, built.directory)
        return sessions[graph]

    sampler = Sampler(bundle, open_graph, realisation or built.record["realisation"], None, built)
    noise, requests = noise_for(bundle.sample_shape, 0, range(batch)), bundle.reference_requests(batch)
    tokens = bundle.reference_tokens(batch)
    with reporter(quiet) as report:
        task = report.task("profiling", loops)
        for _ in range(loops):
            last = sampler.image(noise, requests)
            sampler.conditioned_states(sampler.plan, noise, requests)
            if bundle.decoder:
                sampler.decode(last)
            if bundle.text_encoder:
                sampler.encode(tokens)
            report.advance(task, 1)
    ordinary = bundle.manifest["conditioned"]["graph"]
    others = [entry["graph"] for entry in (bundle.decoder, bundle.text_encoder) if entry]
    layers = [(graph, layer) for graph, session in sessions.items() for layer in session.layers()]
    if any(len(layer.times) % loops for _, layer in layers):
        raise EngineError(f"{built.backend.name} recorded a part of {loops} samplings only; use fewer --loops")
    costs = [
        LayerCost(
            graph=graph,
            name=layer.name,
            kind=layer.kind,
            group=_GROUP_OF.get(layer.kind, "other"),
            milliseconds=float(np.median(layer.times)) * len(layer.times) / loops,
            runs=len(layer.times) // loops,
        )
        for graph, layer in layers
    ]
    return Profile(
        bundle=bundle.path.name,
        engine=built.backend.name,
        device=built.device,
        precision=sampler.precision,
        realisation=sampler.loop.name,
        batch=batch,
        layers=[cost for cost in costs if cost.graph not in (ordinary, *others)],
        conditioned=[cost for cost in costs if cost.graph == ordinary],
        beside=[cost for cost in costs if cost.graph in others],
    )
