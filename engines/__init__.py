"""Engines: what runs a bundle's graphs. One file per backend, loaded only when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mteo_deploy import telemetry
from mteo_deploy.engines.base import Backend
from mteo_deploy.errors import EngineError, InputError, MissingPackageError, MteoError

AUTO = "auto"
BACKENDS = {
    "onnxruntime": "mteo_deploy.engines.onnxruntime",
    "openvino": "mteo_deploy.engines.openvino",
    "tensorrt": "mteo_deploy.engines.tensorrt",
}


def backend(engine: str) -> Backend:
    """The backend of that name.

    Raises:
        InputError: for a name without a backend.
    """
    if engine in BACKENDS:
        loaded: Backend = import_module(BACKENDS[engine]).BACKEND
        return loaded
    raise InputError(f"expected an engine out of {', '.join([*BACKENDS, AUTO])}; found {engine!r}")


def installed() -> list[Backend]:
    """Every backend whose package is there.

    Raises:
        MissingPackageError: when there is none.
        EngineError: when one is there and cannot work.
    """
    found = []
    for one in map(backend, BACKENDS):
        try:
            one.version()
        except MissingPackageError:
            continue
        found.append(one)
    if not found:
        extras = " or ".join(f"'mteo-deploy[{one.extra}]'" for one in map(backend, BACKENDS))
        raise MissingPackageError(f"no engine is installed; run: pip install {extras}; mteo-deploy doctor says more")
    return found


def best_device(target: Backend) -> str:
    """The fastest device that an engine can use here.

    Raises:
        MissingPackageError: when its package is not installed.
        EngineError: when there is none.
    """
    target.version()  # a missing package is said before a missing device
    devices = target.devices()
    if not devices:
        raise EngineError(f"expected a device that {target.name} can use; found none here; mteo-deploy doctor says more")
    return devices[0]


def doctor() -> list[dict[str, Any]]:
    """Each engine: version, devices, precisions it computes in, by device those of ``graphs`` that it runs, and options; or
    what is wrong and the way out."""
    from mteo_deploy.engines import options

    found: list[dict[str, Any]] = []
    for one in map(backend, BACKENDS):
        entry: dict[str, Any] = {"engine": one.name, "options": options.described(one)}
        if (off := telemetry.off(one.name)) is not None:
            entry["usage_events"] = "off" if off else "left to the engine"
        try:
            entry |= {"version": one.version(), "devices": one.devices(), "precisions": list(one.precisions)}
            if not one.devices():
                entry["problem"] = "no device that it can use"
            entry["graphs"] = {device: list(one.runs(device)) for device in one.devices()}
            entry["machine"] = {device: one.machine(device, {}) for device in one.devices()}
        except MteoError as error:
            entry["problem"] = str(error)
        found.append(entry)
    return found
