"""TensorRT's builder: from a graph of a bundle to a plan, with the options of a build, its progress and its timing cache.

Building takes minutes. TensorRT works in a thread of its own while the caller's waits, so that Ctrl-C is heard at once;
the builder then stops at its next step.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mteo_deploy.engines.base import ON_OFF, Option
from mteo_deploy.engines.options import of
from mteo_deploy.errors import EngineError, MissingPackageError
from mteo_deploy.files import write_atomic
from mteo_deploy.progress import Reporter, Silent

if TYPE_CHECKING:
    import tensorrt

DEFAULT_BATCH = (1, 16)
ROWS = (1, 4, 64)
"""Least, usual and greatest number of evaluations of a table."""

MIB = 1 << 20
NO_LEAN_REFIT = "what opens in later versions cannot be given weights"
NOT_TOGETHER = "weights are either put back into the device or streamed to it"

OPTIONS = {
    "optimization_level": Option("how long the builder searches, from the first kernel that works to all of them", range(6), 3),
    "tiling_optimization_level": Option(
        "how long it searches for tiles that stay in the cache", ("none", "fast", "moderate", "full"), "none"
    ),
    "workspace": Option("scratch memory that a kernel may use, in MiB", range(1, MIB)),
    "hardware_compatibility": Option(
        "GPUs that may run it: this model's; this compute capability's; those since Ampere",
        ("none", "same_compute_capability", "ampere_plus"),
        "none",
    ),
    "version_compatible": Option(
        "plans that later versions of TensorRT open too, given this version's lean runtime",
        ON_OFF,
        "off",
        excludes={"refit": NO_LEAN_REFIT, "strip": NO_LEAN_REFIT},
    ),
    "refit": Option("plans whose weights other programs may replace", ON_OFF, "off"),
    "strip": Option("plans without weights, which come from the bundle whenever one is opened", ON_OFF, "off"),
    "weight_streaming": Option(
        "weights stay in the host's memory and come to the device when needed",
        ON_OFF,
        "off",
        excludes={"refit": NOT_TOGETHER, "strip": NOT_TOGETHER},
    ),
    "weight_streaming_budget": Option("weights that stay in the device's memory, in MiB", range(MIB), needs="weight_streaming"),
    "timing_cache": Option("measured times of kernels, read and written again by every build", Path, keyed=False),
}
FLAGS = {
    "version_compatible": ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"),  # a plan brings no code of its own to be run
    "refit": ("REFIT",),
    "strip": ("STRIP_PLAN",),
    "weight_streaming": ("WEIGHT_STREAMING",),
}


class Shared(Protocol):
    """What the builder takes from the sessions' device: the logger, and the times of kernels measured so far."""

    logger: tensorrt.Logger
    timing: bytes


def package() -> Any:
    """Import tensorrt, or say which extra to install."""
    try:
        import tensorrt
    except ImportError as error:  # not ModuleNotFoundError: the package may be there without its libraries
        raise MissingPackageError(
            f"the engine tensorrt is not installed ({error}); run: pip install 'mteo-deploy[tensorrt]'"
        ) from None
    return tensorrt


def build_plan(device: Shared, path: Path, graph: str, options: Mapping[str, Any], report: Reporter | None) -> bytes:
    """Parse one graph and build its plan.

    Raises:
        EngineError: when TensorRT takes the graph, an option or the timing cache not.
        KeyboardInterrupt: when it is cancelled, after TensorRT has stopped.
    """
    package()
    import tensorrt as trt

    builder = trt.Builder(device.logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, device.logger)
    if not parser.parse_from_file(str(path)):
        raise EngineError(f"tensorrt could not parse {graph}: {errors_of(parser)}; export again or report it")
    own, config = of(OPTIONS, options), builder.create_builder_config()
    _configure(config, own)
    config.add_optimization_profile(_batches(builder, network, options.get("batch") or DEFAULT_BATCH))
    file = None if own["timing_cache"] is None else Path(own["timing_cache"])
    timing = _set_timing(config, file.read_bytes() if file and file.is_file() else device.timing, file)
    monitor = progress_monitor(report or Silent(), Path(graph).stem)
    config.progress_monitor = monitor
    with ThreadPoolExecutor(1) as thread:
        try:
            plan = thread.submit(builder.build_serialized_network, network, config).result()
        except KeyboardInterrupt:
            monitor.cancelled = True  # and the thread is waited for on the way out
            raise
    if plan is None:
        raise EngineError(f"tensorrt could not build {graph}: no implementation was found, or the memory was not enough")
    device.timing = bytes(timing.serialize())
    if file:
        write_atomic(file, device.timing)
    return bytes(plan)


def errors_of(parser: tensorrt.OnnxParser | tensorrt.OnnxParserRefitter) -> str:
    """What a parser has to say about the nodes that it did not take."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)


def _configure(config: tensorrt.IBuilderConfig, own: Mapping[str, Any]) -> None:
    import tensorrt as trt

    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = own["optimization_level"]
    config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, own["tiling_optimization_level"].upper())
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, own["hardware_compatibility"].upper())
    if own["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, own["workspace"] * MIB)
    for name, flags in FLAGS.items():
        for flag in flags if own[name] == "on" else ():
            config.set_flag(getattr(trt.BuilderFlag, flag))


def _batches(
    builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, sizes: Sequence[int]
) -> tensorrt.IOptimizationProfile:
    """One profile over the batch sizes, made for the first of them above all."""
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            raise EngineError(
                "expected graphs of one height and width for tensorrt; export again with --dynamic batch, without --tile"
            )
        if -1 in shape:
            counts = ROWS if tensor.name == "table" else (min(sizes), sizes[0], max(sizes))
            least, usual, most = (tuple(count if size == -1 else size for size in shape) for count in counts)
            profile.set_shape(tensor.name, least, usual, most)
    return profile


def _set_timing(config: tensorrt.IBuilderConfig, stored: bytes, file: Path | None) -> tensorrt.ITimingCache:
    """Give the builder the times of an earlier build; the step graphs of a plan are the same layers. New ones where it
    does not take them."""
    timing = config.create_timing_cache(stored)
    if timing is not None and config.set_timing_cache(timing, False):
        return timing
    if not stored:
        raise EngineError("tensorrt did not take an empty timing cache of its own; report it")
    where = f"the timing cache {file}" if file else "the times of the last build"
    warnings.warn(f"{where} was damaged, or made by another TensorRT or on another GPU; it is started anew", stacklevel=3)
    return _set_timing(config, b"", file)


def progress_monitor(report: Reporter, graph: str) -> Any:
    """TensorRT's phases as bars: one for each outermost phase, the innermost one written beside it."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        cancelled = False

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()  # TensorRT calls from threads of its own
            self.bars: dict[str, int] = {}
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                if parent_phase in self.bars:
                    self.bars[phase_name] = self.bars[parent_phase]
                    report.advance(self.bars[phase_name], 0, phase_name)
                else:
                    self.bars[phase_name] = report.task(f"{graph}: {phase_name}", num_steps)
                    self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                if phase_name in self.steps:
                    self.steps[phase_name] -= 1
                    report.advance(self.bars[phase_name], 1)
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                report.advance(self.bars.pop(phase_name), self.steps.pop(phase_name, 0))

    return Monitor()
