"""Lowering: the graphs of a bundle in the precision asked for, and what that costs in error.

The step graphs are made in float32 first. fp16, bf16 and int4 follow from the graphs alone. int8 and fp8 have scales for what
layers take in, calibrated on trajectories of the float32 graphs from noise of their own seed; every evaluation has its own
scales, and the report says what one scale for all of them would have cost. The graph with ordinary time conditioning has the
same precision, its scales pooled over all evaluations: it is one graph, and has no other choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mteo_deploy.errors import InputError
from mteo_deploy.exporters import calibration
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.calibration import Sample, Scale
from mteo_deploy.exporters.options import Options
from mteo_deploy.exporters.passes.binding_time import BindingTime, binding_times
from mteo_deploy.exporters.passes.layers import layers_of
from mteo_deploy.exporters.passes.precision import Precision
from mteo_deploy.exporters.passes.quantize import FORMATS, Array, Quantize, declined, format_of
from mteo_deploy.exporters.passes.runner import PassReport, run_passes
from mteo_deploy.exporters.passes.shapes import infer_shapes
from mteo_deploy.exporters.running import Graphs, Run, Trajectories, Values, available
from mteo_deploy.exporters.search import search
from mteo_deploy.exporters.sensitivity import Sensitivity, Switchboard, relative, sensitivity, state_error, work_shares
from mteo_deploy.exporters.steps import Steps
from mteo_deploy.exporters.timing import Kind, time_saved

CALIBRATION_SEED, CHECK_SEED, CHECK_COUNT = 10_000, 20_000, 16
"""Noise that scales are chosen on, and noise that errors are told of: neither is the stored reference's."""


class Lowering:
    """Graphs in float32: nothing is done to them. The other precisions are subclasses.

    Attributes:
        conditioned_errors: of the graph with ordinary time conditioning, where its scales are pooled: by evaluation.
    """

    def __init__(self, adapter: Adapter, steps: Steps, options: Options) -> None:
        self.adapter, self.steps, self.options = adapter, steps, options
        self.conditioned_errors: list[float] = []

    def baked(self) -> tuple[list[ir.Model], list[list[PassReport]]]:
        """The step graphs of ``baked`` and ``fused``, and the passes they went through."""
        return self.steps.baked, self.steps.baked_passes

    def other(self, model: ir.Model) -> list[PassReport]:
        """Lower, in place, a graph of another kind: ``table``, the prelude."""
        return []

    def conditioned(self, model: ir.Model) -> list[PassReport]:
        """Lower, in place, the graph with ordinary time conditioning."""
        return self.other(model)

    def report(self) -> dict[str, Any]:
        """What was done and what it costs; empty in float32."""
        return {}


class _Lowered(Lowering):
    """What the lower precisions have in common: lowered copies of the step graphs, and their errors."""

    def __init__(self, adapter: Adapter, steps: Steps, options: Options) -> None:
        super().__init__(adapter, steps, options)
        self._passes: list[ir.passes.InPlacePass] = []
        self._models: list[ir.Model] = []
        self._reports: list[list[PassReport]] = []

    def one(self, index: int | None) -> ir.passes.InPlacePass:
        """The pass that lowers evaluation ``index``, or another graph."""
        raise NotImplementedError

    def feeds(self, index: int) -> Values | None:
        """Values to compare a step graph's outputs on, before and after."""
        return None

    def baked(self) -> tuple[list[ir.Model], list[list[PassReport]]]:
        if not self._models:
            for i, (exact, before) in enumerate(zip(self.steps.baked, self.steps.baked_passes, strict=True)):
                model, one = exact.clone(), self.one(i)
                reports = run_passes(model, [one], self.feeds(i) if i == 0 else None)
                self._models.append(model)
                self._passes.append(one)
                self._reports.append(before + reports)
        return self._models, self._reports

    def other(self, model: ir.Model) -> list[PassReport]:
        return run_passes(model, [self.one(None)])

    def errors(self, held: Trajectories, graphs: Graphs) -> dict[str, Any]:
        """Relative errors of each evaluation alone, and of the images, against float32."""
        runs = [graphs.open(model) for model in self.baked()[0]]
        errors = [state_error(run, held, i) for i, run in enumerate(runs)]
        return _errors(errors, runs, held)


def _errors(evaluations: list[float], runs: Sequence[Run], held: Trajectories) -> dict[str, Any]:
    """Errors of evaluations and of whole trajectories: of all images together, and of the median image.

    The first is dominated by the few images that a small difference sends elsewhere; the second says what is typical.
    """
    pairs = _images(runs, held)
    return {
        "evaluations": evaluations,
        "worst": int(np.argmax(evaluations)),
        "images": relative([found for found, _ in pairs], [exact for _, exact in pairs]),
        "median_image": _median(pairs),
    }


def median_error(runs: Sequence[Run], held: Trajectories) -> float:
    """Relative error of the median image of whole trajectories."""
    return _median(_images(runs, held))


def _images(runs: Sequence[Run], held: Trajectories) -> list[tuple[Array, Array]]:
    return [(states[-1], exact[-1]) for states, exact in zip(held.again(runs), held.states, strict=True)]


def _median(pairs: Sequence[tuple[Array, Array]]) -> float:
    return float(np.median([relative([a], [b]) for found, exact in pairs for a, b in zip(found, exact, strict=True)]))


class _WithoutScales(_Lowered):
    """fp16, bf16, int4: a graph is lowered by itself."""

    def __init__(self, adapter: Adapter, steps: Steps, options: Options) -> None:
        super().__init__(adapter, steps, options)
        self._shared: Any = {}
        self._held: tuple[Trajectories, Graphs] | None = None
        if available():
            graphs = Graphs()
            self._held = Trajectories(adapter, steps, graphs, CHECK_COUNT, CHECK_SEED), graphs

    def one(self, index: int | None) -> Precision | Quantize:
        name, keep = self.options.precision, self.options.keep
        if name in FORMATS:
            return Quantize(format_of(name), keep=keep, stored=self._shared)
        return Precision(name, keep, self._shared)

    def feeds(self, index: int) -> Values | None:
        return self._held[0].feeds[0][index] if self._held else None

    def report(self) -> dict[str, Any]:
        self.baked()
        first = self._passes[0]
        found: dict[str, Any] = {"name": self.options.precision}
        if isinstance(first, Precision):
            found |= {"float32": dict(Counter(first.kept.values()))}
        elif isinstance(first, Quantize):
            _check_some(first.layers, self.options.precision)
            found |= {"layers": first.layers}
        return found | ({"errors": self.errors(*self._held)} if self._held else {})


class Calibrated(_Lowered):
    """int8, fp8: scales for what layers take in, by evaluation."""

    def __init__(self, adapter: Adapter, steps: Steps, options: Options) -> None:
        super().__init__(adapter, steps, options)
        self.form, self.graphs = format_of(options.precision, options.full_range), Graphs()
        self.calibrated = Trajectories(adapter, steps, self.graphs, options.calibration, CALIBRATION_SEED)
        self.held = Trajectories(adapter, steps, self.graphs, CHECK_COUNT, CHECK_SEED)
        self._stored: Any = {}
        samples = [self._sample(i) for i in range(len(steps.baked))]
        self.pooled = calibration.scales(calibration.pool(samples), self.form)
        self.scales = [calibration.scales(one, self.form, self.pooled) for one in samples]
        self.boards = [
            Switchboard(model, self.form, values_of(scales), self.graphs, self._stored)
            for model, scales in zip(steps.baked, self.scales, strict=True)
        ]
        self.sensitivity = self._sensitivity()
        self.loud = [] if options.keep else self.sensitivity.loud()
        self.slow = self._slow()
        self.off = self._off()

    def _sensitivity(self) -> Sensitivity:
        model, engine, kinds = self.steps.baked[0], self.options.engine, list[Kind]()
        if engine is not None:
            scales = values_of(self.scales[0])
            kinds = time_saved(model, self.form, scales, self.options.keep, engine, self.feeds(0), self.options.batch)
        return sensitivity(self.boards, self.held, work_shares(model, self.form), kinds)

    def _slow(self) -> list[str]:
        """Layers that the engine computes faster in float32; some must be left that it does not."""
        slow, kinds = self.sensitivity.slow(), self.sensitivity.kinds
        if kinds and not {layer for kind in kinds for layer in kind.layers} - {*slow, *self.loud}:
            raise InputError(
                f"expected layers that {self.options.engine} computes faster in {self.options.precision} than in float32; "
                "found none; take another --precision, or --engine"
            )
        return slow

    def _off(self) -> list[list[str]]:
        """By evaluation: layers that are left in float32 to meet the limit on the error."""
        if self.options.max_error is None:
            return [[] for _ in self.boards]

        def error(on: Sequence[Collection[str]]) -> float:
            return median_error([board.as_run(layers) for board, layers in zip(self.boards, on, strict=True)], self.held)

        on = search(self.sensitivity, [*self.loud, *self.slow], self.options.max_error, error)
        return [[name for name in board.layers if name not in layers] for board, layers in zip(self.boards, on, strict=True)]

    def _sample(self, index: int) -> dict[str, Sample]:
        model = self.steps.baked[index]
        names = self._inputs(model)
        run = self.graphs.open(model, names)
        outputs = (run(feeds[index]) for feeds in self.calibrated.feeds)
        return calibration.gather({name: found[name] for name in names} for found in outputs)

    def _inputs(self, model: ir.Model) -> list[str]:
        """Names of what layers take in that can be quantised."""
        infer_shapes(model)
        found = [layer for layer in layers_of(model.graph) if declined(layer, self.form, self.options.keep) is None]
        return list(dict.fromkeys(layer.activation.name or "" for layer in found))

    def one(self, index: int | None) -> Quantize:
        scales = values_of(self.scales[index]) if index is not None else {}
        off = self.off[index] if index is not None else []
        return Quantize(self.form, scales, [*self.options.keep, *self.loud, *self.slow, *off], self._stored)

    def feeds(self, index: int) -> Values:
        return self.calibrated.feeds[0][index]

    def conditioned(self, model: ir.Model) -> list[PassReport]:
        """One graph for every evaluation: pooled scales, and the error that comes with them is told, not limited.

        What depends on the time alone, a row for each image at most, is quantised in its weights only.
        """
        infer_shapes(model)
        state = model.graph.inputs[0].name
        times = binding_times(model, [value.name or "" for value in model.graph.inputs if value.name != state])
        at_steps = {value.name for value, time in times.items() if time == BindingTime.STEP}
        names = [name for name in self._inputs(model) if name in at_steps or name == state]
        exact, timesteps = self.graphs.open(model, names), [e.timestep for e in self.steps.plan.evaluations]
        given = [
            {"state": values["state"], "timestep": np.array([timestep], np.float32), **requests}
            for feeds, requests in zip(self.calibrated.feeds, self.calibrated.requests, strict=True)
            for values, timestep in zip(feeds, timesteps, strict=True)
        ]
        samples = calibration.gather({name: found[name] for name in names} for found in map(exact, given))
        keep, scales = [*self.options.keep, *self.loud, *self.slow], values_of(calibration.scales(samples, self.form))
        reports = run_passes(model, [Quantize(self.form, scales, keep, self._stored)])
        low, output = self.graphs.open(model), model.graph.outputs[0].name or ""
        self.conditioned_errors = [
            relative([low(one)[output]], [exact(one)[output]])
            for one in given[: len(timesteps)]  # of the first batch
        ]
        return reports

    def report(self) -> dict[str, Any]:
        self.baked()
        layers = [one.layers for one in self._passes if isinstance(one, Quantize)]
        _check_some(
            {f"{name} at {i}": what for i, one in enumerate(layers) for name, what in one.items()}, self.options.precision
        )
        on = [[name for name, what in one.items() if what.startswith("weight")] for one in layers]
        pairs = zip(self.boards, on, strict=True)
        one_scale = [board.as_run(names, values_of(self.pooled)) for board, names in pairs]
        pooled = _errors([state_error(run, self.held, i) for i, run in enumerate(one_scale)], one_scale, self.held)
        return {
            "name": self.options.precision,
            "largest_weight": self.form.largest_weight,
            "calibration": {"images": len(self.calibrated.feeds) * len(self.calibrated.feeds[0][0]["state"])},
            "errors": self.errors(self.held, self.graphs),
            "pooled": pooled,
            "methods": dict(Counter(scale.method for scales in self.scales for scale in scales.values())),
            "layers": layers[0]
            | dict.fromkeys(self.slow, f"left in float32: faster so in {self.options.engine}")
            | dict.fromkeys(self.loud, "left in float32: loud and cheap"),
            "engine": self.options.engine,
            "kinds": [kind.to_json() for kind in self.sensitivity.kinds],
            "max_error": self.options.max_error,
            "left_in_float32": self.off,
            "sensitivity": _table(self.sensitivity),
        }


def _table(found: Sensitivity) -> list[dict[str, Any]]:
    return [
        {"layer": name, "errors": errors, "work": sum(found.work.get(layer, 0.0) for layer in found.groups[name])}
        for name, errors in found.errors.items()
    ]


def values_of(scales: Mapping[str, Scale]) -> dict[str, float]:
    return {name: scale.value for name, scale in scales.items()}


def _check_some(layers: Mapping[str, str], name: str) -> None:
    """A bundle that is called ``name`` has layers of that precision."""
    if not any(what.startswith("weight") for what in layers.values()):
        raise nothing_quantised(layers, name)


def nothing_quantised(layers: Mapping[str, str], name: str) -> InputError:
    """The error for a backbone of whose layers, name -> why not, none can be in a precision."""
    reasons = ", ".join(f"{count}: {what}" for what, count in Counter(layers.values()).items())
    return InputError(
        f"expected layers that can be stored in {name}; found none ({reasons}); take another --precision, or fewer --keep"
    )


def lowering(adapter: Adapter, steps: Steps, options: Options) -> Lowering:
    """What lowers the graphs of a bundle to the precision of ``options``.

    Raises:
        MissingPackageError: for a precision with scales where ONNX Runtime is missing.
    """
    if options.precision == "fp32":
        return Lowering(adapter, steps, options)
    form = FORMATS.get(options.precision)
    return (Calibrated if form is not None and form.activations else _WithoutScales)(adapter, steps, options)
