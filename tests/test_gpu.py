"""What needs a GPU and an engine for it. Skipped elsewhere, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import altered, relative

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import backend
from mteo_deploy.engines.build import build
from mteo_deploy.errors import MteoError
from mteo_deploy.profiling import profile
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.verification import verify

pytestmark = pytest.mark.gpu


def needs(engine: str) -> None:
    try:
        if not backend(engine).version() or "cuda" not in backend(engine).devices():
            pytest.skip(f"{engine} can use no NVIDIA GPU here")
    except MteoError as error:
        pytest.skip(str(error))


def needs_tensorrt() -> None:
    needs("tensorrt")


@pytest.mark.parametrize("realisation", NAMES)
def test_tensorrt(realisation: str, tiny_history_bundle: Path, tmp_path: Path) -> None:
    needs_tensorrt()
    path = altered(tiny_history_bundle, tmp_path / "bundle")
    build(path, engine="tensorrt", realisation=realisation, batch=[1, 4], quiet=True)
    report = verify(Sampler.load(path, engine="tensorrt"), seconds=0, quiet=True)
    assert report.passed, report.checks


@pytest.mark.parametrize(
    "options",
    [
        {"optimization_level": 1, "tiling_optimization_level": "fast", "workspace": 256},
        {"hardware_compatibility": "ampere_plus"},
        {"version_compatible": "on"},
        {"strip": "on"},
        {"refit": "on", "strip": "on"},
        {"weight_streaming": "on", "weight_streaming_budget": 0},
    ],
)
def test_options_of_tensorrt(options: dict[str, object], tiny_bundle: Path, tmp_path: Path) -> None:
    needs_tensorrt()
    path, times = altered(tiny_bundle, tmp_path / "bundle"), tmp_path / "times.bin"
    options = {**options, "timing_cache": times}
    build(path, engine="tensorrt", realisation="baked", batch=[1, 4], engine_options=options, quiet=True)
    assert times.stat().st_size
    report = verify(Sampler.load(path, engine="tensorrt"), seconds=0, quiet=True)
    assert report.passed, report.checks
    found = profile(path, engine="tensorrt", loops=3, quiet=True)
    assert len(found.graphs()) == 3 and sum(found.graphs().values()) > 0


def on_cuda(path: Path, engine: str, realisation: str, **own: object) -> Sampler:
    build(path, engine=engine, device="cuda", realisation=realisation, batch=[1, 4], engine_options=own, quiet=True)
    return Sampler.load(path, engine=engine, device="cuda")


@pytest.mark.parametrize("realisation", NAMES)
@pytest.mark.parametrize("own", [{"cuda_graph": "on"}, {"cuda_graph": "off"}, {"cuda_graph": "on", "nhwc": "on"}])
def test_onnxruntime(own: dict[str, object], realisation: str, tiny_history_bundle: Path, tmp_path: Path) -> None:
    needs("onnxruntime")
    with on_cuda(altered(tiny_history_bundle, tmp_path / "bundle"), "onnxruntime", realisation, **own) as sampler:
        report = verify(sampler, seconds=0, quiet=True)
        assert report.passed and sampler.device.notes == [], report.checks


@pytest.mark.parametrize("realisation", NAMES)
def test_provider_tensorrt(realisation: str, tiny_history_bundle: Path, tmp_path: Path) -> None:
    """Where TensorRT 10's libraries are beside onnxruntime-gpu."""
    needs("onnxruntime")
    path = altered(tiny_history_bundle, tmp_path / "bundle")
    try:
        sampler = on_cuda(path, "onnxruntime", realisation, provider="tensorrt")
    except MteoError as error:
        pytest.skip(str(error))
    assert list(path.glob("engines/*/*.engine"))
    report = verify(sampler, seconds=0, quiet=True)
    assert report.passed, report.checks


@pytest.mark.parametrize("realisation", NAMES)
@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_a_captured_loop(engine: str, realisation: str, tiny_history_bundle: Path, tmp_path: Path) -> None:
    """At several batch sizes in turn: every state equals the first run's, which is not captured, and the CPU's."""
    needs(engine)
    path = altered(tiny_history_bundle, tmp_path / "bundle")
    cpu = Bundle.open(path)
    plain = Sampler(cpu, lambda graph: backend("onnxruntime").open(cpu, graph, "cpu", {}), realisation)
    with on_cuda(path, engine, realisation) as sampler:
        for count in (2, 4, 1) * 4:
            noise = noise_for(cpu.sample_shape, count, range(count))
            for found, expected in zip(sampler.states(noise), plain.states(noise), strict=True):
                assert relative(found, expected) < 1e-4
        if engine == "tensorrt":
            takes: Any = sampler._now.states.takes  # type: ignore[attr-defined]
            assert len(takes) == 3 and all(take._graph is not None for take in takes.values())
        assert sampler.device.notes == []


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_nothing_leaves_the_device_within_a_loop(
    engine: str, tiny_history_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy to the device per sampling, and one back."""
    needs(engine)
    with on_cuda(altered(tiny_history_bundle, tmp_path / "bundle"), engine, "baked") as sampler:
        noise, copies = noise_for(sampler.bundle.sample_shape, 0, range(2)), []
        kind = type(sampler.device)
        for name in ("put", "_fetch") if engine == "onnxruntime" else ("copy_in", "_out"):
            real = getattr(kind, name)
            monkeypatch.setattr(kind, name, lambda *args, real=real, name=name: copies.append(name) or real(*args))
        for _ in range(4):
            copies.clear()
            image = sampler.image(noise)
            assert len(copies) == 2 and np.isfinite(image).all()
