"""A built bundle against what one would run instead, interleaved: torch, torch.compile, AOTInductor, and a plain export in
each engine, on the CPU or on a GPU.

The plain exports are the backbone traced with its timestep as an input, without our compiler, and sampled with a scheduler
loop in numpy (the plan's own coefficients, so that all sides do the same evaluations). All sides sample the same number of
evaluations from the same noise; what is timed is one batch from noise to images, both in the host's memory. Memory is what the
process (cpu) or the device (cuda) has more after a way was made and run than before. Prints a table, then one JSON line.

    python benchmarks/engines.py --steps 4 --batch 1 8 --seconds 20
    python benchmarks/engines.py --random-dit --steps 4 --work runs/dit
    python benchmarks/engines.py --device cuda --random-dit --aot --output gpu.json     (not run yet: no GPU)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_dit import random_dit
from rich.console import Console
from rich.table import Table

from mteo_deploy import assets, build, export
from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import backend, cache
from mteo_deploy.errors import MissingPackageError
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.trace import OPSET
from mteo_deploy.latency import bootstrap_median
from mteo_deploy.plan import run
from mteo_deploy.sampler import Sampler, noise_for

Images = Callable[[], np.ndarray]
Call = Callable[[dict[str, np.ndarray]], np.ndarray]


class Network(torch.nn.Module):
    """The unmodified network with the arguments of a plain export: state, timestep and, if there are any, labels."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.network, self.channels = type(adapter.network).from_config(adapter.config), adapter.sample_shape[0]
        self.network.load_state_dict(adapter.network.state_dict())
        self.eval()

    def forward(self, state: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        given = {} if labels is None else {"class_labels": labels}
        return self.network(state, timestep=timestep, **given, return_dict=False)[0][:, : self.channels]


def plain_export(network: Network, args: tuple[torch.Tensor, ...], path: Path) -> Path:
    """The network as `torch.onnx.export` leaves it, batch dynamic."""
    names = ["state", "timestep", "labels"][: len(args)]
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch}, None if args[1].ndim == 0 else {0: batch}, {0: batch})[: len(args)]
    torch.onnx.export(
        network, args, path, dynamo=True, opset_version=OPSET, input_names=names, dynamic_shapes=shapes, verbose=False
    )
    return path


def ort_call(path: Path, threads: int | None, device: str) -> Call:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.intra_op_num_threads = threads or 0
    providers = {"cpu": ["CPUExecutionProvider"], "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"})]}[device]
    if device == "cuda":
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(path, settings, providers=providers, enable_fallback=0)
    return lambda feeds: session.run(None, feeds)[0]


def openvino_call(path: Path, threads: int | None, hint: str) -> Call:
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
    config |= {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    return lambda feeds: request.infer(feeds, share_inputs=True)[0]


def ahead_of_time(network: torch.nn.Module, args: tuple[torch.Tensor, ...], path: Path) -> Callable[..., torch.Tensor]:
    """The network compiled by AOTInductor for the shapes of ``args``."""
    with torch.no_grad():
        exported = torch.export.export(network, args)
    return torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(exported, package_path=str(path)))


def memory_in_use(device: str) -> int:
    """Bytes of the device that are taken, or of the host that this process has."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total - free
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Contest:
    """Ways to sample the same images."""

    def __init__(self, bundle: Bundle, adapter: Adapter, plain: Path, batch: int, device: str) -> None:
        self.bundle, self.batch, self.device = bundle, batch, device
        self.noise = noise_for(bundle.sample_shape, 0, range(batch))
        self.requests = bundle.reference_requests(batch)
        self.adapter, self.plain = adapter, plain
        self.ways: dict[str, Images] = {}
        self.memory: dict[str, int] = {}

    def add(self, name: str, make: Callable[[], Images]) -> None:
        before = memory_in_use(self.device)
        self.ways[name] = make()
        for _ in range(3):  # captured graphs are ready after the second run
            self.ways[name]()
        self.memory[name] = memory_in_use(self.device) - before

    def ours(self) -> None:
        for path in cache.records(self.bundle)[::-1]:
            built = cache.check(self.bundle, path)
            if built.device == self.device and self.batch in built.options.get("batch", [self.batch]):
                own = "".join(f", {name}={value}" for name, value in built.options.get("engine_options", {}).items())
                words = f"{built.options['precision']}, {built.record['realisation']}{own}"
                self.add(f"ours: {built.backend.name} {words}", partial(self._ours, built))

    def _ours(self, built: cache.Built) -> Images:
        def opener(graph: str) -> Any:
            return built.backend.open(self.bundle, graph, built.device, built.options, built.directory)

        sampler = Sampler(self.bundle, opener, built.record["realisation"], built=built)
        return lambda: sampler.image(self.noise, self.requests)

    def torch(self, name: str, make: Callable[[], Callable[..., torch.Tensor]], dtype: torch.dtype | None = None) -> None:
        """Args: dtype: of autocast; None for float32 throughout."""
        plan, (_, _, *labels) = self.bundle.plan, self.arguments(0)
        timesteps = [self.timestep(i).to(self.device) for i in range(len(plan.evaluations))]

        def images_of(network: Callable[..., torch.Tensor]) -> np.ndarray:
            def evaluate(i: int, state: torch.Tensor) -> torch.Tensor:
                # a copy: torch.compile with CUDA graphs writes its next output over this one
                return network(state, timesteps[i], *labels).to(torch.float32, copy=True)

            with torch.inference_mode(), torch.autocast(self.device, dtype or torch.bfloat16, enabled=dtype is not None):
                return run(plan, torch.from_numpy(self.noise).to(self.device), evaluate)[-1].cpu().numpy()

        self.add(name, lambda: partial(images_of, make()))

    def arguments(self, i: int) -> tuple[torch.Tensor, ...]:
        """What the network takes at evaluation ``i``: state, timestep and, if there are any, labels."""
        arrays = [self.noise, *self.requests.values()]
        state, *labels = (torch.from_numpy(array).to(self.device) for array in arrays)
        return state, self.timestep(i).to(self.device), *labels

    def timestep(self, i: int) -> torch.Tensor:
        """As the network takes it: a DiT wants one per image."""
        value = torch.tensor(self.bundle.plan.evaluations[i].timestep, dtype=torch.float32)
        return value.expand(self.batch).clone() if self.requests else value

    def engine(self, name: str, make: Callable[[], Call]) -> None:
        plan, labels = self.bundle.plan, list(self.requests.values())
        timesteps = [self.timestep(i).numpy() for i in range(len(plan.evaluations))]

        def images_of(call: Call) -> np.ndarray:
            def evaluate(i: int, state: np.ndarray) -> np.ndarray:
                feeds = {"state": state, "timestep": timesteps[i]}
                return call({**feeds, "labels": labels[0]} if labels else feeds)

            return run(plan, self.noise, evaluate)[-1]

        self.add(name, lambda: partial(images_of, make()))

    def measure(self, seconds: float) -> dict[str, dict[str, float]]:
        """Rounds through all ways in random order: medians, and each way's time over our best one's with its interval."""
        names, order = list(self.ways), np.random.default_rng(0)
        times: list[list[float]] = []
        end = time.perf_counter() + seconds
        while len(times) < 15 or time.perf_counter() < end:
            row = [0.0] * len(names)
            for which in order.permutation(len(names)):
                start = time.perf_counter()
                self.ways[names[which]]()
                row[which] = time.perf_counter() - start
            times.append(row)
        table = np.asarray(times) * 1e3
        medians = np.median(table, axis=0)
        best = min((i for i, name in enumerate(names) if name.startswith("ours")), key=lambda i: medians[i])
        found = {}
        for i, name in enumerate(names):
            ratio, low, high = bootstrap_median(table[:, i] / table[:, best])
            p99 = float(np.percentile(table[:, i], 99))
            found[name] = {
                "p50": float(medians[i]),
                "p99": p99,
                "memory": self.memory[name],
                "ratio": ratio,
                "low": low,
                "high": high,
                "rounds": len(times),
            }
        return found

    def errors(self, reference: str) -> dict[str, float]:
        """Relative RMS difference of each way's images from those of the reference."""
        expected = self.ways[reference]()
        return {n: float(np.sqrt(((w() - expected) ** 2).mean() / (expected**2).mean())) for n, w in self.ways.items()}


def build_all(bundle: Bundle, device: str, batch: int, threads: int | None) -> None:
    """Every engine that is installed, with the settings worth telling apart."""
    ways: dict[str, list[tuple[str, str, dict[str, object]]]] = {
        "cpu": [("onnxruntime", "fp32", {}), ("openvino", "fp32", {}), ("openvino", "bf16", {})],
        "cuda": [("onnxruntime", "fp32", {"cuda_graph": on}) for on in ("off", "on")] + [("tensorrt", "fp32", {})],
    }
    for engine, precision, options in ways[device]:
        try:
            if precision == "fp32" or "BF16" in backend(engine).machine(device, {}):
                sizes = {"batch": [batch], "threads": threads, "engine_options": options}
                build(bundle, engine=engine, device=device, precision=precision, quiet=True, **sizes)  # type: ignore[arg-type]
        except MissingPackageError as error:
            print(f"left out: {error}")


def enter(contest: Contest, network: torch.nn.Module, args: argparse.Namespace, work: Path) -> None:
    """What is not ours."""
    mode = {"cpu": None, "cuda": "max-autotune"}[args.device]  # which brings CUDA graphs
    types = {"bf16": torch.bfloat16} | ({"fp16": torch.float16} if args.device == "cuda" else {})
    for word, dtype in {"fp32": None, **types}.items():
        contest.torch(f"torch {word}", lambda: network, dtype)
        if not args.no_compile:
            contest.torch(f"torch.compile {word}", lambda: torch.compile(network, mode=mode), dtype)
    if args.aot:
        package = work / f"aot-{contest.batch}.pt2"
        contest.torch("AOTInductor fp32", lambda: ahead_of_time(network, contest.arguments(0), package))
    contest.engine("plain onnxruntime fp32", lambda: ort_call(contest.plain, args.threads, args.device))
    if args.device == "cpu":
        contest.engine("plain openvino fp32", lambda: openvino_call(contest.plain, args.threads, "f32"))
        contest.engine("plain openvino bf16", lambda: openvino_call(contest.plain, args.threads, "bf16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=assets.MODEL)
    parser.add_argument("--random-dit", action="store_true", help="a DiT-S with random weights instead of --model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="per batch size")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--aot", action="store_true", help="with AOTInductor")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--work", type=Path, help="new directory to leave the model, the plain export and the bundle in")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, on all sides
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        model = random_dit(work / "dit") if args.random_dit else args.model
        bundle = export(work / "bundle", model=model, steps=args.steps, plain=True, quiet=True)
        adapter = load_backbone(model)
        network = Network(adapter)
        for batch in args.batch:
            build_all(bundle, args.device, batch, args.threads)
            contest = Contest(bundle, adapter, work / "plain.onnx", batch, args.device)
            if not contest.plain.exists():
                labels = [torch.from_numpy(v) for v in bundle.reference_requests(2).values()]
                timestep = torch.full((2,), 500.0) if labels else torch.tensor(500.0)
                plain_export(network.cpu(), (torch.zeros(2, *bundle.sample_shape), timestep, *labels), contest.plain)
            enter(contest, network.to(args.device), args, work)
            contest.ours()
            errors = contest.errors("torch fp32")
            found = {name: {**row, "error": errors[name]} for name, row in contest.measure(args.seconds).items()}
            results.append({"batch": batch, "ways": found})
    table = Table(
        "batch", "way", "p50 ms", "p99 ms", "MB", "time / our best", "95 % interval", "images differ by", title_justify="left"
    )
    for result in results:
        for name, row in sorted(result["ways"].items(), key=lambda item: item[1]["p50"]):
            ratio, interval = f"{row['ratio']:.2f}", f"[{row['low']:.2f}, {row['high']:.2f}]"
            figures = [f"{row['p50']:.2f}", f"{row['p99']:.2f}", f"{row['memory'] / 1e6:.0f}"]
            table.add_row(str(result["batch"]), name, *figures, ratio, interval, f"{row['error']:.1e}")
    Console(width=120).print(table)
    packages = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13", "numpy")
    here = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    versions = {name: here[name] for name in packages if name in here}
    machine = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    backbone = {"parameters": bundle.manifest["backbone"]["parameters"], "family": bundle.manifest["backbone"]["family"]}
    line = {"backbone": backbone, "steps": args.steps, "results": results, "versions": versions, "cores": os.cpu_count()}
    line |= {"device": args.device, "machine": machine}
    print(json.dumps(line))
    if args.output:
        args.output.write_text(json.dumps(line) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
