"""ONNX Runtime on a GPU, as far as it goes without one: what is missing is said, and nothing runs on the CPU instead."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import doctor, nvidia, ortgpu
from mteo_deploy.engines.build import build
from mteo_deploy.engines.onnxruntime import BACKEND, CPU, OPTIONS
from mteo_deploy.engines.options import of
from mteo_deploy.errors import EngineError, InputError

DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int index) { *device = index + 10; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, device == 10 ? "GPU A" : "GPU B", size); return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = what == 75 ? device : what - 76; return 0; }
"""


def driver(directory: Path, init: int = 0, count: int = 2) -> str:
    """A library with the driver's functions that are called here."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to make a driver with")
    (directory / "driver.c").write_text(DRIVER)
    path = directory / f"driver-{init}-{count}.so"
    definitions = [f"-DINIT={init}", f"-DCOUNT={count}"]
    subprocess.run(["gcc", "-shared", "-fPIC", *definitions, str(directory / "driver.c"), "-o", str(path)], check=True)
    return str(path)


def without_cuda(*args: Any) -> Any:
    raise RuntimeError("CUDA Provider not available, can't get interface for it")


def package(**changes: Any) -> Any:
    """What is asked of the package onnxruntime-gpu."""
    parts = {"get_available_providers": lambda: [ortgpu.TENSORRT, ortgpu.CUDA, CPU], "preload_dlls": lambda: print("not found")}
    value = SimpleNamespace(ortvalue_from_shape_and_type=lambda *args: None)
    return SimpleNamespace(**({"__version__": "1.31.1", "cuda_version": "13.0", "OrtValue": value} | parts | changes))


def test_gpus_are_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "LIBRARY", driver(tmp_path))
    assert [str(gpu) for gpu in nvidia.gpus()] == ["GPU A, compute capability 10.0", "GPU B, compute capability 11.0"]
    assert BACKEND.machine("cuda", {}).endswith(", GPU A, compute capability 10.0")
    for init, count, reason in ((0, 0, "the driver sees none"), (100, 1, "cuInit of the driver failed with error 100")):
        monkeypatch.setattr(nvidia, "LIBRARY", driver(tmp_path, init, count))
        with pytest.raises(EngineError, match=reason):
            nvidia.gpus()
    monkeypatch.setattr(nvidia, "LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(EngineError, match=r"found no NVIDIA driver \(.*none\.so cannot be loaded\)"):
        nvidia.gpus()


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The package, the driver, the libraries: in this order."""
    monkeypatch.setattr(nvidia, "LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(
        EngineError, match=r"package onnxruntime-gpu for the device cuda; found onnxruntime 1\.31\.1, which has no"
    ):
        ortgpu.check(package(get_available_providers=lambda: ["AzureExecutionProvider", CPU]))
    with pytest.raises(EngineError, match=r"found no NVIDIA driver .*none\.so cannot be loaded\); install the driver, or use"):
        ortgpu.check(package())
    monkeypatch.setattr(nvidia, "LIBRARY", driver(tmp_path))
    with pytest.raises(EngineError, match=r"to load CUDA 13\.0 and cuDNN; found a GPU, and CUDA Provider not available"):
        ortgpu.check(package(OrtValue=SimpleNamespace(ortvalue_from_shape_and_type=without_cuda)))
    ortgpu.check(package())
    assert capsys.readouterr().out == ""  # where --json prints


def test_settings() -> None:
    own = of(OPTIONS, {})
    assert ortgpu.providers(own, None, "step_00", True) == [
        (ortgpu.CUDA, {"device_id": "0", "use_tf32": "0", "prefer_nhwc": "0", "enable_cuda_graph": "1"})
    ]
    own = of(OPTIONS, {"engine_options": {"provider": "tensorrt", "tf32": "on", "nhwc": "on"}})
    (first, cache), (second, settings) = ortgpu.providers(own, Path("cache"), "step_00", False)
    assert (first, second) == (ortgpu.TENSORRT, ortgpu.CUDA)
    assert (cache["trt_engine_cache_path"], cache["trt_engine_cache_prefix"]) == ("cache", "step_00")
    assert (settings["use_tf32"], settings["prefer_nhwc"], settings["enable_cuda_graph"]) == ("1", "1", "0")


class OnCuda:
    """A session of the CPU that says it is on CUDA: what onnxruntime gives where a part of a graph was left out."""

    def __init__(self, session: Any) -> None:
        self.get_provider_graph_assignment_info = session.get_provider_graph_assignment_info

    def get_providers(self) -> list[str]:
        return [ortgpu.CUDA, CPU]


def test_a_network_on_the_cpu_is_found(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, graph = Bundle.open(tiny_bundle), "graphs/step_00.onnx"
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry(ortgpu.RECORD, "1")
    session = onnxruntime.InferenceSession(bundle.file(graph), settings, providers=[CPU])
    with pytest.raises(EngineError, match=f"expected {graph} on CUDAExecutionProvider; onnxruntime put it on CPUExecution"):
        ortgpu.check_placed(session, graph, ortgpu.CUDA)
    with pytest.raises(EngineError, match=r"expected all of graphs/step_00\.onnx on CUDA.* nodes on the CPU \((Conv|Instance)"):
        ortgpu.check_placed(OnCuda(session), graph, ortgpu.CUDA)
    operators = {node.op_type for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()}
    monkeypatch.setattr(ortgpu, "SHAPE_OPERATORS", operators)
    ortgpu.check_placed(OnCuda(session), graph, ortgpu.CUDA)  # what is left is arithmetic on shapes


@pytest.mark.parametrize("own", [{}, {"provider": "tensorrt"}, {"cuda_graph": "on"}])
def test_cuda_without_a_gpu_is_an_error(own: dict[str, str], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With whichever package is installed here, and never a session on the CPU."""
    monkeypatch.setattr(nvidia, "LIBRARY", "no-such-driver.so")
    has_cuda = ortgpu.CUDA in onnxruntime.get_available_providers()
    reason = "found no NVIDIA driver" if has_cuda else "which has no CUDA; run: pip uninstall -y onnxruntime && pip install"
    with pytest.raises(EngineError, match=reason):
        build(tiny_bundle, engine="onnxruntime", device="cuda", engine_options=own, quiet=True)
    (entry,) = (entry for entry in doctor() if entry["engine"] == "onnxruntime")
    assert entry["devices"] == BACKEND.devices() == ["cpu"]


def test_options_of_the_gpu_need_the_gpu(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="expected --device cuda with --option cuda_graph; found --device cpu"):
        build(tiny_bundle, engine="onnxruntime", device="cpu", engine_options={"cuda_graph": True}, quiet=True)
    with pytest.raises(EngineError, match="tells the times of its layers on cpu only"):
        BACKEND.profile(Bundle.open(tiny_bundle), "graphs/step_00.onnx", "cuda", {}, 1)


def test_a_graph_that_cannot_be_captured_is_opened_without(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = BACKEND._session

    def session(bundle: Bundle, graph: str, options: Any, providers: Any, profile: str | None = None) -> Any:
        opened.append(providers[0][1]["enable_cuda_graph"])
        if opened[-1] == "1":
            raise EngineError("This session cannot use the graph capture feature")
        return real(bundle, graph, options, [CPU], profile)

    monkeypatch.setattr(BACKEND, "_session", session)
    monkeypatch.setattr(ortgpu, "check", lambda onnxruntime: None)
    monkeypatch.setattr(ortgpu, "check_placed", lambda session, graph, provider: None)
    bundle, graph = Bundle.open(tiny_bundle), "graphs/step_00.onnx"
    found: Any = BACKEND.open(bundle, graph, "cuda", {})
    assert opened == ["1", "0"] and not found._graphs
    assert found.device.notes == [f"{graph} not captured in a CUDA graph: This session cannot use the graph capture feature"]
    with pytest.raises(EngineError, match="cannot use the graph capture feature"):
        BACKEND.open(bundle, graph, "cuda", {"engine_options": {"cuda_graph": "on"}})
    off: Any = BACKEND.open(bundle, graph, "cuda", {"engine_options": {"cuda_graph": "off"}})
    assert opened == ["1", "0", "1", "0"] and off.device is found.device


def there_is_a_gpu() -> bool:
    try:
        return bool(nvidia.gpus())
    except EngineError:
        return False


def test_onnxruntime_gpu_knows_our_settings() -> None:
    """Names of settings, in the libraries of the real package."""
    try:
        metadata.version("onnxruntime-gpu")
    except metadata.PackageNotFoundError:
        pytest.skip("onnxruntime-gpu is not installed")
    libraries = Path(onnxruntime.__file__).parent / "capi"
    own = of(OPTIONS, {"engine_options": {"provider": "tensorrt"}})
    for name, settings in ortgpu.providers(own, Path("cache"), "step_00", True):
        kind = {ortgpu.CUDA: "cuda", ortgpu.TENSORRT: "tensorrt"}[name]
        library = (libraries / f"libonnxruntime_providers_{kind}.so").read_bytes()
        assert [setting for setting in settings if setting.encode() not in library] == []
        assert b"no_such_setting" not in library


def test_onnxruntime_gpu_without_a_gpu(tiny_bundle: Path) -> None:
    """The real package: asked for CUDA by itself it gives a session on the CPU; asked by us, an error."""
    if ortgpu.CUDA not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    if there_is_a_gpu():
        pytest.skip("there is a GPU")
    bundle, graph = Bundle.open(tiny_bundle), "graphs/step_00.onnx"
    silent = onnxruntime.InferenceSession(bundle.file(graph), providers=[ortgpu.CUDA])
    assert silent.get_providers() == [CPU]
    with pytest.raises(EngineError, match=r"expected a GPU for onnxruntime-gpu .* on the device cuda; found no NVIDIA"):
        BACKEND.open(bundle, graph, "cuda", {})
    with pytest.raises(EngineError, match="onnxruntime put it on CPUExecutionProvider"):
        ortgpu.check_placed(silent, graph, ortgpu.CUDA)
    assert BACKEND.devices() == ["cpu"]
    assert BACKEND.open(bundle, graph, "cpu", {}).run({"state": np.zeros((1, 1, 8, 8), np.float32)})[0].shape == (1, 1, 8, 8)
