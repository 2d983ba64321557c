"""The sampling side needs numpy and one engine package, and importing the package costs little."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import altered

import mteo_deploy

BLOCK = """
import sys
BLOCKED = {"torch", "onnx", "onnx_ir", "onnxscript", "diffusers", "accelerate", "sklearn", "scipy"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Block())
"""

SAMPLING_SIDE = """
import numpy as np
from mteo_deploy import Bundle, EmbeddingSet, Plan, Sampler, build, compile_plan, inspect, verify

path = sys.argv[1]
build(path, threads=1, seconds=0.2, quiet=True)
images = Sampler.load(path)(num=2, seed=3)
assert images.shape == (2, 1, 8, 8) and np.isfinite(images).all()
report = verify(path, seconds=0, quiet=True)
assert report.passed, report.checks
assert inspect(path)["kind"] == "bundle"
assert inspect(path + "/embeddings.safetensors")["kind"] == "embedding set"
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
print("done")
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_sampling_side_runs_without_torch_and_onnx(tiny_bundle: Path, tmp_path: Path) -> None:
    done = python(BLOCK + SAMPLING_SIDE, str(altered(tiny_bundle, tmp_path / "bundle")))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_the_block_blocks() -> None:
    """The control: the training side does not load under the same hook."""
    done = python(BLOCK + "import mteo_deploy.distillation")
    assert done.returncode == 1 and "ModuleNotFoundError: blocked: torch" in done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "sampler",
        "verification",
        "inspection",
        "report",
        "benchmarking",
        "engines.build",
        "engines.onnxruntime",
        "engines.openvino",
        "engines.tensorrt",
        "cli",
    ],
)
def test_no_heavy_import(module: str) -> None:
    """Where the packages are there, they are not loaded either."""
    heavy = "{'torch', 'onnx', 'onnx_ir', 'onnxscript', 'diffusers', 'onnxruntime', 'rich', 'PIL', 'matplotlib'}"
    done = python(f"import sys, mteo_deploy.{module}; print(sorted({heavy} & set(sys.modules)))")
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_import_is_light() -> None:
    """Processor time of whole interpreters, interleaved, medians of 7."""
    report = "; import time; print(time.process_time())"
    times: dict[str, list[float]] = {"numpy": [], "numpy, mteo_deploy": []}
    for _ in range(7):
        for names, found in times.items():
            found.append(float(python(f"import {names}{report}").stdout))
    base, ours = (statistics.median(found) for found in times.values())
    assert ours - base < 0.2


def test_public_names() -> None:
    for name in mteo_deploy.__all__:
        assert getattr(mteo_deploy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'destil'"):
        _ = mteo_deploy.destil
