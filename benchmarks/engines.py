"""A built bundle against what one would run instead, interleaved: torch, torch.compile, and a plain export in each engine.

The plain exports are the backbone traced with its timestep as an input, without our compiler, and sampled with a scheduler
loop in numpy (the plan's own coefficients, so that all sides do the same evaluations). All sides sample the same number of
evaluations from the same noise; what is timed is one batch from noise to images. Prints a table, then one JSON line.

    python benchmarks/engines.py --steps 4 --batch 1 8 --seconds 20
    python benchmarks/engines.py --random-dit --steps 4 --work runs/dit
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mteo_deploy import assets, build, export
from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import backend, cache
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.trace import OPSET
from mteo_deploy.latency import bootstrap_median
from mteo_deploy.plan import run
from mteo_deploy.sampler import Sampler, noise_for

Images = Callable[[], np.ndarray]


def random_dit(directory: Path) -> Path:
    """Pipeline directory of a DiT-S (33 M parameters, 64 tokens of 2x2) with random weights."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=12,
        sample_size=16,
        num_embeds_ada_norm=10,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    network.save_pretrained(directory / "transformer")
    DDIMScheduler().save_pretrained(directory / "scheduler")
    index = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (directory / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **index}))
    return directory


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


def ort_call(path: Path, threads: int | None) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)[0]


def openvino_call(path: Path, threads: int | None, hint: str) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
    config |= {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    return lambda feeds: request.infer(feeds, share_inputs=True)[0]


class Contest:
    """Ways to sample the same images."""

    def __init__(self, bundle: Bundle, adapter: Adapter, plain: Path, batch: int, threads: int | None) -> None:
        self.bundle, self.batch, self.threads = bundle, batch, threads
        self.noise = noise_for(bundle.sample_shape, 0, range(batch))
        self.requests = bundle.reference_requests(batch)
        self.adapter, self.plain = adapter, plain
        self.ways: dict[str, Images] = {}

    def ours(self) -> None:
        for path in cache.records(self.bundle)[::-1]:
            built = cache.check(self.bundle, path)
            if self.batch not in built.options.get("batch", [self.batch]):
                continue

            def opener(graph: str, built: cache.Built = built) -> Any:
                return built.backend.open(self.bundle, graph, built.device, built.options, built.directory)

            sampler = Sampler(self.bundle, opener, built.record["realisation"], built=built)
            name = f"ours: {built.backend.name} {sampler.precision}, {sampler.loop.name}"
            self.ways[name] = lambda sampler=sampler: sampler.states(self.noise, self.requests)[-1]  # type: ignore[misc]

    def torch(self, name: str, network: Callable[..., torch.Tensor], autocast: bool) -> None:
        plan, labels = self.bundle.plan, [torch.from_numpy(v) for v in self.requests.values()]

        def evaluate(i: int, state: torch.Tensor) -> torch.Tensor:
            return network(state, self.timestep(i), *labels).float()

        def images() -> np.ndarray:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return run(plan, torch.from_numpy(self.noise), evaluate)[-1].numpy()

        self.ways[name] = images

    def timestep(self, i: int) -> torch.Tensor:
        """As the network takes it: a DiT wants one per image."""
        value = torch.tensor(self.bundle.plan.evaluations[i].timestep, dtype=torch.float32)
        return value.expand(self.batch).clone() if self.requests else value

    def engine(self, name: str, call: Callable[[dict[str, np.ndarray]], np.ndarray]) -> None:
        plan, labels = self.bundle.plan, list(self.requests.values())
        timesteps = [self.timestep(i).numpy() for i in range(len(plan.evaluations))]

        def evaluate(i: int, state: np.ndarray) -> np.ndarray:
            feeds = {"state": state, "timestep": timesteps[i]}
            return call({**feeds, "labels": labels[0]} if labels else feeds)

        self.ways[name] = lambda: run(plan, self.noise, evaluate)[-1]

    def measure(self, seconds: float) -> dict[str, dict[str, float]]:
        """Rounds through all ways in random order: medians, and each way's time over our best one's with its interval."""
        names, order = list(self.ways), np.random.default_rng(0)
        for name in names * 2:
            self.ways[name]()
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
            found[name] = {"p50": float(medians[i]), "ratio": ratio, "low": low, "high": high, "rounds": len(times)}
        return found

    def errors(self, reference: str) -> dict[str, float]:
        """Relative RMS difference of each way's images from those of the reference."""
        expected = self.ways[reference]()
        return {n: float(np.sqrt(((w() - expected) ** 2).mean() / (expected**2).mean())) for n, w in self.ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=assets.MODEL)
    parser.add_argument("--random-dit", action="store_true", help="a DiT-S with random weights instead of --model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="per batch size")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--work", type=Path, help="new directory to leave the model, the plain export and the bundle in")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        model = random_dit(work / "dit") if args.random_dit else args.model
        bundle = export(work / "bundle", model=model, steps=args.steps, plain=True, quiet=True)
        adapter = load_backbone(model)
        network = Network(adapter)
        for batch in args.batch:
            for engine, precision in (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")):
                if precision == "fp32" or "BF16" in backend(engine).machine("cpu", {}):
                    build(bundle, engine=engine, precision=precision, batch=[batch], threads=args.threads, quiet=True)
            contest = Contest(bundle, adapter, work / "plain.onnx", batch, args.threads)
            if not contest.plain.exists():
                labels = [torch.from_numpy(v) for v in bundle.reference_requests(2).values()]
                timestep = torch.full((2,), 500.0) if labels else torch.tensor(500.0)
                plain_export(network, (torch.zeros(2, *bundle.sample_shape), timestep, *labels), contest.plain)
            contest.torch("torch fp32", network, False)
            contest.torch("torch bf16", network, True)
            if not args.no_compile:
                contest.torch("torch.compile fp32", torch.compile(network), False)
                contest.torch("torch.compile bf16", torch.compile(network), True)
            contest.engine("plain onnxruntime fp32", ort_call(contest.plain, args.threads))
            contest.engine("plain openvino fp32", openvino_call(contest.plain, args.threads, "f32"))
            contest.engine("plain openvino bf16", openvino_call(contest.plain, args.threads, "bf16"))
            contest.ours()
            errors = contest.errors("torch fp32")
            found = {name: {**row, "error": errors[name]} for name, row in contest.measure(args.seconds).items()}
            results.append({"batch": batch, "ways": found})
    table = Table("batch", "way", "p50 ms", "time / our best", "95 % interval", "images differ by", title_justify="left")
    for result in results:
        for name, row in sorted(result["ways"].items(), key=lambda item: item[1]["p50"]):
            ratio, interval = f"{row['ratio']:.2f}", f"[{row['low']:.2f}, {row['high']:.2f}]"
            table.add_row(str(result["batch"]), name, f"{row['p50']:.2f}", ratio, interval, f"{row['error']:.1e}")
    Console(width=120).print(table)
    versions = {name: metadata.version(name) for name in ("torch", "onnxruntime", "openvino", "numpy")}
    backbone = {"parameters": bundle.manifest["backbone"]["parameters"], "family": bundle.manifest["backbone"]["family"]}
    line = {"backbone": backbone, "steps": args.steps, "results": results, "versions": versions, "cores": os.cpu_count()}
    print(json.dumps({**line, "machine": platform.machine()}))
    if args.output:
        args.output.write_text(json.dumps({**line, "machine": platform.machine()}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
