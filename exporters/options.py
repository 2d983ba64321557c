"""What to compile: realisations, optional passes, open axes and batch sizes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mteo_deploy import precision
from mteo_deploy.errors import InputError
from mteo_deploy.realisations import NAMES

OPTIONAL = ("absorb", "hoist")
"""Passes that may be left out; the others make the graph what it is."""
AXES = ("batch", "height", "width")
"""Axes of the state that a graph can leave open."""
SCALED = ("int8", "fp8")
"""Precisions whose activations have scales, constant in each evaluation's graph: engines have no kernels for others. So there
is no one graph for all evaluations, ``table``."""


@dataclass(frozen=True)
class Options:
    """What to compile, and what to leave behind for people who debug.

    Attributes:
        realisations: which to write.
        passes: optional passes to run.
        dynamic: the axes that stay open, out of :data:`AXES`.
        batch: batch sizes to make the graphs ready for; one, where the batch is not open: the only one of every graph.
        dump_after: a pass after which each step graph is written to ``dump``.
        precision: of the graphs, out of :data:`mteo_deploy.precision.NAMES`.
        keep: layers to leave in float32, as patterns of their names.
        calibration: images whose trajectories scales are chosen on.
        full_range: whether int8 weights use all of their range; half of it, without, is right on every processor.
        max_error: of the images against float32, to be met by leaving layers in float32; None for no limit.
        engine: in which the time that each layer saves is measured; None for operations in the place of time.
    """

    realisations: Sequence[str] = NAMES
    passes: Collection[str] = OPTIONAL
    dynamic: Collection[str] = ("batch",)
    batch: Sequence[int] = ()
    dump_after: str | None = None
    dump: Path | None = None
    precision: str = "fp32"
    keep: Sequence[str] = ()
    calibration: int = 16
    max_error: float | None = None
    full_range: bool = False
    engine: str | None = None

    def __post_init__(self) -> None:
        for what, found, known in (
            ("--realisation", self.realisations, NAMES),
            ("--passes", self.passes, OPTIONAL),
            ("--dynamic", self.dynamic, AXES),
            ("--precision", [self.precision], precision.NAMES),
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
        if self.calibration < 1:
            raise InputError(f"expected --calibration of 1 image or more; found {self.calibration}")
        if self.max_error is not None and (self.precision not in SCALED or self.max_error <= 0):
            raise InputError(
                f"expected --max-error above 0 with --precision {' or '.join(SCALED)}; found {self.max_error:g} with "
                f"{self.precision}"
            )
        if self.engine is not None and self.precision not in SCALED:
            raise InputError(
                f"expected --engine with --precision {', '.join(SCALED)} or auto, which measure in it; found {self.precision}; "
                "`build` takes the engine otherwise"
            )
        if self.full_range and self.precision != "int8":
            raise InputError(f"expected --full-range with --precision int8 only; found {self.precision}; leave it out")
        if self.keep and self.precision == "fp32":
            raise InputError("expected --keep with a --precision below fp32; found fp32; leave it out")
        if self.precision in SCALED and "table" in self.realisations:
            raise InputError(
                f"expected --realisation baked or fused with --precision {self.precision}, whose scales are constants of each "
                "evaluation's graph; found table; leave it out"
            )
        if not self.realisations:
            raise InputError(f"expected at least one --realisation out of {', '.join(NAMES)}; found none")

    @staticmethod
    def possible(precision: str) -> tuple[str, ...]:
        """Realisations that a precision has."""
        return tuple(name for name in NAMES if not (precision in SCALED and name == "table"))

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size of every graph; None where the batch is open."""
        return None if "batch" in self.dynamic else self.batch[0]
