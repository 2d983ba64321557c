"""How many processors this process may use. Engines ask the machine how many it has, which in a container is another number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import inf
from pathlib import Path, PurePosixPath

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def processors() -> int:
    """Whole processors that this process may use, by its affinity and, on Linux, by the quotas of its control groups.

    A container's limit (``docker run --cpus``, a pod's ``limits.cpu``) is such a quota. A share of a processor is left out:
    with one thread more than the quota carries, all of them stand still for the rest of each period.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(int(quota) for quota in _quotas() if quota < inf)]))


def fewer_processors() -> int | None:
    """:func:`processors` where the machine has more; None where this process may use them all."""
    count = processors()
    return count if count < (os.cpu_count() or 1) else None


def in_words() -> str:
    """``64 processors``, or ``4 of 64 processors`` where this process may not use them all."""
    count = fewer_processors()
    return f"{os.cpu_count()} processors" if count is None else f"{count} of {os.cpu_count()} processors"


def _quotas() -> Iterator[float]:
    """Processors that each control group which this process is in, or one above it, may use at once."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CONTROL_GROUPS / "cpu" if controllers else CONTROL_GROUPS  # version 1 has a hierarchy for each controller
        # a container may be told its path outside, which it does not see: its own group is then the root
        group = root.joinpath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
        for directory in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            yield _quota(directory)


def _quota(group: Path) -> float:
    """Processors by the quota of one control group, version 2 or 1; infinity where it has none."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        return inf if quota == "max" or int(quota) < 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return inf
