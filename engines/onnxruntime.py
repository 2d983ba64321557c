"""ONNX Runtime on the CPU.

ONNX Runtime optimises a graph when it opens it and keeps nothing that is worth storing: an optimised graph on disk
would hold its own copy of the weights for every step. So its built engine is the record of what was opened, with which
options, on which machine: enough to refuse a bundle that changed since.

A bundle opens one session per evaluation, each with its own worker threads. By default these go on spinning for a while
after a run and take the cores from the next evaluation's session; `session.force_spinning_stop` ends the spinning with the
run. On two cores that made a loop of four evaluations about twice as fast at batch 8.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.base import Layer
from mteo_deploy.errors import EngineError, MissingPackageError

PROVIDERS = {"cpu": "CPUExecutionProvider"}


def _package() -> Any:
    """Import onnxruntime, or say which extra to install."""
    installed = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            installed.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if len(installed) > 1:
        raise EngineError(
            f"expected one of onnxruntime and onnxruntime-gpu; found both ({', '.join(installed)}), which overwrite each "
            "other's files; run: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'mteo-deploy[cpu]' (or [gpu])"
        )
    try:
        import onnxruntime
    except ImportError:
        raise MissingPackageError("the engine onnxruntime is not installed; run: pip install 'mteo-deploy[cpu]'") from None
    return onnxruntime


class OnnxRuntimeSession:
    """One graph in an ``onnxruntime.InferenceSession``."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = {value.name for value in session.get_inputs()}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        try:
            outputs: list[NDArray[np.float32]] = self._session.run(None, dict(feeds))
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            shapes = {name: value.shape for name, value in feeds.items()}
            raise EngineError(
                f"onnxruntime could not run inputs {shapes} on a graph that takes {self._inputs}: {error}"
            ) from None
        return outputs

    def save(self, directory: Path, graph: str) -> None:
        """Nothing: see the module."""


class OnnxRuntimeProfiledSession(OnnxRuntimeSession):
    """A session that writes its profile into a directory of its own, which goes when the profile has been read."""

    def __init__(self, session: Any, directory: tempfile.TemporaryDirectory[str]) -> None:
        super().__init__(session)
        self._directory = directory

    def layers(self) -> list[Layer]:
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        self._directory.cleanup()
        found: dict[str, Layer] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = event["name"].removesuffix("_kernel_time")
                found.setdefault(name, Layer(name, event["args"]["op_name"])).times.append(event["dur"] / 1e3)
        return list(found.values())


class OnnxRuntimeBackend:
    name = "onnxruntime"
    extra = "cpu"
    precisions = ("fp32",)

    def version(self) -> str:
        return str(_package().__version__)

    def devices(self) -> list[str]:
        available = _package().get_available_providers()
        return [device for device, provider in PROVIDERS.items() if provider in available]

    def machine(self, device: str) -> str:
        return platform.machine()

    def open(
        self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], built: Path | None = None
    ) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(self._session(bundle, graph, device, options))

    def profile(
        self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], batch: int
    ) -> OnnxRuntimeProfiledSession:
        directory = tempfile.TemporaryDirectory(prefix="mteo-deploy-profile-")
        try:
            session = self._session(bundle, graph, device, options, profile=str(Path(directory.name, "profile")))
        except EngineError:
            directory.cleanup()
            raise
        return OnnxRuntimeProfiledSession(session, directory)

    @staticmethod
    def _session(bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], profile: str | None = None) -> Any:
        onnxruntime = _package()
        if device not in PROVIDERS:
            raise EngineError(f"expected a device out of {', '.join(PROVIDERS)} for onnxruntime; found {device!r}")
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        level = options.get("graph_optimization", "ORT_ENABLE_ALL")
        settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        if profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = profile
        if options.get("threads"):
            settings.intra_op_num_threads = int(options["threads"])
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        for key, value in options.get("session_config", {}).items():
            settings.add_session_config_entry(key, value)
        try:
            session = onnxruntime.InferenceSession(bundle.file(graph), settings, providers=[PROVIDERS[device]])
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise EngineError(f"onnxruntime could not open {graph}: {error}; export again or report the graph") from None
        if session.get_providers()[0] != PROVIDERS[device]:
            raise EngineError(f"expected {graph} on {device}; onnxruntime put it on {session.get_providers()[0]}")
        return session


BACKEND = OnnxRuntimeBackend()
