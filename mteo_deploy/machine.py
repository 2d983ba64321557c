"""What the machine tells and can: memory of this process, energy of the processor, and how fast it multiplies and copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy.errors import EngineError

POWERCAP = Path("/sys/class/powercap")
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
MATRIX, COPIED = 1024, 256 << 20
"""Side of the matrices multiplied, and bytes copied: more than any cache holds."""


def private_bytes() -> int | None:
    """Private memory of this process, clean and dirty; None where the platform does not tell (Linux does)."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def peak_bytes() -> int | None:
    """The most memory that this process has had resident, mapped files included; None where the platform does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Watched:
    """What a process took.

    Attributes:
        status: what it ended with.
        processor: seconds of processor time, of all its threads, where the platform tells.
        peak: the most bytes that it had resident, mapped files included.
        anonymous: the most that it had of its own, which the system cannot drop and read again, as far as one looks.
    """

    status: int
    seconds: float
    processor: float
    peak: int
    anonymous: int


def watch(command: list[str], interval: float = 0.01) -> Watched:
    """Run a command and look at its memory (Linux, ``/proc/<pid>/status``); its output goes where ours does.

    Raises:
        EngineError: where the platform does not tell.
    """
    if not Path("/proc/self/status").exists():
        raise EngineError("expected Linux, which tells another process's memory; found another platform")
    clock, found = time.monotonic(), {"VmHWM": 0, "RssAnon": 0}
    process = subprocess.Popen(command)
    while True:
        for name, value in _memory(process.pid).items():
            found[name] = max(found[name], value)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            process.returncode = os.waitstatus_to_exitcode(status)
            processor = usage.ru_utime + usage.ru_stime
            return Watched(process.returncode, time.monotonic() - clock, processor, found["VmHWM"], found["RssAnon"])
        time.sleep(interval)


def _memory(pid: int) -> dict[str, int]:
    """``VmHWM`` and ``RssAnon`` of a process in bytes; none of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("VmHWM:", "RssAnon:")))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


@dataclass(frozen=True)
class EnergyCounter:
    """Counters of the processor packages' energy, in microjoules (Linux, ``powercap``, Intel's and AMD's RAPL).

    Attributes:
        zones: directory of each package's zone; a package's own parts (cores, graphics) are in its figure already.
        ranges: where each counter starts again at zero.
    """

    zones: tuple[Path, ...]
    ranges: tuple[int, ...]

    @classmethod
    def find(cls, root: Path = POWERCAP) -> EnergyCounter | None:
        """The counters of this machine; None where there are none that this user may read."""
        zones = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
        try:
            found = cls(tuple(zones), tuple(int((zone / "max_energy_range_uj").read_text()) for zone in zones))
            found.read()
        except (OSError, ValueError):
            return None
        return found if zones else None

    def read(self) -> tuple[int, ...]:
        return tuple(int((zone / "energy_uj").read_text()) for zone in self.zones)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Energy between two readings, during which each counter started again once at most."""
        steps = (b - a if b >= a else b - a + span + 1 for a, b, span in zip(before, after, self.ranges, strict=True))
        return sum(steps) / 1e6


@dataclass(frozen=True)
class Reach:
    """What this machine reaches with a number of threads.

    Attributes:
        flops: floating-point operations per second in a float32 matrix product.
        bytes: read and written per second in a copy that no cache holds.
    """

    threads: int
    flops: float
    bytes: float


def reach(threads: int, seconds: float = 0.5) -> Reach:
    """Measure :class:`Reach` in a process of its own: numpy's threads are set before it is loaded.

    Args:
        seconds: for each of the two.
    """
    code = "import sys; from mteo_deploy import machine; machine.print_reach(int(sys.argv[1]), float(sys.argv[2]))"
    return Reach(threads, **in_fresh_process(code, threads, seconds, **dict.fromkeys(BLAS_THREADS, str(threads))))


def in_fresh_process(code: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """Run Python code in a process of its own; the JSON object that its last line of output is.

    Raises:
        EngineError: when it fails, with the last line it said.
    """
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EngineError(f"a process to measure in ended early: {said[-1]}; run mteo-deploy sample to see whether it works")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_reach(threads: int, seconds: float) -> None:
    """In the process of :func:`reach`: the fastest run of each, as JSON."""
    a, b = (np.random.default_rng(i).standard_normal((MATRIX, MATRIX), dtype=np.float32) for i in range(2))
    product = np.empty_like(a)
    source = np.ones(COPIED // 4, np.float32)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        multiply = _shortest(lambda: np.matmul(a, b, out=product), seconds)
        copy = _shortest(lambda: list(pool.map(lambda part: np.copyto(*part), parts)), seconds)
    print(json.dumps({"flops": 2 * MATRIX**3 / multiply, "bytes": 2 * COPIED / copy}))


def _shortest(function: Callable[[], object], seconds: float) -> float:
    """Seconds of the shortest of at least three runs: what is reached, not what is usual."""
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best
