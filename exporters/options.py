"""What to compile: realisations, optional passes, open axes and batch sizes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mteo_deploy.errors import InputError
from mteo_deploy.realisations import NAMES

OPTIONAL = ("absorb", "hoist")
"""Passes that may be left out; the others make the graph what it is."""
AXES = ("batch", "height", "width")
"""Axes of the state that a graph can leave open."""


@dataclass(frozen=True)
class Options:
    """What to compile, and what to leave behind for people who debug.

    Attributes:
        realisations: which to write.
        passes: optional passes to run.
        dynamic: the axes that stay open, out of :data:`AXES`.
        batch: batch sizes to make the graphs ready for; one, where the batch is not open: the only one of every graph.
        dump_after: a pass after which each step graph is written to ``dump``.
    """

    realisations: Sequence[str] = NAMES
    passes: Collection[str] = OPTIONAL
    dynamic: Collection[str] = ("batch",)
    batch: Sequence[int] = ()
    dump_after: str | None = None
    dump: Path | None = None

    def __post_init__(self) -> None:
        for what, found, known in (
            ("--realisation", self.realisations, NAMES),
            ("--passes", self.passes, OPTIONAL),
            ("--dynamic", self.dynamic, AXES),
            ("--dump-after", [self.dump_after or "bind"], ("bind", "update", "absorb", "share")),
        ):
            for name in found:
                if name not in known:
                    raise InputError(f"expected {what} out of {', '.join(known)}; found {name!r}")
        if any(size < 1 for size in self.batch):
            raise InputError(f"expected --batch of 1 or more; found {', '.join(map(str, self.batch))}")
        if "batch" not in self.dynamic and len(self.batch) != 1:
            raise InputError(
                f"expected one size with --batch for graphs whose batch is not open; found {len(self.batch)}; pass one, or add "
                "batch to --dynamic"
            )
        if not self.realisations:
            raise InputError(f"expected at least one --realisation out of {', '.join(NAMES)}; found none")

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size of every graph; None where the batch is open."""
        return None if "batch" in self.dynamic else self.batch[0]
