"""What needs a GPU and an engine for it. Skipped elsewhere, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import altered

from mteo_deploy.engines import backend
from mteo_deploy.engines.build import build
from mteo_deploy.errors import MteoError
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import Sampler
from mteo_deploy.verification import verify

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("realisation", NAMES)
def test_tensorrt(realisation: str, tiny_history_bundle: Path, tmp_path: Path) -> None:
    try:
        if not backend("tensorrt").version() or not backend("tensorrt").devices():
            pytest.skip("no NVIDIA GPU")
    except MteoError as error:
        pytest.skip(str(error))
    path = altered(tiny_history_bundle, tmp_path / "bundle")
    build(path, engine="tensorrt", realisation=realisation, batch=[1, 4], quiet=True)
    report = verify(Sampler.load(path, engine="tensorrt"), seconds=0, quiet=True)
    assert report.passed, report.checks
