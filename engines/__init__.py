"""Engines: what runs a bundle's graphs. One file per backend, loaded only when asked for."""

from __future__ import annotations

from importlib import import_module

from mteo_deploy.engines.base import Backend
from mteo_deploy.errors import InputError

BACKENDS = {"onnxruntime": "mteo_deploy.engines.onnxruntime"}
NOT_YET = ("tensorrt", "openvino")


def backend(engine: str) -> Backend:
    """The backend of that name.

    Raises:
        InputError: for a name without a backend.
    """
    if engine in BACKENDS:
        loaded: Backend = import_module(BACKENDS[engine]).BACKEND
        return loaded
    planned = f" ({engine} is planned, not there yet)" if engine in NOT_YET else ""
    raise InputError(f"expected an engine out of {', '.join(BACKENDS)}; found {engine!r}{planned}")
