"""Files under a sampler: opened late they are checked again, and what is mapped is compared around each run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import altered

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.build import build
from mteo_deploy.errors import BundleError
from mteo_deploy.sampler import Sampler

ENGINES = ["onnxruntime", "openvino"]
QUICK: dict[str, Any] = {"realisation": "fused", "threads": 1, "seconds": 0.1, "quiet": True}
CUT = """
import os, sys
from mteo_deploy import Sampler, MteoError
sampler = Sampler.load(sys.argv[1], engine=sys.argv[2])
expected = sampler(num=2)
for path in sys.argv[3:]:
    os.truncate(path, 16)
try:
    print((sampler(num=2) == expected).all())
except MteoError as error:
    print(error)
try:
    sampler.conditioned(sampler.plan)
except MteoError as error:
    print(error)
"""


@pytest.fixture(scope="module", params=ENGINES)
def built(request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    pytest.importorskip(request.param, reason=f"the engine {request.param} is not installed")
    path = altered(tiny_bundle, tmp_path_factory.mktemp(request.param) / "bundle")
    build(path, engine=request.param, **QUICK)
    return request.param, path


@pytest.fixture
def copied(built: tuple[str, Path], tmp_path: Path) -> tuple[str, Path]:
    return built[0], Path(shutil.copytree(built[1], tmp_path / "bundle"))


def mapped_by(path: Path) -> list[Path]:
    """What the graphs of the bundle map: the weight files, or the compiled graphs."""
    return [*path.glob("engines/*/*.blob")] or [*path.glob("graphs/*.bin")]


def spoil(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 4))


def test_written_to_in_place(copied: tuple[str, Path]) -> None:
    """Other images, or the same ones by luck: refused, also by what is opened later; other samplers as well."""
    engine, path = copied
    sampler, other = Sampler.load(path, engine=engine), Sampler.load(path, engine=engine)
    expected = sampler(num=1)
    for file in mapped_by(path):
        spoil(file)
    for use in (sampler, other, lambda num: sampler.conditioned(sampler.plan, num=num), sampler):
        with pytest.raises(BundleError, match=r"was written to while it was in use; load the sampler again|was altered"):
            use(num=1)
    with pytest.raises(BundleError, match="altered"):
        Sampler.load(path, engine=engine)
    assert expected.shape == (1, 1, 8, 8)


def test_touched(copied: tuple[str, Path]) -> None:
    """Another time and the same bytes: hashed once, and all is well; so it is when a copy takes its place."""
    engine, path = copied
    with Sampler.load(path, engine=engine) as sampler:
        expected = sampler(num=1)
        for file in [*mapped_by(path), *path.glob("graphs/*")]:
            os.utime(file, (1, 1))
        np.testing.assert_array_equal(sampler(num=1), expected)
        for file in [*mapped_by(path), *path.glob("graphs/*")]:
            shutil.copy(file, file.with_name("copy"))
            os.replace(file.with_name("copy"), file)
        np.testing.assert_array_equal(sampler(num=1), expected)
        assert sampler.conditioned(sampler.plan).shape == (1, 1, 8, 8)


def test_replaced_by_renaming(copied: tuple[str, Path], tiny_history_bundle: Path) -> None:
    """Another bundle takes its name: what is open goes on, what would be opened is refused."""
    engine, path = copied
    with Sampler.load(path, engine=engine) as sampler:
        expected = sampler(num=2)
        path.rename(path.with_name("old"))
        shutil.copytree(tiny_history_bundle, path)
        np.testing.assert_array_equal(sampler(num=2), expected)
        with pytest.raises(BundleError, match=r"cannot be read any more|was altered|bytes, expected|is missing|cannot be read"):
            sampler.conditioned(sampler.plan)


def test_shortened_in_place(copied: tuple[str, Path]) -> None:
    """In a process of its own, which SIGBUS would end."""
    engine, path = copied
    files = [str(file) for file in [*mapped_by(path), *path.glob("graphs/*.bin")]]
    done = subprocess.run([sys.executable, "-c", CUT, str(path), engine, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "was written to while it was in use" in first and ("bytes, expected" in second or "was written to" in second)


def test_read_instead_of_mapped(copied: tuple[str, Path]) -> None:
    """With mmap=off what is open goes on whatever happens to the files."""
    engine, path = copied
    expected = Sampler.load(path, engine=engine)(num=2)
    build(path, engine=engine, engine_options={"mmap": "off"}, **QUICK)
    assert Sampler.load(path, engine=engine).built_engine("this").options["engine_options"] == {"mmap": "off"}
    files = [str(file) for file in [*path.glob("engines/*/*.blob"), *path.glob("graphs/*.bin")]]
    done = subprocess.run([sys.executable, "-c", CUT, str(path), engine, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("True\n"), done.stderr
    assert expected.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("what", ["graphs/conditioned.onnx", "graphs/weights.bin", "graphs/step_01.onnx"])
def test_opened_late(what: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """The bytes count, not the time: it is put back to what it was."""
    path = altered(tiny_bundle, tmp_path / "bundle")
    bundle = Bundle.open(path)
    file = path / what
    status = file.stat()
    time.sleep(0.02)
    spoil(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    from mteo_deploy.engines.onnxruntime import BACKEND

    graph = what if what.endswith(".onnx") else "graphs/step_00.onnx"
    with pytest.raises(BundleError, match="was altered"):
        BACKEND.open(bundle, graph, "cpu", {})


def test_checks_cost_microseconds(built: tuple[str, Path]) -> None:
    from mteo_deploy.engines.live import Mapped, check_all

    bundle = Bundle.open(built[1])
    mapped = [Mapped.of(bundle.checked["graphs/weights.bin"])]
    clock = time.perf_counter()
    for _ in range(1000):
        check_all(mapped)
    assert time.perf_counter() - clock < 0.5
