"""A sampler in several threads gives what it gives in one; closing waits; other processes load their own."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import altered

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.build import build
from mteo_deploy.engines.turns import Turns
from mteo_deploy.errors import EngineError, InputError
from mteo_deploy.sampler import Sampler

ENGINES = ["onnxruntime", "openvino"]
AT_ONCE = 8


def opened(engine: str, path: Path, realisation: str = "baked", **options: Any) -> Sampler:
    """A sampler of graphs that are compiled now, each in two threads of the engine's own."""
    pytest.importorskip(engine, reason=f"the engine {engine} is not installed")
    backend, bundle = importlib.import_module(f"mteo_deploy.engines.{engine}").BACKEND, Bundle.open(path)
    return Sampler(bundle, lambda graph: backend.open(bundle, graph, "cpu", {"threads": 2, **options}), realisation)


def together(calls: list[Callable[[], Any]], times: int) -> list[list[Any]]:
    """What each call gave in each of ``times`` rounds, all of them in threads of their own that begin together."""
    start = threading.Barrier(len(calls))

    def work(call: Callable[[], Any]) -> list[Any]:
        start.wait()
        return [call() for _ in range(times)]

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(work, calls))


@pytest.mark.parametrize(
    ("engine", "realisation"),
    [("onnxruntime", "baked"), ("onnxruntime", "table"), ("openvino", "baked"), ("openvino", "fused")],
)
def test_each_thread_gets_its_own_images(engine: str, realisation: str, tiny_history_bundle: Path) -> None:
    """At other seeds, counts and batch sizes, of graphs with history between their calls; and with ordinary conditioning."""
    arguments = [{"num": 1 + seed % 5, "seed": seed, "batch": 1 + seed % 3} for seed in range(AT_ONCE)]
    with opened(engine, tiny_history_bundle, realisation) as alone:
        expected = [alone(**one) for one in arguments]  # type: ignore[arg-type]
        conditioned = alone.conditioned(alone.plan, num=2, seed=9)
    with opened(engine, tiny_history_bundle, realisation) as shared:
        calls: list[Callable[[], Any]] = [lambda one=one: shared(**one) for one in arguments]  # type: ignore[misc]
        calls.append(lambda: shared.conditioned(shared.plan, num=2, seed=9))
        for found, right in zip(together(calls, times=8), [*expected, conditioned], strict=True):
            for images in found:
                np.testing.assert_allclose(images, right, atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_sizes_and_decoding(engine: str, pipeline_bundle: Path) -> None:
    """Sizes, prompts and the graphs that are opened when they are first wanted, all by threads at once."""
    sizes = [None, (16, 16), (8, 24)]
    arguments: list[dict[str, Any]] = [
        {"num": 1 + i % 2, "seed": i, "prompt": f"a dog number {i}", "size": sizes[i % 3]} for i in range(AT_ONCE)
    ]
    with opened(engine, pipeline_bundle) as alone:
        expected = [alone(**one) for one in arguments]
    with opened(engine, pipeline_bundle) as shared:
        for found, right in zip(together([lambda one=one: shared(**one) for one in arguments], 3), expected, strict=True):  # type: ignore[misc]
            for images in found:
                np.testing.assert_allclose(images, right, atol=1e-4)
        assert shared.decoding > 0


def test_streams_run_at_once(tiny_bundle: Path) -> None:
    """OpenVINO with two streams has two requests, used by more threads than that."""
    with opened("openvino", tiny_bundle, "fused", engine_options={"streams": 2}) as sampler:
        expected = [sampler(seed=seed) for seed in range(4)]
        for found, right in zip(together([lambda s=s: sampler(seed=s) for s in range(4)], 20), expected, strict=True):  # type: ignore[misc]
            for images in found:
                np.testing.assert_allclose(images, right, atol=2e-5)


@pytest.fixture(scope="module")
def both(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that is built in both engines."""
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    path = altered(tiny_bundle, tmp_path_factory.mktemp("both") / "bundle")
    for engine in ENGINES:
        build(path, engine=engine, realisation="baked", threads=2, seconds=0.1, quiet=True)
    return path


CLOSING = """
import sys, threading, time
from mteo_deploy import Sampler, MteoError
refused, wrong = [], []
def sample(sampler):
    try:
        for _ in range(100000): sampler(num=2)
    except MteoError as error: refused.append(str(error))
    except BaseException as error: wrong.append(repr(error))
for turn in range(4):
    sampler = Sampler.load(sys.argv[1], engine=sys.argv[2])
    threads = [threading.Thread(target=sample, args=(sampler,)) for _ in range(3)]
    [thread.start() for thread in threads]
    time.sleep(0.1 + 0.03 * turn)
    closers = [threading.Thread(target=sampler.close) for _ in range(2)]
    [closer.start() for closer in closers]
    sampler.close()
    [thread.join() for thread in threads + closers]
assert wrong == [] and len(refused) == 12, (wrong, refused)
assert all("one that was closed" in one for one in refused), refused
"""

FORKED = """
import os, sys
from mteo_deploy import Sampler, EngineError
sampler = Sampler.load(sys.argv[1], engine=sys.argv[2])
expected = sampler(num=1)
def use():
    try: sampler(num=1)
    except MteoError as error: assert "opened before it forked; load the sampler in the child" in str(error), error
    else: raise AssertionError("a forked sampler was used")
    sampler.close()
def load():
    with Sampler.load(sys.argv[1], engine=sys.argv[2]) as own: assert abs(own(num=1) - expected).max() == 0
def drop():
    global sampler
    del sampler
for what in (use, load, drop):
    child = os.fork()
    if not child:
        what()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0, what
assert (sampler(num=1) == expected).all()
""".replace("EngineError", "MteoError")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("code", [CLOSING, FORKED], ids=["closing", "forking"])
def test_closing_and_forking(code: str, engine: str, both: Path) -> None:
    """In a process of its own, which a mistake would kill or stop."""
    if code == FORKED and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    command = [sys.executable, "-c", code, str(both), engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_sampler_is_not_sent(send: Callable[[Any], Any], tiny_sampler: Sampler) -> None:
    with pytest.raises(InputError, match=r"expected the path of a bundle .*; run there: Sampler\.load\('"):
        send(tiny_sampler)


def test_so_many_and_no_more() -> None:
    made: list[object] = []
    inside, most = [], []

    def make() -> object:
        made.append(object())
        return made[-1]

    def use(thing: object) -> object:
        inside.append(thing)
        most.append(len(inside))
        assert len(set(inside)) == len(inside)
        time.sleep(0.002)
        inside.remove(thing)
        return thing

    turns = Turns(make, most=2)
    together([lambda: turns.run(use)] * 5, 20)
    assert (len(made), max(most), len(most)) == (2, 2, 100)


def test_closing_inside_of_a_call_is_refused() -> None:
    """As the handler of a signal may do, which the call would wait for, which waits for the call."""
    turns = Turns(object)
    with pytest.raises(EngineError, match=r"expected close\(\) outside of a call; found it inside of one"):
        turns.run(lambda _: turns.close())
    with pytest.raises(EngineError, match="one that was closed"):
        turns.run(lambda _: None)
    assert turns.close() and turns.close()


def test_a_call_inside_of_a_call() -> None:
    turns = Turns(object, most=1)
    outer, inner, after = turns.run(lambda thing: (thing, turns.run(lambda again: again), turns._used))
    assert outer is inner and not after and turns.run(lambda thing: thing) is outer


def test_an_interrupted_thread_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between entering and the call, and at the end of it: no later one waits for that thread."""
    turns = Turns(object, most=1)
    enter = Turns._enter

    def interrupted(self: Turns[object]) -> object:
        enter(self)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(Turns, "_enter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.run(lambda thing: thing)
    with ThreadPoolExecutor(1) as pool:  # another thread gets it
        assert pool.submit(turns.run, lambda thing: 1).result(timeout=30) == 1
    with monkeypatch.context() as patch:
        patch.setattr(Turns, "_enter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.run(lambda thing: thing)
    assert turns.run(lambda thing: 2) == 2  # the same thread too
    with monkeypatch.context() as patch:
        patch.setattr(Turns, "_enter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.run(lambda thing: thing)
    assert turns.close()
