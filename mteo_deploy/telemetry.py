"""Usage events of engines: off, unless ``MTEO_TELEMETRY=1`` leaves them to the engines.

ONNX Runtime (from 1.29 on) starts its uploader, and keeps an identifier on the disk, when it is imported; what stops both is a
variable that it reads then. ``disable_telemetry_events()`` comes too late for the first event and for the identifier.

OpenVINO's Python package makes a client identifier below HOME when it is imported, and raises where there is no HOME. It does
neither where the package ``openvino_telemetry`` is not there, so it is not there while OpenVINO is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LEAVE = "MTEO_TELEMETRY"
"""``1``: the engines' own defaults hold."""
ONNXRUNTIME = "ORT_DISABLE_TELEMETRY"
OPENVINO = "openvino_telemetry"


def left_to_engines() -> bool:
    """Whether the user asked for the engines' own defaults."""
    return os.environ.get(LEAVE) == "1"


def switch_off() -> None:
    """Tell ONNX Runtime, before anything imports it. A value that the user gave is left as it is."""
    if not left_to_engines() and not os.environ.get(ONNXRUNTIME):
        os.environ[ONNXRUNTIME] = "1"


def off(engine: str) -> bool | None:
    """Whether an engine that would send usage events sends none; None for an engine that has none."""
    if engine not in ("onnxruntime", "openvino"):
        return None
    return not left_to_engines() and (engine != "onnxruntime" or os.environ.get(ONNXRUNTIME) == "1")


@contextmanager
def openvino_sends_nothing() -> Iterator[None]:
    """OpenVINO is imported inside, and finds no package that would send; afterwards everything is as it was."""
    if left_to_engines():
        yield
        return
    missing = object()
    before = sys.modules.get(OPENVINO, missing)
    sys.modules[OPENVINO] = None  # type: ignore[assignment]  # import raises ModuleNotFoundError
    try:
        yield
    finally:
        if before is missing:
            sys.modules.pop(OPENVINO, None)
        else:
            sys.modules[OPENVINO] = before  # type: ignore[assignment]
