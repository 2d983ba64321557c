"""What needs a GPU and an engine for it. Skipped elsewhere, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import altered

from mteo_deploy.engines import backend
from mteo_deploy.engines.build import build
from mteo_deploy.errors import MteoError
from mteo_deploy.profiling import profile
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import Sampler
from mteo_deploy.verification import verify

pytestmark = pytest.mark.gpu


def needs_tensorrt() -> None:
    try:
        if not backend("tensorrt").version() or not backend("tensorrt").devices():
            pytest.skip("no NVIDIA GPU")
    except MteoError as error:
        pytest.skip(str(error))


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
