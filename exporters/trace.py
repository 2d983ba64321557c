"""Tracing: the backbone once, its time embedding once, both with torch.export, into onnx-ir models.

Embeddings enter as ``[1, width]`` and broadcast: expanded to ``[batch, width]`` they could not be folded once the batch
is dynamic.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.capture import capture, conversion_reason
from mteo_deploy.exporters.decoder import Decoder
from mteo_deploy.exporters.parity import BATCHES, Case, Traced, check
from mteo_deploy.exporters.slim import slim
from mteo_deploy.exporters.text import TextEncoder
from mteo_deploy.sampler import noise_for

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


def _export(
    module: torch.nn.Module, args: tuple[Any, ...], inputs: list[str], outputs: list[str], dynamic: Any, what: str
) -> Traced:
    program = capture(module.eval(), args, dynamic, what)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter warns about its own deprecations
        try:
            made = torch.onnx.export(
                program, opset_version=OPSET, input_names=inputs, output_names=outputs, dynamo=True, optimize=False
            )
        except Exception as error:
            raise InputError(
                f"expected {what} to be made of operators that ONNX has; {type(error).__name__}: {conversion_reason(error)}; "
                "write it with others"
            ) from error
        assert made is not None  # it is, with dynamo
        _keep_small(made.model.graph)
        made.optimize()
    model = made.model
    model.ir_version = IR_VERSION
    common.ClearMetadataAndDocStringPass()(model)  # stack traces, larger than the graph itself
    for value in list(model.graph.initializers.values()):  # the backbone's own names, as its user knows them
        value.name = (value.name or "").removeprefix("adapter.network.")
    slim(model)
    return Traced(model, program, module, inputs, what)


def embedding_input(site: str) -> str:
    """Name of the graph input that takes a site's embedding."""
    return f"emb/{site}"


def trace_generic(adapter: Adapter, dynamic: Collection[str] = (), batch: int | None = None) -> ir.Model:
    """The generic graph: ``(state [batch, ...], emb/<site> [1, width] ..., <request> [batch, ...] ...) -> output``.

    It was compared with the adapter at other sizes of each dynamic axis.

    Args:
        dynamic: ``height``, ``width``: dynamic axes of the state beside the batch.
        batch: the only size of the batch that is wanted: a network that takes no other is traced for that one. The batch is
            dynamic in the graph of any other network.

    Raises:
        InputError: for a network that cannot be traced, makes a number of a dynamic axis, or computes something else in torch.
    """
    what, module = f"the network {adapter.family}", _Generic(adapter)
    names = ["state", *(embedding_input(site.name) for site in adapter.sites), *(r.name for r in adapter.requests)]
    largest = 63 // adapter.branches  # diffusers copies from 64 on: a range over it is traced twice
    sizes = _open_sizes(adapter, dynamic)

    def trace(count: int, axis: dict[int, Any]) -> Traced:
        args = _generic_args(adapter, count, adapter.sample_shape)
        shapes = (axis | sizes, [None] * len(args[1]), [axis or None] * len(args[2]))
        return _export(module, args, names, ["output"], shapes, what)

    traced = _by_batch(trace, largest, batch)
    _check_output(traced, adapter.sample_shape)
    shapes = [adapter.sample_shape, (*adapter.sample_shape[:-2], *other_size(adapter, dynamic))]
    check(traced, (_generic_case(adapter, n, shape, dynamic, batch) for n, shape in _sizes(batch, shapes)))
    return traced.model


def _generic_case(adapter: Adapter, count: int, shape: tuple[int, ...], dynamic: Collection[str], batch: int | None) -> Case:
    case = _case(count, shape, _generic_args(adapter, count, shape), batch)
    way_out = "export with fixed sizes: --dynamic batch" if {*dynamic} & {"height", "width"} else case.way_out
    return replace(case, way_out=way_out, shape=(count, *shape))


def _by_batch(trace: Callable[[int, dict[int, Any]], Traced], largest: int, batch: int | None) -> Traced:
    """With a dynamic batch; where that is a number in the network, and one size is wanted, for that size.

    From 2 on: torch would guard against 1 in many networks, and be asked twice. What a graph computes at 1 is compared.
    """
    try:
        return trace(2, {0: torch.export.Dim("batch", min=2, max=largest)})
    except InputError:
        if batch is None:
            raise
        return trace(batch, {})


def _sizes(batch: int | None, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    """What to compare at: each batch with one of the shapes, the last one in any case."""
    batches = BATCHES if batch is None else (batch, batch)
    found = zip(batches, (shapes[0], shapes[-1]), strict=True)
    return list(dict.fromkeys(found))


def _case(count: int, shape: tuple[int, ...], args: tuple[Any, ...], batch: int | None) -> Case:
    way_out = "export with a fixed size: --batch 1" if batch is None else "report this network: no export of it is right"
    return Case(args, f"batch {count}, {'x'.join(map(str, shape))}", way_out)


def _generic_args(adapter: Adapter, count: int, shape: Sequence[int]) -> tuple[Any, ...]:
    state = torch.from_numpy(noise_for(tuple(shape), 1, range(count)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # sites may share the pretrained one: torch.export would make one input of them
        pretrained = adapter.embeddings(torch.ones(1))
        embeddings = [one + 0.1 * torch.randn(one.shape, generator=generator) for one in pretrained]
    return state, embeddings, list(adapter.draw_requests(count, 1).values())


def _check_output(traced: Traced, shape: Sequence[int]) -> None:
    """The output is one of the state's shape: a solver adds them up."""
    state, found = traced.model.graph.inputs[0].shape, traced.model.graph.outputs[0].shape
    dims = [] if found is None else [dim if isinstance(dim, int) else None for dim in found]
    if (
        state is None
        or len(dims) != len(shape) + 1
        or any(isinstance(known, int) and dim != known for known, dim in zip(state, dims, strict=True))
    ):
        raise InputError(
            f"expected {traced.what} to give an output of the state's shape {_dims(state)}; found {_dims(found)}; cut or "
            "reshape it in the adapter"
        )


def _dims(shape: ir.Shape | None) -> str:
    return (
        "[" + ", ".join("batch" if axis == 0 and not isinstance(d, int) else str(d) for axis, d in enumerate(shape or ())) + "]"
    )


def _open_sizes(adapter: Adapter, dynamic: Collection[str]) -> dict[int, Any]:
    """Axis -> what torch.export may assume: that the backbone can halve it as often as it does, and nothing more."""
    places = enumerate(("height", "width"), len(adapter.sample_shape) - 1)
    axes = {axis: torch.export.Dim(name, min=1, max=4096) for axis, name in places if name in dynamic}
    return {axis: dim if adapter.size_multiple == 1 else adapter.size_multiple * dim for axis, dim in axes.items()}


def other_size(adapter: Adapter, dynamic: Collection[str]) -> tuple[int, ...]:
    """A height and width to check beside the backbone's own: larger where they are open, and not by the same.

    Raises:
        InputError: when the backbone takes no other.
    """
    height, width = adapter.sample_shape[-2:]
    opened = [axis for axis in ("height", "width") if axis in dynamic]
    if not opened:
        return height, width
    if adapter.size_multiple is None:
        raise InputError(
            f"expected a backbone that takes other sizes with --dynamic {','.join(opened)}; {adapter.family} takes "
            f"{height}x{width} only (its position embeddings are of that size); leave height and width out"
        )
    for axis, length in zip(("height", "width"), (height, width), strict=True):
        if axis in opened and length % adapter.size_multiple:
            raise InputError(adapter.size_error(height, width, adapter.size_multiple) + f", or --dynamic without {axis}")
    steps = [adapter.size_multiple * (axis in dynamic) for axis in ("height", "width")]
    return height + steps[0], width + 2 * steps[1]


def trace_time_embedding(adapter: Adapter) -> tuple[ir.Model, dict[str, int]]:
    """The backbone's own time embeddings: ``timestep [1] -> [1, width] ...``, and site -> which of the outputs it takes.

    Raises:
        InputError: when they cannot be traced, or are not torch's at another time.
    """
    timestep = torch.zeros(1)
    found = adapter.embeddings(timestep)
    position = {id(tensor): i for i, tensor in enumerate(_distinct(found))}
    sites = {site.name: position[id(tensor)] for site, tensor in zip(adapter.sites, found, strict=True)}
    names = [f"embedding_{i}" for i in range(len(position))]
    what = f"the time embedding of {adapter.family}"
    traced = _export(_TimeEmbedding(adapter), (timestep,), ["timestep"], names, None, what)
    check(traced, [Case((torch.tensor([0.7]),), "time 0.7", "take the time from the argument in `embeddings`")])
    return traced.model, sites


def trace_decoder(decoder: Decoder, shape: Sequence[int], dynamic: Collection[str] = (), batch: int | None = None) -> ir.Model:
    """The decoder's graph: ``latents [batch, *shape] -> images [batch, 3, height, width]``.

    Args:
        dynamic: ``height``, ``width``: dynamic axes beside the batch.
        batch: the only size of the batch that is wanted, as in :func:`trace_generic`.

    Raises:
        InputError: as :func:`trace_generic`.
    """
    sizes = {i: torch.export.Dim(name, min=1, max=4096) for i, name in ((2, "height"), (3, "width")) if name in dynamic}
    what = f"the decoder {type(decoder.vae).__name__}"

    def trace(count: int, axis: dict[int, Any]) -> Traced:
        args = (torch.zeros(count, *shape),)
        return _export(decoder, args, ["latents"], ["images"], (axis | sizes,), what)

    traced, count = _by_batch(trace, 63, batch), batch or 1  # images of one are large enough
    other = (shape[0], *(n + 2 + i if 2 + i in sizes else n for i, n in enumerate(shape[1:])))
    check(traced, [_case(count, other, (torch.from_numpy(noise_for(other, 1, range(count))),), batch)])
    return traced.model


def trace_text_encoder(encoder: TextEncoder, batch: int | None = None) -> ir.Model:
    """The text encoders' graph: ``input_ids [batch, length] ...``, and ``attention_mask ...`` where they see it, to the
    request inputs that they make.

    Args:
        batch: the only size of the batch that is wanted, as in :func:`trace_generic`.

    Raises:
        InputError: as :func:`trace_generic`.
    """

    def args(count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        rows = (torch.arange(length) + torch.arange(count)[:, None] for length in encoder.lengths)
        ids = [row % 7 for row in rows]  # small ones: any vocabulary has them
        return ids, [torch.ones_like(one) for one in ids[: len(encoder.inputs) - len(ids)]]

    def trace(count: int, axis: dict[int, Any]) -> Traced:
        ids, masks = args(count)
        shapes = ([axis or None] * len(ids), [axis or None] * len(masks))
        return _export(encoder, (ids, masks), encoder.inputs, encoder.outputs, shapes, "the text encoders")

    traced, count = _by_batch(trace, 63, batch), batch or 3
    check(traced, [_case(count, tuple(encoder.lengths), args(count), batch)])
    return traced.model
