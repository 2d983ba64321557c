"""ONNX Runtime on an NVIDIA GPU: whether it can run there at all, with which settings, and that it does.

ONNX Runtime lists the CUDA provider wherever it was compiled in, and where the provider cannot be loaded it opens the session
on the CPU and goes on. Here the driver is asked for a GPU, the provider for some memory on it, and an open session for where
it put every node.

``session.disable_cpu_ep_fallback`` is not used for that: it refuses the arithmetic on shapes that ONNX Runtime itself puts on
the CPU in a graph with a dynamic batch size (github.com/microsoft/onnxruntime issue 17930). Those nodes are let pass by name;
any other one on the CPU is an error.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy.engines import nvidia
from mteo_deploy.engines.base import ON_OFF, Option
from mteo_deploy.errors import EngineError

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS = {"cuda": [CUDA], "tensorrt": [TENSORRT, CUDA]}
OPTIONS = {
    "provider": Option("on cuda: ONNX Runtime's own kernels, or TensorRT 10 for what it takes", tuple(PROVIDERS), "cuda"),
    "cuda_graph": Option("on cuda: each graph captured in a CUDA graph; by itself on, unless a graph refuses", ON_OFF),
    "tf32": Option("on cuda: products in TF32, which is less than fp32", ON_OFF, "off"),
    "nhwc": Option("on cuda: convolutions with the channels last", ON_OFF, "off"),
}
"""Options that mean something on the device ``cuda`` only."""

SHAPE_OPERATORS = frozenset(
    (
        *("Shape", "Size", "Slice", "Concat", "Gather", "Squeeze", "Unsqueeze", "Cast", "Identity", "Reshape", "Range"),
        *("ConstantOfShape", "Expand", "Where", "Equal", "Constant", "Add", "Sub", "Mul", "Div", "Mod", "Min", "Max"),
    )
)
"""What may stay on the CPU beside a GPU: arithmetic on shapes, a few integers each."""

RECORD = "session.record_ep_graph_assignment_info"


def check(onnxruntime: Any) -> None:
    """That this ONNX Runtime can use a GPU of this machine.

    Raises:
        EngineError: what is missing, and the way out.
    """
    version = onnxruntime.__version__
    if CUDA not in onnxruntime.get_available_providers():
        raise EngineError(
            f"expected the package onnxruntime-gpu for the device cuda; found onnxruntime {version}, which has no CUDA; run: "
            "pip uninstall -y onnxruntime && pip install 'mteo-deploy[gpu]'"
        )
    try:
        nvidia.gpus()
    except EngineError as error:
        raise EngineError(
            f"expected a GPU for onnxruntime-gpu {version} on the device cuda; {error}; install the driver, or use --device cpu"
        ) from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            onnxruntime.preload_dlls()
        onnxruntime.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", 0)
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        cuda = getattr(onnxruntime, "cuda_version", "")
        raise EngineError(
            f"expected onnxruntime-gpu {version} to load CUDA {cuda} and cuDNN; found a GPU, and {error}; run: pip install "
            "'mteo-deploy[gpu]'"
        ) from None


def providers(own: Mapping[str, Any], cache: Path | None, prefix: str, graphs: bool) -> list[tuple[str, dict[str, str]]]:
    """Providers and their settings, in order.

    Args:
        own: values of :data:`OPTIONS`.
        cache: directory for the engines that the TensorRT provider builds.
        prefix: how their names begin.
        graphs: whether the CUDA provider captures CUDA graphs.
    """
    settings = {
        CUDA: {
            "device_id": "0",
            "use_tf32": str(int(own["tf32"] == "on")),
            "prefer_nhwc": str(int(own["nhwc"] == "on")),
            "enable_cuda_graph": str(int(graphs)),
        },
        TENSORRT: {
            "device_id": "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_engine_cache_prefix": prefix,
        },
    }
    return [(name, settings[name]) for name in PROVIDERS[own["provider"]]]


def check_placed(session: Any, graph: str, provider: str) -> None:
    """That a session, opened with :data:`RECORD` set, computes where it should.

    Raises:
        EngineError: for a session without the provider, or a node of the network on the CPU.
    """
    found = session.get_providers()
    if found[0] != provider:
        raise EngineError(f"expected {graph} on {provider}; onnxruntime put it on {found[0]}")
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == "CPUExecutionProvider"]
    nodes = [node for part in parts for node in part.get_nodes() if node.op_type not in SHAPE_OPERATORS]
    if nodes:
        names = ", ".join(f"{node.op_type} {node.name}".strip() for node in nodes[:3]) + (", ..." if len(nodes) > 3 else "")
        raise EngineError(
            f"expected all of {graph} on {provider}; onnxruntime put {len(nodes)} nodes on the CPU ({names}); use another "
            "engine, or export again and report the graph"
        )
