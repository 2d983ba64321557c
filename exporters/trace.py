"""Tracing: the backbone once, its time embedding once, both with torch.export, into onnx-ir models.

Embeddings enter as ``[1, width]`` and broadcast: expanded to ``[batch, width]`` they could not be folded once the batch
is dynamic.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.decoder import Decoder
from mteo_deploy.exporters.slim import slim
from mteo_deploy.exporters.text import TextEncoder

OPSET = 20
IR_VERSION = 10  # engines lag behind the exporter's newest


class _TimeEmbedding(torch.nn.Module):
    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _distinct(self.adapter.embeddings(timestep))


def _distinct(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Each tensor once, in order: sites that share an embedding give the same one."""
    return tuple({id(tensor): tensor for tensor in tensors}.values())


class _Generic(torch.nn.Module):
    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, state: torch.Tensor, embeddings: list[torch.Tensor], requests: list[torch.Tensor]) -> torch.Tensor:
        names = [request.name for request in self.adapter.requests]
        for values in requests:  # one size, said before a network reshapes one by the other's
            torch._check(values.shape[0] == state.shape[0])
        return self.adapter(state, *embeddings, **dict(zip(names, requests, strict=True)))


def _keep_small(graph: ir.Graph) -> None:
    """Give scalars that are nearly zero or one an axis, which changes nothing that is computed from them.

    onnxscript's rules for ``x + 0`` and ``x * 1`` compare scalars, and only those of no axis, with a tolerance: an epsilon of
    1e-15 below a division (linear attention) would be taken for zero and left out, and the quotient of two zeros is no number.
    """
    for node in list(graph):
        if node.op_type not in ("Add", "Sub", "Mul", "Div") or not any(v is not None and v.shape for v in node.inputs):
            continue
        for i, value in enumerate(node.inputs):
            tensor = ir.convenience.get_const_tensor(value) if value is not None else None
            if tensor is None or tensor.shape or not tensor.dtype.is_floating_point() or not _nearly(float(tensor.numpy())):
                continue
            wide = ir.Value(name=f"{node.outputs[0].name}/small", type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]))
            wide.const_value = ir.tensor(tensor.numpy().reshape(1), name=wide.name)
            graph.register_initializer(wide)
            node.replace_input_with(i, wide)


def _nearly(number: float) -> bool:
    return 0 < abs(number) < 1e-6 or 0 < abs(number - 1) < 1e-4


def _export(module: torch.nn.Module, args: tuple[Any, ...], inputs: list[str], outputs: list[str], dynamic: Any) -> ir.Model:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter warns about its own deprecations
        program = torch.onnx.export(
            module.eval(),
            args,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic,
            optimize=False,
        )
        assert program is not None  # it is, with dynamo
        _keep_small(program.model.graph)
        program.optimize()
    model = program.model
    model.ir_version = IR_VERSION
    common.ClearMetadataAndDocStringPass()(model)  # stack traces, larger than the graph itself
    for value in list(model.graph.initializers.values()):  # the backbone's own names, as its user knows them
        value.name = (value.name or "").removeprefix("adapter.network.")
    slim(model)
    return model


def embedding_input(site: str) -> str:
    """Name of the graph input that takes a site's embedding."""
    return f"emb/{site}"


def trace_generic(adapter: Adapter, dynamic: Collection[str] = ()) -> ir.Model:
    """The generic graph: ``(state [batch, ...], emb/<site> [1, width] ..., <request> [batch, ...] ...) -> output``.

    Args:
        dynamic: ``height``, ``width``: axes of the state to leave open beside the batch.
    """
    state = torch.zeros(2, *adapter.sample_shape)
    embeddings = [torch.zeros(1, site.width) for site in adapter.sites]
    requests = list(adapter.draw_requests(2, 0).values())
    names = ["state", *(embedding_input(site.name) for site in adapter.sites), *(r.name for r in adapter.requests)]
    largest = 63 // adapter.branches  # diffusers copies from 64 on: a range over it is traced twice
    batch = {0: torch.export.Dim("batch", min=1, max=largest)}
    shapes = (batch | _open_sizes(adapter, dynamic), [None] * len(embeddings), [batch] * len(requests))
    return _export(_Generic(adapter), (state, embeddings, requests), names, ["output"], shapes)


def _open_sizes(adapter: Adapter, dynamic: Collection[str]) -> dict[int, Any]:
    """Axis -> what torch.export may assume: that the backbone can halve it as often as it does, and nothing more."""
    places = enumerate(("height", "width"), len(adapter.sample_shape) - 1)
    axes = {axis: torch.export.Dim(name, min=1, max=4096) for axis, name in places if name in dynamic}
    return {axis: dim if adapter.size_multiple == 1 else adapter.size_multiple * dim for axis, dim in axes.items()}


def trace_time_embedding(adapter: Adapter) -> tuple[ir.Model, dict[str, int]]:
    """The backbone's own time embeddings: ``timestep [1] -> [1, width] ...``, and site -> which of the outputs it takes."""
    timestep = torch.zeros(1)
    found = adapter.embeddings(timestep)
    position = {id(tensor): i for i, tensor in enumerate(_distinct(found))}
    sites = {site.name: position[id(tensor)] for site, tensor in zip(adapter.sites, found, strict=True)}
    names = [f"embedding_{i}" for i in range(len(position))]
    return _export(_TimeEmbedding(adapter), (timestep,), ["timestep"], names, None), sites


def trace_decoder(decoder: Decoder, shape: Sequence[int], dynamic: Collection[str] = ()) -> ir.Model:
    """The decoder's graph: ``latents [batch, *shape] -> images [batch, 3, height, width]``.

    Args:
        dynamic: ``height``, ``width``: axes to leave open beside the batch.
    """
    axes = {0: torch.export.Dim("batch", min=1, max=63)}
    axes |= {i: torch.export.Dim(name, min=1, max=4096) for i, name in ((2, "height"), (3, "width")) if name in dynamic}
    return _export(decoder, (torch.zeros(2, *shape),), ["latents"], ["images"], (axes,))


def trace_text_encoder(encoder: TextEncoder) -> ir.Model:
    """The text encoders' graph: ``input_ids [batch, length] ...``, and ``attention_mask ...`` where they see it, to the
    request inputs that they make."""
    ids = [torch.zeros(2, length, dtype=torch.int64) for length in encoder.lengths]
    masks = [torch.ones_like(one) for one in ids[: len(encoder.inputs) - len(ids)]]
    axes = [{0: torch.export.Dim("batch", min=1, max=63)}] * len(ids)
    return _export(encoder, (ids, masks), encoder.inputs, encoder.outputs, (axes, axes[: len(masks)]))
