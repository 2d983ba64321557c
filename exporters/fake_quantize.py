"""Fake quantisation: the torch network computing what ``export --precision int8`` will, for learning against it.

The step graphs are made and calibrated as an export makes them, from the embeddings that one starts with. Which layers they
quantise, and by which scale at which evaluation, is carried back to the modules of the unmodified network: weights are rounded
once, inputs at every call, and gradients go straight through the rounding where nothing is clipped (Bengio et al. 2013, arXiv
1308.3432; Jacob et al. 2018, arXiv 1712.05877).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.lowering import Calibrated, nothing_quantised
from mteo_deploy.exporters.options import SCALED, Options
from mteo_deploy.exporters.passes.layers import Layer, layers_of
from mteo_deploy.exporters.passes.quantize import Array, Format, format_of, rounded, spread, weight_scale
from mteo_deploy.exporters.steps import Steps
from mteo_deploy.exporters.trace import trace_generic
from mteo_deploy.plan import Plan

LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass(frozen=True)
class Quantised:
    """What a precision quantises of a network.

    Attributes:
        precision: ``int8`` or ``fp8``.
        scales: module path of a layer -> the scale of its input at each evaluation; None where the input stays as it is. The
            weight of every layer here is quantised.
        left: layers that stay in float32 -> why.
    """

    precision: str
    scales: dict[str, list[float | None]]
    left: dict[str, str]

    @property
    def form(self) -> Format:
        return format_of(self.precision)


def quantised_layers(
    adapter: Adapter,
    plan: Plan,
    embeddings: Callable[[int], Mapping[str, Array]],
    precision: str,
    keep: Sequence[str] = (),
    calibration: int = 16,
) -> Quantised:
    """Compile and calibrate the step graphs of a plan, and say what an export quantises.

    Args:
        embeddings: evaluation index -> site -> ``[1, width]``.
        precision: one whose activations have scales.
        keep: layers to leave in float32, as patterns of their names.
        calibration: images whose trajectories scales are chosen on.

    Raises:
        InputError: for another precision, or a backbone without a layer that it takes.
        MissingPackageError: without ONNX Runtime, which calibrates.
    """
    if precision not in SCALED:
        raise InputError(f"expected --precision {' or '.join(SCALED)} to learn against; found {precision}")
    options = Options(("baked",), precision=precision, keep=keep, calibration=calibration)
    names = [request.name for request in adapter.requests]
    steps = Steps(trace_generic(adapter, ("batch",)), plan, embeddings, options, names, branches=adapter.branches)
    low = Calibrated(adapter, steps, options)
    graphs: list[tuple[ir.Model, int | None]] = [(model, i) for i, model in enumerate(steps.baked)]
    graphs += [(steps.prelude, None)] if steps.prelude is not None else []
    found, modules = Quantised(precision, {}, {}), _Modules(adapter.network)
    for model, index in graphs:
        quantize = low.one(index)
        quantize(model.clone())
        for layer in layers_of(model.graph):
            name, fate = modules.name_of(layer), quantize.layers[layer.name]
            if not fate.startswith("weight"):
                found.left[name] = fate
                continue
            scales = found.scales.setdefault(name, [None] * len(plan.evaluations))
            if index is not None:
                scales[index] = quantize.scales.get(layer.activation.name or "")
    if not found.scales:
        raise nothing_quantised(found.left, precision)
    return found


class _Modules:
    """A network's layers, found again from a graph's: by the module's path, or by the weight where the graph has no name."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._layers = {name: module for name, module in network.named_modules() if isinstance(module, LAYERS)}
        self._by_weight: dict[bytes, str] = {}
        for name, module in self._layers.items():
            weight = module.weight.detach().float().cpu().numpy()
            for one in (weight, weight.T) if weight.ndim == 2 else (weight,):
                self._by_weight.setdefault(_digest(one), name)

    def name_of(self, layer: Layer) -> str:
        path = layer.name.split("/")[0]
        tensor = layer.weight.const_value
        if path in self._layers or tensor is None:
            return path
        return self._by_weight.get(_digest(tensor.numpy()), layer.name)


def _digest(weight: NDArray[Any]) -> bytes:
    return hashlib.sha256(f"{weight.shape}".encode() + np.ascontiguousarray(weight, np.float32).tobytes()).digest()


class FakeQuantised:
    """A network with layers quantised while the context is open; afterwards its tensors and modules are what they were.

    Attributes:
        evaluation: whose scales count; set it before each call of the network.

    Raises:
        InputError: on entry, for a layer that the network does not have.
    """

    def __init__(self, network: torch.nn.Module, quantised: Quantised) -> None:
        self.network, self.quantised, self.evaluation = network, quantised, 0

    def __enter__(self) -> FakeQuantised:
        modules, form = dict(self.network.named_modules()), self.quantised.form
        missing = [name for name in self.quantised.scales if not isinstance(modules.get(name), LAYERS)]
        if missing:
            raise InputError(
                f"expected every quantised layer to be a linear layer or convolution of the network; found {missing[0]}, which "
                "is in its graph alone; name it with --keep"
            )
        self._weights = [(modules[name].weight, modules[name].weight.data) for name in self.quantised.scales]
        self._hooks = []
        for (name, scales), (weight, original) in zip(self.quantised.scales.items(), self._weights, strict=True):
            weight.data = round_weight(original, form)
            if any(scale is not None for scale in scales):
                self._hooks.append(modules[name].register_forward_pre_hook(self._round(scales)))
        return self

    def __exit__(self, *error: object) -> None:
        for weight, original in self._weights:
            weight.data = original
        for hook in self._hooks:
            hook.remove()

    def _round(self, scales: Sequence[float | None]) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], Any]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
            scale = scales[self.evaluation]
            return None if scale is None else (fake_quantise(inputs[0], scale, self.quantised.form), *inputs[1:])

        return hook


def round_weight(weight: torch.Tensor, form: Format) -> torch.Tensor:
    """A weight ``[out, ...]`` as the format leaves it, in its own type and place."""
    numbers = weight.detach().float().cpu().numpy()
    left = rounded(numbers, spread(weight_scale(numbers, 0, form), numbers, 0, form), form)
    return torch.from_numpy(left).to(weight)


def fake_quantise(values: torch.Tensor, scale: float, form: Format) -> torch.Tensor:
    """``values`` rounded to the format and back; the gradient is that of clipping alone."""
    ratio = (values.float() / scale).clamp(-form.largest, form.largest)
    low = ratio.detach().to(torch.float8_e4m3fn).float() if form.type == ir.DataType.FLOAT8E4M3FN else ratio.detach().round()
    return ((ratio + (low - ratio).detach()) * scale).to(values.dtype)
