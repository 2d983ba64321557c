"""OpenVINO: compiled graphs on the CPU, in fp32 or bf16.

A compiled graph is a file of the built engine, mapped: opening it takes a fraction of the time that compiling takes. Not so for
a large network, whose weights it would hold a second time: above :data:`KEPT` bytes of graphs none is kept. The CPU plugin
plans memory, layouts and fusions better when it knows every shape, so each batch size is compiled for itself: those of
``batch``, or, without, each as it comes, a few at most.

OpenVINO computes in bf16 by its own choice where the processor can. Precision is never left to it here.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.base import MMAP, ON_OFF, Layer, Option, Session
from mteo_deploy.engines.batches import SHARED, BatchSizes, SizesAsTheyCome
from mteo_deploy.engines.device import Values
from mteo_deploy.engines.live import Mapped, check_all, mapped_stored, mapped_weights, stored
from mteo_deploy.engines.options import of
from mteo_deploy.engines.turns import Turns
from mteo_deploy.errors import EngineError, MissingPackageError, MteoError
from mteo_deploy.precision import NAMES
from mteo_deploy.processors import fewer_processors
from mteo_deploy.progress import Reporter
from mteo_deploy.telemetry import LEAVE, openvino_sends_nothing
from mteo_deploy.text import one_line

DEVICES = {"cpu": "CPU"}
PRECISION_HINT = {"fp32": "f32", "bf16": "bf16"}
OPTIONS = {
    "hint": Option("what threads and streams are chosen for: one run, or many at once", ("latency", "throughput"), "latency"),
    "streams": Option("runs at once that the processors are divided among", range(1, 1025)),
    "pinning": Option("worker threads bound to processors", ON_OFF),
    "hyper_threading": Option("both threads of a core are used", ON_OFF),
    "mmap": MMAP,
}
PROPERTIES = {"streams": "NUM_STREAMS", "pinning": "ENABLE_CPU_PINNING", "hyper_threading": "ENABLE_HYPER_THREADING"}
KEPT = 1 << 30
"""Bytes of a bundle's graphs up to which compiled ones are kept: one of 3.2 GB takes as long to read as to compile."""
SWITCH = {"on": "YES", "off": "NO"}


def _package() -> Any:
    """Import openvino, or say which extra to install."""
    try:
        with openvino_sends_nothing():
            import openvino
    except ImportError as error:  # not ModuleNotFoundError: the package may be there without its libraries
        raise MissingPackageError(
            f"the engine openvino is not installed ({error}); run: pip install 'mteo-deploy[openvino]'"
        ) from None
    except Exception as error:
        raise EngineError(
            f"expected openvino to be imported; found {type(error).__name__}: {error}; set HOME, or unset {LEAVE}"
        ) from None
    return openvino


def _core() -> Any:
    """OpenVINO's entry object."""
    return _package().Core()


class OpenVinoSession:
    """One compiled graph, with a request for each thread that runs it, whose buffers are made once.

    There are as many requests as the graph has streams (the option ``streams``): one thread more would wait for a stream,
    and each request holds the memory of its activations.

    Args:
        size: images that it was made for; None for any number.
        kept: whether :meth:`save` writes it.
        read: the file that it was read from, whose weights it goes on using; None where it was compiled.
        mapped: the files whose bytes it goes on using.
    """

    def __init__(
        self,
        compiled: Any,
        size: int | None,
        kept: bool = True,
        read: NDArray[np.uint8] | None = None,
        mapped: Sequence[Mapped] = (),
    ) -> None:
        self._compiled, self._size, self._kept = compiled, size, kept
        self._inputs = [set(value.names) for value in compiled.inputs]  # several of one that a removed node passed on as it was
        self._outputs = list(compiled.outputs)
        most = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._requests = Turns(compiled.create_infer_request, most)
        self._mapped = mapped
        self._read = read  # goes after what looks into it, also where nobody closes the session

    def run(self, feeds: Values) -> list[Any]:
        check_all(self._mapped)
        found = self._requests.run(lambda request: self._infer(request, feeds))
        check_all(self._mapped)
        return found

    def _infer(self, request: Any, feeds: Values) -> list[Any]:
        missing = [names for names in self._inputs if not names & feeds.keys()]  # it would keep what the last run was given
        if missing or len(feeds) != len(self._inputs):
            raise EngineError(f"expected the inputs {[' or '.join(sorted(n)) for n in self._inputs]}; found {sorted(feeds)}")
        try:
            # inputs are read where they lie; outputs are copied, or the next run would write into its own input
            found = request.infer(dict(feeds), share_inputs=True)
        except Exception as error:  # RuntimeError as a rule; TypeError for an array of no type that it knows
            shapes = {name: value.shape for name, value in feeds.items()}
            raise EngineError(f"openvino could not run inputs {shapes}: {one_line(error)}") from None
        return [found[output] for output in self._outputs]

    def save(self, directory: Path, graph: str) -> None:
        if self._kept:
            model = self._requests.run(lambda _: self._compiled.export_model())
            (directory / _file(graph, self._size)).write_bytes(model.getbuffer())

    def close(self) -> None:
        if self._requests.close():
            self._outputs, self._compiled = [], None
            self._read = None


class OpenVinoProfiledSession(OpenVinoSession):
    """A session that asks for the times of its layers after every run."""

    def __init__(self, compiled: Any, size: int | None) -> None:
        super().__init__(compiled, size)
        self._found: dict[str, Layer] = {}

    def _infer(self, request: Any, feeds: Values) -> list[Any]:
        outputs = super()._infer(request, feeds)
        for entry in request.get_profiling_info():
            layer = self._found.setdefault(entry.node_name, Layer(entry.node_name, entry.node_type))
            layer.times.append(entry.real_time.total_seconds() * 1e3)
        return outputs

    def layers(self) -> list[Layer]:
        # what was fused into another layer is listed too, with no time; so is what took less than a microsecond this time
        return [layer for layer in self._found.values() if any(layer.times)]


def _file(graph: str, size: int | None) -> str:
    return f"{PurePosixPath(graph).stem}{'' if size is None else f'-{size}'}.blob"


def _is_open(bundle: Bundle) -> bool:
    """Whether a bundle's graphs take any number of images; those of no bundle, without a manifest, do."""
    return bundle.manifest.get("batch", "dynamic") == "dynamic"


class OpenVinoBackend:
    name = "openvino"
    extra = "openvino"
    precisions = ("fp32", "bf16")
    engine_options = OPTIONS

    def version(self) -> str:
        _core()
        return metadata.version("openvino")

    def devices(self) -> list[str]:
        available = _core().available_devices
        return [device for device, name in DEVICES.items() if name in available]

    def runs(self, device: str) -> tuple[str, ...]:
        return NAMES

    def machine(self, device: str, options: Mapping[str, Any]) -> str:
        core, name = _core(), DEVICES.get(device, "CPU")
        can = "+".join(sorted(core.get_property(name, "OPTIMIZATION_CAPABILITIES")))
        return f"{platform.machine()}, {core.get_property(name, 'FULL_DEVICE_NAME').strip()}, {can}"

    def open(
        self,
        bundle: Bundle,
        graph: str,
        device: str,
        options: Mapping[str, Any],
        built: Path | None = None,
        report: Reporter | None = None,
    ) -> Session:
        core, config = self._config(device, options)
        files = bundle.manifest.get("files", {}).items()
        kept = sum(entry["bytes"] for name, entry in files if name.startswith("graphs/")) <= KEPT

        def session(size: int | None) -> OpenVinoSession:
            compiled, read, mapped = self._compiled(core, bundle, graph, DEVICES[device], config, size, built)
            return OpenVinoSession(compiled, size, kept, read, mapped)

        sizes = options.get("batch")
        if sizes:
            return BatchSizes({size: session(size) for size in sizes})
        return SizesAsTheyCome(session) if _is_open(bundle) else session(None)

    def profile(
        self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], batch: int, built: Path | None = None
    ) -> OpenVinoProfiledSession:
        core, config = self._config(device, options)
        sizes = options.get("batch")
        if sizes and batch not in sizes:
            raise EngineError(f"expected --batch out of the sizes openvino was built for, {sizes}; found {batch}")
        size = batch if _is_open(bundle) else None
        compiled, *_ = self._compiled(core, bundle, graph, DEVICES[device], {**config, "PERF_COUNT": "YES"}, size, None)
        return OpenVinoProfiledSession(compiled, size)

    def _config(self, device: str, options: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
        core = _core()
        core.set_property({"ENABLE_MMAP": of(OPTIONS, options)["mmap"] == "on"})
        if device not in DEVICES or DEVICES[device] not in core.available_devices:
            raise EngineError(f"expected a device out of {', '.join(self.devices())} for openvino; found {device!r}")
        own = of(OPTIONS, options)
        config = {
            "PERFORMANCE_HINT": own["hint"].upper(),
            "INFERENCE_PRECISION_HINT": PRECISION_HINT[options.get("precision", "fp32")],
        }
        if threads := options.get("threads") or fewer_processors():
            config["INFERENCE_NUM_THREADS"] = str(threads)
        given = {name: property for name, property in PROPERTIES.items() if own[name] is not None}
        config |= {property: SWITCH.get(own[name], str(own[name])) for name, property in given.items()}
        return core, config

    @staticmethod
    def _compiled(
        core: Any, bundle: Bundle, graph: str, device: str, config: dict[str, str], size: int | None, built: Path | None
    ) -> tuple[Any, NDArray[np.uint8] | None, list[Mapped]]:
        """A graph compiled, or read, with the array that has to outlive it then, and the files that are mapped."""
        path, mmap = stored(built, _file(graph, size)), bool(core.get_property("ENABLE_MMAP"))
        try:
            mapped = mapped_weights(bundle, graph) if path is None else mapped_stored(built, _file(graph, size))
            if path is not None:
                from openvino import Tensor

                read = np.memmap(path, np.uint8, "c") if mmap else np.fromfile(path, np.uint8)
                compiled = core.import_model(Tensor(read, shared_memory=True), device, config)
                check_all(mapped)
                return compiled, read, mapped if mmap else []
            with bundle.opened(graph) as source:
                model = core.read_model(source)
                if size is not None:
                    of_images = [value for value in model.inputs if not {*SHARED} & set(value.names)]
                    model.reshape({value.any_name: [size, *list(value.partial_shape)[1:]] for value in of_images})
                compiled = core.compile_model(model, device, config)
            check_all(mapped)
            return compiled, None, mapped if mmap else []
        except MteoError:
            raise
        except Exception as error:  # RuntimeError as a rule
            where = f"{path}; build again" if path is not None else f"{graph}; export again or report it"
            raise EngineError(f"openvino could not open {where} ({one_line(error)})") from None


BACKEND = OpenVinoBackend()
