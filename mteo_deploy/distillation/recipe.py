"""The recipe: what is learned, from what, and for how long. All of it is in the set's metadata and a checkpoint's key."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mteo_deploy import solvers
from mteo_deploy.errors import InputError
from mteo_deploy.plan import Plan, default_substeps

SHARES = ("none", "step", "time")
OBJECTIVES = ("end-to-end", "stepwise")
LOSSES = ("squared", "pseudo-huber", "absolute")
LEARNABLE = ("points", "coefficients")
WEIGHTS = ("fp32", "bf16")
PRECISIONS = ("fp32", "int8", "fp8")


@dataclass(frozen=True)
class Recipe:
    """Budget, objective and optimiser of a distillation.

    Attributes:
        trajectories: how many reference trajectories to learn from (a further 1/8 is held out for the report).
        iterations, batch, lr: Adam with cosine decay to zero and gradients clipped at norm 1.
        intermediate: weight of the loss on the time points before the last, end to end; None for 0.1, or 0 where the points
            are learned and the reference has no states at them.
        teacher: solver of the reference trajectory.
        teacher_evaluations: evaluations of the reference trajectory, at least, in a whole number of intervals inside each
            interval of the plan; None for about 36.
        bf16: run the backbone under bf16 autocast while training (the reference is always float32).
        weights: what the backbone's weights are while training: ``fp32``, or ``bf16``, half the memory; what is learned stays
            float32, and so do the reference and the errors in the report.
        checkpointing: keep nothing of what the backbone computes, and compute it again for the gradient: block by block, or,
            for networks that cannot, evaluation by evaluation.
        share: what is learned for an evaluation: ``none``, a vector for each site (MTEO); ``step``, one vector for all sites;
            ``time``, one number, the time at which the pretrained embedding is taken.
        objective: ``end-to-end``, the loss on the image through all evaluations; ``stepwise``, that of each step from the
            student's own state, through which no gradient goes.
        loss: ``pseudo-huber`` (Song & Dhariwal 2023, eq. 8), ``squared`` or ``absolute`` error. An image that ends elsewhere
            pulls with its distance in the first, with the square of it in the second; in the third every pixel pulls alike.
        feature_weight: weight of the same distance between features of the images, for ``distill(features=...)``.
        learn: numbers of the plan learned beside the embeddings, out of ``points`` (the time points between first and last)
            and ``coefficients`` (of the solver's updates, from half of the iterations on).
        precision: of the network that the embeddings are learned against: ``int8`` or ``fp8`` as ``export`` writes them, fake
            quantised (``exporters/fake_quantize.py``), or ``fp32``. The reference is float32's in any case.
        keep: layers that stay in float32 then, as patterns of their names.

    Raises:
        InputError: for a value out of range, or two that exclude each other.
    """

    trajectories: int = 1024
    iterations: int = 400
    batch: int = 64
    lr: float = 0.05
    intermediate: float | None = None
    teacher: str = "heun"
    teacher_evaluations: int | None = None
    seed: int = 1_000_000
    bf16: bool = False
    weights: str = "fp32"
    checkpointing: bool = False
    share: str = "none"
    objective: str = "end-to-end"
    loss: str = "pseudo-huber"
    feature_weight: float = 0.0
    learn: tuple[str, ...] = ()
    precision: str = "fp32"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.trajectories, self.iterations, self.batch) < 1:
            raise InputError("expected at least 1 trajectory, iteration and batch; see `mteo-deploy distill --help`")
        if not 0 < self.lr < math.inf:
            raise InputError(f"expected a learning rate above 0; found --lr {self.lr}")
        if self.teacher_evaluations is not None and self.teacher_evaluations < 1:
            raise InputError(f"expected --teacher-evaluations of 1 or more; found {self.teacher_evaluations}")
        if not (0 <= self.feature_weight < math.inf and 0 <= (self.intermediate or 0) < math.inf):
            raise InputError(f"expected weights of 0 or more; found {self.feature_weight} and {self.intermediate}")
        for option, found, known in (
            ("--share", [self.share], SHARES),
            ("--objective", [self.objective], OBJECTIVES),
            ("--loss", [self.loss], LOSSES),
            ("--learn", self.learn, LEARNABLE),
            ("--weights", [self.weights], WEIGHTS),
            ("--precision", [self.precision], PRECISIONS),
        ):
            if wrong := [name for name in found if name not in known]:
                raise InputError(f"expected {option} out of {', '.join(known)}; found {wrong[0]!r}")
        solvers.get(self.teacher)
        if self.weights != "fp32" and (self.share == "time" or "points" in self.learn):
            raise InputError(
                "expected --weights fp32 with --share time or --learn points, which need the pretrained embedding at other "
                f"times, in float32, as they learn; found {self.weights}; pass --bf16 for faster layers"
            )
        if self.keep and self.precision == "fp32":
            raise InputError("expected --keep with --precision int8 or fp8; found fp32; leave it out")
        if self.precision != "fp32" and (self.checkpointing or self.weights != "fp32"):
            raise InputError(
                f"expected --precision {self.precision} without --checkpointing and --weights bf16: the scales are an "
                "evaluation's own, and weights are rounded from float32; found one of them; leave it out"
            )
        self._check_points()

    def _check_points(self) -> None:
        """Where points move, or the objective has its own weights, there is nothing to weigh."""
        if "points" in self.learn and self.objective == "stepwise":
            raise InputError("expected --objective end-to-end with --learn points: the reference has no states at moved points")
        if self.intermediate and ("points" in self.learn or self.objective == "stepwise"):
            raise InputError(
                f"expected no weight of the intermediate states with --learn points or --objective stepwise; found "
                f"{self.intermediate}; leave it out"
            )

    @property
    def intermediate_weight(self) -> float:
        """Of the loss at a time point before the last, beside 1 for the last."""
        if self.objective == "stepwise":
            return 1.0
        default = 0.0 if "points" in self.learn else 0.1
        return default if self.intermediate is None else self.intermediate

    def substeps(self, plan: Plan) -> int:
        """Intervals of the reference inside each interval of the plan."""
        each = solvers.get(self.teacher).evaluations_per_interval
        wanted = 2 * default_substeps(plan) * plan.steps if self.teacher_evaluations is None else self.teacher_evaluations
        return -(-wanted // (each * plan.steps))


DEFAULT = Recipe()
