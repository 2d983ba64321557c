"""What to compile: realisations, optional passes, batch size."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mteo_deploy.errors import InputError
from mteo_deploy.realisations import NAMES

OPTIONAL = ("absorb", "hoist")
"""Passes that may be left out; the others make the graph what it is."""


@dataclass(frozen=True)
class Options:
    """What to compile, and what to leave behind for people who debug.

    Attributes:
        realisations: which to write.
        passes: optional passes to run.
        batch: the only batch size of every graph; None leaves it open.
        dump_after: a pass after which each step graph is written to ``dump``.
    """

    realisations: Sequence[str] = NAMES
    passes: Collection[str] = OPTIONAL
    batch: int | None = None
    dump_after: str | None = None
    dump: Path | None = None

    def __post_init__(self) -> None:
        for what, found, known in (
            ("--realisation", self.realisations, NAMES),
            ("--passes", self.passes, OPTIONAL),
            ("--dump-after", [self.dump_after or "bind"], ("bind", "update", "absorb", "share")),
        ):
            for name in found:
                if name not in known:
                    raise InputError(f"expected {what} out of {', '.join(known)}; found {name!r}")
        if self.batch is not None and self.batch < 1:
            raise InputError(f"expected --batch of 1 or more, or dynamic; found {self.batch}")
        if not self.realisations:
            raise InputError(f"expected at least one --realisation out of {', '.join(NAMES)}; found none")
