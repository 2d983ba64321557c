"""The neighbours of the benchmarks: each begins as the plain solver, learns, and keeps what it promises."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT

from mteo_deploy import plan as plans
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.sampler import noise_for


@pytest.fixture(scope="module")
def neighbours() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import neighbours

    return neighbours


def network_of(adapter: Adapter):
    return lambda state, timestep: adapter(state, *adapter.embeddings(timestep.reshape(1)))


@pytest.mark.parametrize(
    ("solver", "schedule"), [("euler", None), ("ipndm-2", None), ("deis-2", None), ("deis-2", "time-uniform")]
)
def test_all_begin_as_the_plain_solver(
    solver: str, schedule: str | None, neighbours: ModuleType, tiny_adapter: Adapter
) -> None:
    """Torch's own sampler, the plan, is the yardstick; every neighbour is it before anything is learned."""
    plan, noise = tiny_adapter.compile_plan(4, solver, schedule), torch.from_numpy(noise_for((1, 8, 8), 0, range(4)))
    with torch.no_grad():
        expected = plans.run(plan, noise, lambda i, x: tiny_adapter.at_timestep(x, plan.evaluations[i].timestep))[-1]
        for method in (neighbours.Neighbour, *neighbours.METHODS.values()):
            student = method(tiny_adapter.levels, plan.sigmas, solver)
            torch.testing.assert_close(student(noise, network_of(tiny_adapter)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["scalar time", "time points", "principal directions"])
def test_each_learns_and_is_restored(name: str, neighbours: ModuleType, tiny_adapter: Adapter) -> None:
    fine = tiny_adapter.compile_plan(18, "heun")
    noise = torch.from_numpy(noise_for((1, 8, 8), 7, range(32)))
    with torch.no_grad():
        images = plans.run(fine, noise, lambda i, x: tiny_adapter.at_timestep(x, fine.evaluations[i].timestep))[-1]
    grid = tiny_adapter.compile_plan(3).sigmas
    student = neighbours.METHODS[name](tiny_adapter.levels, grid, "euler")
    before = (student(noise, network_of(tiny_adapter)) - images).square().mean().item()
    neighbours.learn(student, network_of(tiny_adapter), noise, images, neighbours.Budget(iterations=25, batch=16))
    after = (student(noise, network_of(tiny_adapter)) - images).square().mean().item()
    assert after < 0.95 * before
    again = neighbours.restore(neighbours.METHODS[name](tiny_adapter.levels, grid, "euler"), neighbours.numbers(student))
    with torch.no_grad():
        torch.testing.assert_close(*(one(noise, network_of(tiny_adapter)) for one in (again, student)))
    sigmas = student.sigmas().detach().numpy()
    assert (np.diff(sigmas) < 0).all() and sigmas[0] == grid[0] and sigmas[-1] == grid[-1]


def test_timesteps_are_those_of_the_schedule(neighbours: ModuleType, tiny_adapter: Adapter) -> None:
    sigmas = tiny_adapter.compile_plan(7).sigmas
    student = neighbours.Neighbour(tiny_adapter.levels, sigmas, "euler")
    found = student.timesteps(torch.tensor(sigmas, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(found, tiny_adapter.levels.timestep(np.array(sigmas)), atol=1e-6)


def test_principal_directions_are_orthonormal_and_do_not_flip(neighbours: ModuleType) -> None:
    """Orthogonal to the direction and to each other, and of one sign whatever the eigensolver returns."""
    generator = torch.Generator().manual_seed(0)
    found, *before = torch.randn(4, 5, 1, 6, 6, generator=generator)
    basis = neighbours.principal_directions(found, before, 3).flatten(2)
    torch.testing.assert_close(basis @ basis.transpose(1, 2), torch.eye(3).expand(5, 3, 3), atol=1e-4, rtol=0)
    assert (basis @ found.flatten(1).unsqueeze(2)).abs().max() < 1e-3
    assert ((basis * before[0].flatten(1).unsqueeze(1)).sum(2) > 0).all()
    mirrored = neighbours.principal_directions(-found, before, 3).flatten(2)
    torch.testing.assert_close(mirrored, basis, atol=1e-4, rtol=0)


def test_data_directory_is_named(tmp_path: Path, neighbours: ModuleType) -> None:
    import subprocess

    script = ROOT / "benchmarks" / "results.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "expected mnist_train.npz" in done.stderr


@pytest.fixture
def rows() -> list[dict[str, object]]:
    """Figures of two seeds: MTEO first at 3 evaluations, the best plain solver at 8."""
    table = {
        ("reference", 36): 1.0,
        ("DDIM", 20): 3.0,
        ("plain Euler", 3): 30.0,
        ("plain", 3): 20.0,
        ("MTEO", 3): 2.0,
        ("plain Euler", 8): 5.0,
        ("plain", 8): 1.0,
        ("MTEO", 8): 1.5,
    }
    common = {"detail": "euler", "error": 0.02, "sure": 0.9, "learned": 0, "training_seconds": None}
    return [
        {**common, "method": method, "evaluations": count, "frechet": value + seed / 2, "seed": seed}
        for (method, count), value in table.items()
        for seed in (0, 1)
    ]


def test_page_says_what_the_figures_say(rows: list[dict[str, object]], neighbours: ModuleType, tmp_path: Path) -> None:
    import results_page

    images = {(row["method"], row["evaluations"]): np.zeros((12, 1, 8, 8), np.float32) for row in rows}
    real = {"count": 9, "train": {100: 0.2, 500: 0.1}}
    context = {"num": 100, "screen": 10, "seeds": [0, 1], "real": real, "classifier_test_accuracy": 0.99}
    more = [{**row, "num": 500} for row in rows if row["seed"] == 0 and row["method"] != "plain"]
    more = [row for row in more if (row["method"], row["evaluations"]) != ("plain Euler", 8)]
    results_page.write_page(tmp_path, rows, images, context, more)
    page, _, larger = (tmp_path / "README.md").read_text().partition("## 500 images")
    assert "Of seed 0 (`--num 500 --seeds 0`)" in larger and "0.10 away" in larger and "0.20 away" in page
    assert "| Fréchet distance at evaluations | 3 |\n" in larger and "| MTEO | **2.00** |" in larger
    assert "MTEO is first at 3 of 3 evaluations" in page
    assert (
        "| MTEO | **2.25 ± 0.25** | 1.75 ± 0.25 |" in page and "| best plain solver | 20.25 ± 0.25 | **1.25 ± 0.25** |" in page
    )
    assert "20 evaluations of DDIM (euler): 3.25 ± 0.25; MTEO is at least as near with 3" in page
    assert "| MTEO | 96.6% | 87.5% |" in page
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "quality.png", "strips.png"}
