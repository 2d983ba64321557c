"""ONNX Runtime on the CPU and on an NVIDIA GPU.

ONNX Runtime optimises a graph when it opens it and keeps nothing that is worth storing: an optimised graph on disk
would hold its own copy of the weights for every step. So its built engine is the record of what was opened, with which
options, on which machine: enough to refuse a bundle that changed since.

A bundle opens one session per evaluation, each with its own worker threads. By default these go on spinning for a while
after a run and take the cores from the next evaluation's session; `session.force_spinning_stop` ends the spinning with the
run. On two cores that made a loop of four evaluations about twice as fast at batch 8.

Nor does each session keep an arena for its activations: a thread runs no two of them at once, so they share one, which is as
large as the largest needs, for as many threads as run at once. It is the process's and stays when sessions are closed, for
those that open next.

On a GPU inputs and outputs stay on the device (:mod:`~.ortvalues`), and nothing falls back to the CPU (:mod:`~.ortgpu`). With
``--option provider=tensorrt`` the TensorRT provider builds engines at the first run of a graph at a batch size; those that the
build met are files of the built engine. A session works on a copy of them: the provider may add to them at any run.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import nvidia, ortgpu
from mteo_deploy.engines.base import MMAP, ON_OFF, Layer, Option, Session
from mteo_deploy.engines.device import Values
from mteo_deploy.engines.live import Mapped, check_all, mapped_weights
from mteo_deploy.engines.options import of
from mteo_deploy.engines.ortvalues import BoundSession, EngineFiles, OrtDevice
from mteo_deploy.engines.turns import Turns
from mteo_deploy.errors import EngineError, InputError, MissingPackageError, MteoError
from mteo_deploy.precision import NAMES
from mteo_deploy.processors import fewer_processors
from mteo_deploy.progress import Reporter
from mteo_deploy.telemetry import off
from mteo_deploy.text import one_line

CPU = "CPUExecutionProvider"
THREADS = "ORT_INTRA_OP_NUM_THREADS"
"""A variable that ONNX Runtime reads where a session names no number of threads."""
SPINNING = {
    "off": {"session.intra_op.allow_spinning": "0"},
    "run": {"session.force_spinning_stop": "1"},
    "always": {},
}
OPTIMIZATION = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
OPTIONS = {
    "spinning": Option(
        "how long worker threads wait awake for work: never, during a run, after it too", tuple(SPINNING), "run"
    ),
    "prepacking": Option("weights laid out again for speed, in memory of their own for each graph", ON_OFF, "on"),
    "optimization": Option("how far the graph is rewritten when it is opened", tuple(OPTIMIZATION), "all"),
    "arena": Option("memory of activations: each graph's own, or one that all graphs use in turn", ("own", "shared"), "shared"),
    "mmap": MMAP,
    **ortgpu.OPTIONS,
}


def package() -> Any:
    """Import onnxruntime without its usage events, or say which extra to install."""
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
    if off("onnxruntime") and hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()  # where somebody imported it before this package could tell it
    return onnxruntime


def session_options(threads: int | None = None) -> Any:
    """ONNX Runtime's ``SessionOptions``, without its warnings.

    Args:
        threads: inside an operator; None for ONNX Runtime's choice, a thread for each core of the machine, or for as many as
            this process has processors where these are fewer: ONNX Runtime sees no affinity and no quota.
    """
    settings = package().SessionOptions()
    settings.log_severity_level = 3
    if threads is None and THREADS not in os.environ:
        threads = fewer_processors()
    if threads is not None:
        settings.intra_op_num_threads = threads
    return settings


@cache
def _share_arena(onnxruntime: Any) -> None:
    """Let sessions that ask for it use one arena of the process, as long as the process lasts."""
    kinds = onnxruntime.OrtAllocatorType, onnxruntime.OrtMemType
    info = onnxruntime.OrtMemoryInfo("Cpu", kinds[0].ORT_ARENA_ALLOCATOR, 0, kinds[1].DEFAULT)
    try:
        onnxruntime.create_and_register_allocator(info, None)
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        if "already" not in str(error):  # another part of the process has one: it is shared
            raise EngineError(f"onnxruntime could not make a shared arena: {error}; build with --option arena=own") from None


def _read_weights(settings: Any, bundle: Bundle, graph: str) -> list[NDArray[np.uint8]]:
    """Give ONNX Runtime the bytes of the files that hold a graph's weights; else it maps them.

    Returns:
        the bytes, which have to be there until the session is made; it copies what it goes on using.
    """
    if not hasattr(settings, "add_external_initializers_from_files_in_memory"):
        raise EngineError("expected an onnxruntime that takes weights from memory for --option mmap=off; upgrade onnxruntime")
    names = bundle.external.get(graph, ())
    read = [np.fromfile(bundle.file(name), np.uint8) for name in names]
    if read:
        settings.add_external_initializers_from_files_in_memory(
            [PurePosixPath(name).name for name in names], read, [content.size for content in read]
        )
    return read


class OnnxRuntimeSession:
    """One graph in an ``onnxruntime.InferenceSession``, which any number of threads may run at once.

    Args:
        mapped: the files whose bytes it goes on using.
    """

    def __init__(self, session: Any, mapped: Sequence[Mapped] = ()) -> None:
        self._session, self._mapped = session, mapped
        self._inputs = {value.name for value in session.get_inputs()}
        self._turns: Turns[Any] = Turns(lambda: session)

    def run(self, feeds: Values) -> list[Any]:
        check_all(self._mapped)
        found = self._turns.run(lambda session: self._run(session, feeds))
        check_all(self._mapped)
        return found

    def _run(self, session: Any, feeds: Values) -> list[Any]:
        try:
            outputs: list[NDArray[np.float32]] = session.run(None, dict(feeds))
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            shapes = {name: value.shape for name, value in feeds.items()}
            raise EngineError(
                f"onnxruntime could not run inputs {shapes} on a graph that takes {self._inputs}: {one_line(error)}"
            ) from None
        return outputs

    def save(self, directory: Path, graph: str) -> None:
        """Nothing: see the module."""

    def close(self) -> None:
        if self._turns.close():
            self._session = None


class OnnxRuntimeProfiledSession(OnnxRuntimeSession):
    """A session that writes its profile into a directory of its own, which goes when the profile has been read."""

    def __init__(self, session: Any, directory: tempfile.TemporaryDirectory[str]) -> None:
        super().__init__(session)
        self._directory = directory

    def layers(self) -> list[Layer]:
        profile = self._turns.run(lambda session: session.end_profiling())
        events = json.loads(Path(profile).read_text(encoding="utf-8"))
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
    engine_options = OPTIONS

    def __init__(self) -> None:
        self._shared: Callable[[], OrtDevice | None] = lambda: None

    def version(self) -> str:
        return str(package().__version__)

    def devices(self) -> list[str]:
        try:
            ortgpu.check(package())
        except MissingPackageError:
            raise
        except EngineError:
            return ["cpu"]
        return ["cuda", "cpu"]

    def runs(self, device: str) -> tuple[str, ...]:
        return (
            NAMES if device == "cuda" else tuple(name for name in NAMES if name != "bf16")
        )  # no convolutions in it on the CPU

    def machine(self, device: str, options: Mapping[str, Any]) -> str:
        return platform.machine() + (f", {nvidia.gpus()[0]}" if device == "cuda" else "")

    def open(
        self,
        bundle: Bundle,
        graph: str,
        device: str,
        options: Mapping[str, Any],
        built: Path | None = None,
        report: Reporter | None = None,
    ) -> Session:
        if device == "cuda":
            return self._open_on_gpu(bundle, graph, options, built)
        if device != "cpu":
            raise EngineError(f"expected a device out of {', '.join(self.devices())} for onnxruntime; found {device!r}")
        if gpu := [name for name in options.get("engine_options", {}) if name in ortgpu.OPTIONS]:
            raise InputError(f"expected --device cuda with --option {gpu[0]}; found --device cpu")
        mapped = mapped_weights(bundle, graph)
        session = self._session(bundle, graph, options, [CPU])
        check_all(mapped)
        return OnnxRuntimeSession(session, mapped if of(OPTIONS, options)["mmap"] == "on" else ())

    def _open_on_gpu(self, bundle: Bundle, graph: str, options: Mapping[str, Any], built: Path | None) -> Session:
        onnxruntime, own, stem = package(), of(OPTIONS, options), PurePosixPath(graph).stem
        ortgpu.check(onnxruntime)
        device, provider = self._device(onnxruntime), ortgpu.PROVIDERS[own["provider"]][0]
        files = EngineFiles(stem, built) if provider == ortgpu.TENSORRT else None

        def opened(graphs: bool) -> Session:
            settings = ortgpu.providers(own, files.directory if files else None, stem, graphs)
            session = self._session(bundle, graph, options, settings)
            ortgpu.check_placed(session, graph, provider)
            return BoundSession(session, device, graphs, files)

        if files or own["cuda_graph"] == "off":
            return opened(False)
        try:
            return opened(True)
        except EngineError as error:
            if own["cuda_graph"] == "on":
                raise
            session = opened(False)
            device.notes.append(f"{graph} not captured in a CUDA graph: {error}")
            return session

    def _device(self, onnxruntime: Any) -> OrtDevice:
        """The memory that all open sessions share; it goes with the last of them."""
        device = self._shared()
        if device is None:
            device = OrtDevice(onnxruntime, "cuda")
            self._shared = weakref.ref(device)
        return device

    def profile(
        self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], batch: int, built: Path | None = None
    ) -> OnnxRuntimeProfiledSession:
        if device != "cpu":
            raise EngineError(
                "onnxruntime tells the times of its layers on cpu only; on a GPU use: nsys profile mteo-deploy sample"
            )
        directory = tempfile.TemporaryDirectory(prefix="mteo-deploy-profile-")
        try:
            session = self._session(bundle, graph, options, [CPU], profile=str(Path(directory.name, "profile")))
        except EngineError:
            directory.cleanup()
            raise
        return OnnxRuntimeProfiledSession(session, directory)

    @staticmethod
    def _session(
        bundle: Bundle, graph: str, options: Mapping[str, Any], providers: Sequence[Any], profile: str | None = None
    ) -> Any:
        onnxruntime, own = package(), of(OPTIONS, options)
        settings = session_options(options.get("threads"))
        settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, OPTIMIZATION[own["optimization"]])
        if profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = profile
        settings.add_session_config_entry("session.disable_prepacking", str(int(own["prepacking"] == "off")))
        for key, value in SPINNING[own["spinning"]].items():
            settings.add_session_config_entry(key, value)
        if providers != [CPU]:
            settings.add_session_config_entry(ortgpu.RECORD, "1")
        elif own["arena"] == "shared":
            _share_arena(onnxruntime)
            settings.add_session_config_entry("session.use_env_allocators", "1")
        try:
            # enable_fallback: or a provider that cannot be made is left out, and a session on the CPU is what one gets
            read = _read_weights(settings, bundle, graph) if own["mmap"] == "off" else []
            with bundle.opened(graph) as path:
                session = onnxruntime.InferenceSession(path, settings, providers=providers, enable_fallback=0)
            del read
            return session
        except MteoError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise EngineError(
                f"onnxruntime could not open {graph}: {one_line(error)}; export again or report the graph"
            ) from None


BACKEND = OnnxRuntimeBackend()
