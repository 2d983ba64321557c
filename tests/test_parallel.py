"""Two processes on the CPU (gloo), started as a user starts them, learn what one learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import mteo_deploy
from mteo_deploy.cli import main
from mteo_deploy.embeddings import EmbeddingSet

ROOT = Path(mteo_deploy.__file__).parent.parent
LIMIT = 240
ARGUMENTS = "--steps 2 --trajectories 21 --iterations 6 --batch 9 --teacher-evaluations 8 --learn coefficients --device cpu"


def test_two_processes_are_one(tiny_model: Path, tmp_path: Path) -> None:
    """Rows and batches that do not divide by two, numbers of two types; equal but for the order of sums."""
    common = ["distill", "--model", str(tiny_model), *ARGUMENTS.split()]
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    main([*common, "-o", str(one), "-q"], standalone_mode=False)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launch, *settings, "-m", "mteo_deploy.cli", *common, "-o", str(two), "--json"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2  # printed once
    alone, shared = EmbeddingSet.load(one), EmbeddingSet.load(two)
    assert (alone.training["processes"], shared.training["processes"]) == (1, 2)
    assert alone.training["error_before"] > alone.training["error_after"]
    np.testing.assert_allclose(shared.training["error_after"], alone.training["error_after"], rtol=1e-3)
    for name, delta in alone.deltas.items():
        assert np.abs(delta).max() > 0.05
        np.testing.assert_allclose(shared.deltas[name], delta, rtol=0, atol=0.01)
    for a, b in zip(shared.plan.evaluations, alone.plan.evaluations, strict=True):
        np.testing.assert_allclose(a.carry, b.carry, rtol=1e-4)
    assert not list(tmp_path.glob("*checkpoint*"))
