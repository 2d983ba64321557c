"""Session fixtures: one small backbone trained on scikit-learn's 8x8 digits, and what the verbs make of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.engines.build import build
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.export import export, pretrained_set
from mteo_deploy.sampler import Sampler

ROOT = Path(__file__).parent.parent
MODEL = "--size 8 --block-out-channels 16 32 --attention-levels 1 --attention-head-dim 16 --norm-num-groups 8"
TRAINING = "--iterations 300 --batch 64 --warmup 20 --no-autocast --threads 1"
SMALL = Recipe(trajectories=64, iterations=40, batch=32, substeps=4)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order, and no two thread pools on two cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipeline directory of a backbone of 0.18 M parameters, made by the example script."""
    from sklearn.datasets import load_digits

    directory = tmp_path_factory.mktemp("backbone")
    np.savez(directory / "digits.npz", images=np.round(load_digits().images * 255 / 16).astype(np.uint8))
    script = [sys.executable, str(ROOT / "examples" / "train_backbone.py"), str(directory / "digits.npz")]
    done = subprocess.run(
        [*script, "-o", str(directory / "run"), *MODEL.split(), *TRAINING.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return directory / "run" / "pipeline"


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path) -> Adapter:
    return load_backbone(tiny_model)


@pytest.fixture(scope="session")
def tiny_embeddings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedding set file for 3 Euler steps of ``tiny_model``."""
    path = tmp_path_factory.mktemp("embeddings") / "euler-3.safetensors"
    distill(tiny_model, path, steps=3, recipe=SMALL, quiet=True)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, tiny_embeddings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of ``tiny_embeddings``, built; a test that alters it copies it first."""
    path = tmp_path_factory.mktemp("bundles") / "euler-3"
    bundle = export(path, model=tiny_model, embeddings=tiny_embeddings, quiet=True)
    build(bundle, engine="onnxruntime", realisation="baked", threads=1, quiet=True)
    return path


@pytest.fixture(scope="session")
def tiny_history_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built bundle whose updates reach back two evaluations: plain iPNDM 3, 4 steps."""
    path = tmp_path_factory.mktemp("bundles") / "ipndm-4"
    bundle = export(path, model=tiny_model, steps=4, solver="ipndm-3", plain=True, quiet=True)
    build(bundle, engine="onnxruntime", realisation="baked", threads=1, quiet=True)
    return path


@pytest.fixture(scope="session")
def learned(tiny_embeddings: Path) -> EmbeddingSet:
    return EmbeddingSet.load(tiny_embeddings)


@pytest.fixture(scope="session")
def plain_history(tiny_adapter: Adapter) -> EmbeddingSet:
    """The set that ``tiny_history_bundle`` was made from."""
    return pretrained_set(tiny_adapter, 4, "ipndm-3")


@pytest.fixture(scope="session")
def tiny_sampler(tiny_bundle: Path) -> Sampler:
    return Sampler.load(tiny_bundle)


@pytest.fixture(scope="session")
def history_sampler(tiny_history_bundle: Path) -> Sampler:
    return Sampler.load(tiny_history_bundle)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A built copy of ``tiny_bundle`` to be altered."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
