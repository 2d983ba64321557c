"""The count of a graph's work: by hand on small graphs, by torch on a real network."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.trace import trace_generic
from mteo_deploy.exporters.work import count

SHAPES = {"w1": (8, 2, 3, 3), "b1": (8,), "w2": (8, 5, 2, 2), "w3": (240, 7), "w4": (10, 7)}
LAYERS = """
    a = Conv<pads = [1, 1, 1, 1], strides = [2, 2], group = 2>(x, w1, b1)
    s = Sigmoid(a)
    b = ConvTranspose<strides = [2, 2]>(s, w2)
    c = Flatten(b)
    d = MatMul(c, w3)
    y = Gemm<transB = 1>(d, w4)
"""


def model(layers: str = LAYERS, batch: object = "N") -> ir.Model:
    """``x [batch, 4, 8, 6] -> y [batch, 10]``, with weights of zeros."""
    signature = f"agraph (float[{batch}, 4, 8, 6] x) => (float[{batch}, 10] y)"
    found = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20]> {signature} {{ {layers} }}')
    for node in found.graph:
        for value in node.inputs:
            if value is not None and value.name in SHAPES and not value.is_initializer():
                value.const_value = ir.tensor(np.zeros(SHAPES[value.name], np.float32), name=value.name)
                value.shape, value.dtype = ir.Shape(SHAPES[value.name]), ir.DataType.FLOAT
                found.graph.register_initializer(value)
    return found


@pytest.mark.parametrize("batch", ["N", 3])
def test_by_hand(batch: object) -> None:
    """Per image. Conv: 8 x 4 x 3 outputs, each of 2 channels x 3 x 3. ConvTranspose: 8 x 4 x 3 inputs, each into 5 x 2 x 2."""
    flops = 2 * (8 * 4 * 3) * (2 * 3 * 3) + 2 * (8 * 4 * 3) * (5 * 2 * 2) + 2 * 240 * 7 + 2 * 7 * 10
    weights = 8 * 2 * 3 * 3 + 8 + 8 * 5 * 2 * 2 + 240 * 7 + 10 * 7
    moved = (4 * 8 * 6 + 8 * 4 * 3) + (8 * 4 * 3 + 5 * 8 * 6) + (240 + 7) + (7 + 10)
    network = model(batch=batch)
    found = count(network, 3 if batch == 3 else "dynamic")
    assert found == {"flops": flops, "weight_bytes": 4 * weights, "activation_bytes": 4 * moved}
    assert str(network.graph.inputs[0].shape[0]) == str(batch)  # type: ignore[index]  # the graph itself is left alone


def test_a_weight_that_is_used_twice_is_read_twice() -> None:
    """As in the fused graph, where every evaluation takes the same ones."""
    twice = "a = Conv<pads = [1, 1, 1, 1], group = 2>(x, w1) b = Conv<pads = [1, 1, 1, 1], group = 2>(x, w1) y = Sub(a, b)"
    assert count(model(twice))["weight_bytes"] == 2 * 4 * 8 * 2 * 3 * 3


EINSUM = 'y = Einsum<equation = "abcd->ab">(x)'


@pytest.mark.parametrize(("layers", "match"), [(EINSUM, "Einsum"), ("z = NonZero(x) y = MatMul(z, z)", "shapes")])
def test_what_is_not_known_is_no_figure(layers: str, match: str) -> None:
    assert match in count(model(layers))["unknown"]


def test_as_torch_counts(tiny_adapter: Adapter) -> None:
    """The whole network as traced, against torch's own counter, less the time embedding that torch computes for nothing.

    Attention in its plain form: torch does not count the fused one on the CPU.
    """
    state = torch.zeros(1, *tiny_adapter.sample_shape)
    embeddings = [torch.zeros(1, site.width) for site in tiny_adapter.sites]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tiny_adapter(state, *embeddings)
    (time,) = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith(".time_embedding")]
    assert count(trace_generic(tiny_adapter))["flops"] == counter.get_total_flops() - time
