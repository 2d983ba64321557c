"""Arrays on a device: ONNX Runtime's bound sessions over OrtValues of the CPU, which run the code that a GPU runs; closing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines import ortvalues
from mteo_deploy.engines.base import Session
from mteo_deploy.engines.batches import BatchSizes
from mteo_deploy.engines.device import DeviceArray, Pool
from mteo_deploy.engines.onnxruntime import BACKEND, CPU
from mteo_deploy.engines.ortvalues import BoundSession, EngineFiles, OrtDevice
from mteo_deploy.errors import EngineError
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import Sampler, noise_for
from mteo_deploy.verification import verify

SHAPE = (1, 8, 8)


class Opener:
    """Opens graphs of a bundle as bound sessions over the CPU's memory."""

    def __init__(self, path: Path) -> None:
        self.bundle, self.device = Bundle.open(path), OrtDevice(onnxruntime, "cpu")
        self.sessions: list[BoundSession] = []

    def __call__(self, graph: str) -> BoundSession:
        session = BACKEND._session(self.bundle, graph, {"threads": 1}, [CPU])
        self.sessions.append(BoundSession(session, self.device, graphs=True))
        return self.sessions[-1]

    @property
    def made(self) -> tuple[int, list[int]]:
        """Buffers and bindings that were made so far."""
        return self.device.pool.size, [len(session._bindings) for session in self.sessions]


def pair(path: Path, realisation: str) -> tuple[Opener, Sampler, Sampler]:
    opener = Opener(path)
    plain = Sampler(opener.bundle, lambda graph: BACKEND.open(opener.bundle, graph, "cpu", {"threads": 1}), realisation)
    return opener, Sampler(opener.bundle, opener, realisation), plain


def same(bound: Sampler, plain: Sampler, count: int, seed: int) -> None:
    noise = noise_for(SHAPE, seed, range(count))
    for found, expected in zip(bound.states(noise), plain.states(noise), strict=True):
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("realisation", NAMES)
def test_a_loop_on_the_device_gives_what_a_loop_on_the_host_gives(realisation: str, tiny_history_bundle: Path) -> None:
    """At several batch sizes in turn, from buffers and bindings that are all made the first time."""
    opener, bound, plain = pair(tiny_history_bundle, realisation)
    for count in (2, 1, 3):
        same(bound, plain, count, 0)
    made = opener.made
    for seed, count in enumerate((2, 1, 3, 3, 1, 2, 2)):
        same(bound, plain, count, seed)
    assert opener.made == made
    assert verify(bound, seconds=0, quiet=True).passed


def test_buffers_that_are_still_read_are_not_given_away(tiny_history_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a pool with one buffer of a kind overwrites what the loop goes on to read."""
    take = Pool.take
    monkeypatch.setattr(
        Pool, "take", lambda self, kind: (0, self._buffers[kind][0] if kind in self._buffers else take(self, kind)[1])
    )
    _, bound, plain = pair(tiny_history_bundle, "table")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        same(bound, plain, 2, 0)


def test_outputs_follow_the_inputs_and_are_left_alone(tiny_bundle: Path) -> None:
    opener = Opener(tiny_bundle)
    session = opener("graphs/step_00.onnx")
    first, second = (noise_for(SHAPE, seed, range(2)) for seed in (1, 2))
    (on_host,) = session.run({"state": first})
    assert isinstance(on_host, np.ndarray)
    (kept,) = session.run({"state": opener.device.put(first)})
    assert isinstance(kept, DeviceArray) and (kept.shape, kept.dtype) == ((2, *SHAPE), np.float32)
    session.run({"state": second})
    session.run({"state": opener.device.put(second)})
    np.testing.assert_array_equal(np.asarray(kept), on_host)
    assert np.asarray(kept, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="cannot be read without a copy"):
        np.asarray(kept, copy=False)


def test_what_a_bound_session_refuses(tiny_bundle: Path) -> None:
    session = Opener(tiny_bundle)("graphs/step_00.onnx")
    state = np.zeros((1, *SHAPE), np.float32)
    with pytest.raises(EngineError, match=r"expected the inputs \['state'\]; found \[\]"):
        session.run({})
    for wrong in (np.zeros((1, 1, 7, 8), np.float32), state.astype(np.float64)):
        with pytest.raises(EngineError, match="onnxruntime could not run inputs"):
            session.run({"state": wrong})
    session.run({"state": state})
    session.close()
    session.close()
    with pytest.raises(EngineError, match="expected an open session; found one that was closed"):
        session.run({"state": state})


def test_more_bindings_than_are_kept(tiny_history_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes on top runs without a CUDA graph."""
    monkeypatch.setattr(ortvalues, "BINDINGS", 2)
    opener, bound, plain = pair(tiny_history_bundle, "table")
    ids: list[str] = []
    options = BoundSession._options

    def record(self: BoundSession, graph: int) -> Any:
        found = options(self, graph)
        ids.append(found.get_run_config_entry("gpu_graph_id"))
        return found

    monkeypatch.setattr(BoundSession, "_options", record)
    for seed in range(2):
        same(bound, plain, 2, seed)
    assert opener.made[1] == [2]
    assert ids == ["-1", "1", "2", "-1", "-1", "-1", "-1"]  # shapes; four evaluations; the two on top again


def test_images_in_parts(tiny_bundle: Path) -> None:
    opener, _, plain = pair(tiny_bundle, "baked")
    bound = Sampler(opener.bundle, lambda graph: BatchSizes({2: opener(graph)}))
    for count in (2, 3, 1, 5):
        same(bound, plain, count, count)


def test_threads(tiny_history_bundle: Path) -> None:
    _, bound, plain = pair(tiny_history_bundle, "table")
    noises = [noise_for(SHAPE, seed, range(2)) for seed in range(8)]
    expected = [plain.image(noise) for noise in noises]
    with ThreadPoolExecutor(4) as threads:
        for found, image in zip(threads.map(bound.image, noises), expected, strict=True):
            np.testing.assert_allclose(found, image, rtol=1e-5, atol=1e-6)


def test_files_of_a_provider(tmp_path: Path) -> None:
    """Those of one graph go into the built engine, and a session opens a copy of them."""
    (tmp_path / "built").mkdir()
    files = EngineFiles("step_01")
    for name in ("step_01_sm90.engine", "step_01_sm90.profile", "step_010_sm90.engine"):
        (files.directory / name).write_text(name)
    files.save(tmp_path / "built")
    assert {path.name for path in (tmp_path / "built").iterdir()} == {"step_01_sm90.engine", "step_01_sm90.profile"}
    again = EngineFiles("step_01", tmp_path / "built")
    (again.directory / "step_01_sm90.engine").write_text("another")
    assert (tmp_path / "built" / "step_01_sm90.engine").read_text() == "step_01_sm90.engine"
    for one in (files, again):
        one.close()
        one.close()
        assert not one.directory.exists()


USES: dict[str, Callable[[Sampler, Any], object]] = {
    "call": lambda sampler, noise: sampler(num=1),
    "states": lambda sampler, noise: sampler.states(noise),
    "image": lambda sampler, noise: sampler.image(noise),
    "prepare": lambda sampler, noise: sampler.prepare({}),
    "step": lambda sampler, noise: sampler.step(0, noise, []),
    "conditioned": lambda sampler, noise: sampler.conditioned(sampler.plan),
    "loop": lambda sampler, noise: sampler.loop,
}


def openers(path: Path) -> dict[str, Callable[[str], Session]]:
    from mteo_deploy.engines import openvino

    bundle = Bundle.open(path)
    return {
        "onnxruntime": lambda graph: BACKEND.open(bundle, graph, "cpu", {}),
        "bound": Opener(path),
        "openvino": lambda graph: openvino.BACKEND.open(bundle, graph, "cpu", {"batch": [1]}),
    }


@pytest.mark.parametrize("engine", ["onnxruntime", "bound", "openvino"])
def test_a_closed_sampler_holds_nothing_and_says_so(engine: str, tiny_bundle: Path) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    held: list[weakref.ref[Any]] = []

    def open_graph(graph: str) -> Session:
        session = openers(tiny_bundle)[engine](graph)
        inner = next(iter(session.sessions.values()))._compiled if engine == "openvino" else session._session  # type: ignore[attr-defined]
        held.append(weakref.ref(inner))
        return session

    noise = noise_for(SHAPE, 0, range(1))
    with Sampler(Bundle.open(tiny_bundle), open_graph) as sampler:
        image = sampler.image(noise)
        sampler.conditioned(sampler.plan)
        assert len(held) == 4 and all(one() is not None for one in held)
    gc.collect()
    assert all(one() is None for one in held)
    sampler.close()
    for use in USES.values():
        with pytest.raises(EngineError, match=r"expected an open sampler; found one that was closed; run: Sampler\.load"):
            use(sampler, noise)
    with sampler.reopen() as again:
        np.testing.assert_allclose(again.image(noise), image, rtol=1e-5, atol=1e-6)


def test_a_sampler_without_references_is_gone_at_once(tiny_bundle: Path) -> None:
    """Nothing in it refers to it: a GPU's memory does not wait for the garbage collector."""
    bundle = Bundle.open(tiny_bundle)
    sampler = Sampler(bundle, lambda graph: BACKEND.open(bundle, graph, "cpu", {}))
    sampler(num=1)
    gone = weakref.ref(sampler)
    gc.disable()
    try:
        del sampler
        assert gone() is None
    finally:
        gc.enable()
