"""Session fixtures: one small backbone trained on scikit-learn's 8x8 digits, and what the verbs make of it.

The whole suite runs in several processes, each with its share of the tests (pytest-xdist). What is slow to make is made by
the first process that asks for it, in a directory that they share; the others wait.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from families import redraw, save_pipeline
from filelock import FileLock

from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.engines.build import build
from mteo_deploy.exporters import compiler
from mteo_deploy.exporters.base import Adapter, load_backbone
from mteo_deploy.exporters.choice import pretrained_set
from mteo_deploy.exporters.export import export
from mteo_deploy.exporters.trace import trace_generic, trace_time_embedding
from mteo_deploy.sampler import Sampler

ROOT = Path(__file__).parent.parent
MODEL = "--size 8 --block-out-channels 16 32 --attention-levels 1 --attention-head-dim 16 --norm-num-groups 8"
TRAINING = "--iterations 300 --batch 64 --warmup 20 --no-autocast --threads 1"
SMALL = Recipe(trajectories=64, iterations=40, batch=32, teacher_evaluations=24)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Files and single tests run in this process, where -s and breakpoint() work; directories on as many as there are cores."""
    return 0 if all(Path(argument.split("::")[0]).is_file() for argument in config.args) else None


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order, and no two thread pools on two cores; in the processes that tests start too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C counts, here and in the processes that tests start, also where who started us ignores it (a background job)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _traced_once() -> Iterator[None]:
    """Tracing is most of an export and depends on the backbone alone: once for each in a process, copied from then on."""
    made: dict[Any, Any] = {}

    def generic(adapter: Adapter, dynamic: Collection[str], batch: int | None = None) -> ir.Model:
        network = type(adapter), adapter.fingerprint(), adapter.sample_shape, adapter.requests
        key = *network, *sorted({*dynamic} - {"batch"}), batch
        if key not in made:
            made[key] = trace_generic(adapter, dynamic, batch)
        return made[key].clone()

    def time_embedding(adapter: Adapter) -> tuple[ir.Model, dict[str, int]]:
        key = type(adapter), adapter.fingerprint(), trace_time_embedding
        if key not in made:
            made[key] = trace_time_embedding(adapter)
        return made[key][0].clone(), dict(made[key][1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "trace_generic", generic)
        patch.setattr(compiler, "trace_time_embedding", time_embedding)
        yield


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once(name, make)``: the directory ``name`` as ``make`` left it, made by one of the processes that run the tests."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def made(name: str, make: Callable[[Path], object]) -> Path:
        directory, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)  # what a process left that failed to make it
                make(directory)
                done.touch()
        return directory

    return made


def _train(directory: Path) -> None:
    from sklearn.datasets import load_digits

    directory.mkdir()
    np.savez(directory / "digits.npz", images=np.round(load_digits().images * 255 / 16).astype(np.uint8))
    script = [sys.executable, str(ROOT / "examples" / "train_backbone.py"), str(directory / "digits.npz")]
    done = subprocess.run(
        [*script, "-o", str(directory / "run"), *MODEL.split(), *TRAINING.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def tiny_model(once: Once) -> Path:
    """Pipeline directory of a backbone of 0.18 M parameters, made by the example script."""
    return once("backbone", _train) / "run" / "pipeline"


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path) -> Adapter:
    return load_backbone(tiny_model)


@pytest.fixture(scope="session")
def tiny_embeddings(tiny_model: Path, once: Once) -> Path:
    """Embedding set file for 3 Euler steps of ``tiny_model``."""

    def make(directory: Path) -> None:
        distill(tiny_model, directory / "euler-3.safetensors", steps=3, recipe=SMALL, quiet=True)

    return once("embeddings", make) / "euler-3.safetensors"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, tiny_embeddings: Path, once: Once) -> Path:
    """Bundle of ``tiny_embeddings``, built; a test that alters it copies it first."""

    def make(directory: Path) -> None:
        bundle = export(directory, model=tiny_model, embeddings=tiny_embeddings, quiet=True)
        build(bundle, engine="onnxruntime", realisation="baked", threads=1, quiet=True)

    return once("euler-3", make)


@pytest.fixture(scope="session")
def tiny_history_bundle(tiny_model: Path, once: Once) -> Path:
    """Built bundle whose updates reach back two evaluations: plain iPNDM 3, 4 steps."""

    def make(directory: Path) -> None:
        bundle = export(directory, model=tiny_model, steps=4, solver="ipndm-3", plain=True, quiet=True)
        build(bundle, engine="onnxruntime", realisation="baked", threads=1, quiet=True)

    return once("ipndm-4", make)


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


@pytest.fixture(scope="session")
def pipeline_model(once: Once) -> Path:
    """A whole text-to-image pipeline, small and random: UNet, VAE, CLIP text encoder and its tokenizer."""
    from pipelines import add_part, add_text, random_vae
    from test_unet2d_condition import random_unet, save

    def make(directory: Path) -> None:
        torch.manual_seed(0)
        directory.mkdir()
        save(directory, random_unet())
        add_part(directory, "vae", random_vae())
        add_text(directory)

    return once("pipeline", make)


@pytest.fixture(scope="session")
def pipeline_bundle(once: Once, pipeline_model: Path) -> Path:
    """Its bundle: one evaluation under guidance of 3, open sizes, built in ONNX Runtime."""

    def make(directory: Path) -> None:
        options: dict[str, Any] = {"dynamic": ("batch", "height", "width"), "realisations": ["baked"], "guidance_scale": 3.0}
        made = export(directory, model=pipeline_model, steps=1, plain=True, quiet=True, **options)
        build(made, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)

    return once("text-to-image", make)


@pytest.fixture(scope="session")
def token_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipeline directory of a DiT with ten labels, 64 numbers per token, and random weights."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return save_pipeline(tmp_path_factory.mktemp("tokens") / "dit", redraw(network), DDIMScheduler())
