"""Progress bars on standard error: shown on a terminal, silent in pipes, scripts and tests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol


class Reporter(Protocol):
    """What long work reports to."""

    def task(self, description: str, total: int, done: int = 0) -> int: ...

    def advance(self, task: int, count: int = 1, note: str = "") -> None: ...


class Silent:
    """Reports to nobody."""

    def task(self, description: str, total: int, done: int = 0) -> int:
        return 0

    def advance(self, task: int, count: int = 1, note: str = "") -> None:
        return None


@contextlib.contextmanager
def reporter(quiet: bool = False) -> Iterator[Reporter]:
    """A reporter with rich progress bars, or a silent one."""
    if quiet or not sys.stderr.isatty():
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )

    class Bars:
        def task(self, description: str, total: int, done: int = 0) -> int:
            return int(bars.add_task(description, total=total, completed=done, note=""))

        def advance(self, task: int, count: int = 1, note: str = "") -> None:
            from rich.progress import TaskID

            bars.update(TaskID(task), advance=count, note=note)

    with bars:
        yield Bars()
