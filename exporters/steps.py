"""The step graphs of a plan: what depends on the time is evaluated, what depends on requests goes to the prelude.

The part of the generic graph that depends on embeddings and constants alone (time projections, modulation) is split off, as a
graph of its own: evaluated on an evaluation's embeddings it gives the few vectors that the rest takes in. So each further
evaluation costs a copy of the graph's structure, these vectors, and the passes that put them in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from mteo_deploy.exporters.branches import cross_by_image
from mteo_deploy.exporters.evaluate import evaluate
from mteo_deploy.exporters.options import Options
from mteo_deploy.exporters.pack import pack
from mteo_deploy.exporters.passes.absorb import Absorb
from mteo_deploy.exporters.passes.batch_gemms import BatchGemms
from mteo_deploy.exporters.passes.bind import Bind
from mteo_deploy.exporters.passes.binding_time import BindingTime, binding_times
from mteo_deploy.exporters.passes.fold import Fold
from mteo_deploy.exporters.passes.hoist import Hoist
from mteo_deploy.exporters.passes.runner import PassReport, run_passes
from mteo_deploy.exporters.passes.share import Share, WeightFile
from mteo_deploy.exporters.passes.update import Update, keeps
from mteo_deploy.exporters.passes.views import Views
from mteo_deploy.exporters.preludes import join_preludes, merge_outputs
from mteo_deploy.exporters.trace import embedding_input
from mteo_deploy.plan import Plan

Array = NDArray[np.float32]
HOISTED = "request/"
"""How the inputs that a step graph takes from the prelude begin."""


class Steps:
    """The step graphs of a plan, made when first asked for: ``baked``, and ``alike``, which differ in constants only.

    Attributes:
        size: a height and width that the network takes, to compare numbers at where they are open.
        branches: rows of the network's batch for each image of a request.
        prelude: the request-time part of all of them, ``requests -> step_<ii>/request/<layer> ...``; None when none.
    """

    def __init__(
        self,
        generic: ir.Model,
        plan: Plan,
        embeddings: Callable[[int], Mapping[str, Array]],
        options: Options,
        requests: Sequence[str] = (),
        size: tuple[int, ...] = (2, 2),
        branches: int = 1,
    ) -> None:
        self.template, self.plan, self.options, self.size, self.branches = generic, plan, options, size, branches
        run_passes(generic, [Fold(), Views()])
        names = [value.name or "" for value in generic.graph.inputs[1:] if value.name not in requests]
        self.embeddings, self.time_part = names, split_time_part(generic, names)
        self.hoisted: dict[str, str] = {}
        self.values = [self._evaluate(embeddings(i)) for i in range(len(plan.evaluations))]
        self.prelude: ir.Model | None = None
        self.prelude_passes: list[PassReport] = []
        self._renamed: dict[str, str] = {}
        if requests and "hoist" in options.passes:
            self._hoist(requests)
        self.fates: dict[str, dict[str, str]] = {}
        self._made: dict[bool, tuple[list[ir.Model], list[list[PassReport]]]] = {}

    def _hoist(self, requests: Sequence[str]) -> None:
        """Cut the prelude off the template, once; bind it to each evaluation and join what comes out."""
        known = [value.name or "" for value in self.template.graph.inputs if value.name in {*requests, *self.values[0]}]
        hoist = Hoist(known)
        run_passes(self.template, [hoist])
        if hoist.prelude is None:
            return
        met = meets(hoist.prelude, requests)
        self.hoisted = {
            name: f"hoisted: meets {', '.join(met[name])} before its layer" for name in met if name in self.values[0]
        }
        bound = []
        for values in self.values:
            part = hoist.prelude.clone()
            Bind(values)(part)
            bound.append(part)
        self.prelude = join_preludes(bound)
        self._renamed = merge_outputs(self.prelude)
        pack(self.template, self.prelude, self._crossing(), self.branches)
        if self.branches > 1:
            cross_by_image(self.template, self.prelude, self._crossing(), self.branches)
        self.prelude_passes = run_passes(self.prelude, [BatchGemms()], random_feeds(self.prelude))

    def _crossing(self) -> list[dict[str, str]]:
        """Per evaluation, each of the template's hoisted inputs -> output of the prelude."""
        names = [value.name for value in self.template.graph.inputs if (value.name or "").startswith(HOISTED)]
        return [self.sources(i, {"inputs": names}) for i in range(len(self.values))]

    def sources(self, index: int, entry: Mapping[str, Any]) -> dict[str, str]:
        """Which output of the prelude each of a step graph's inputs takes at evaluation ``index``."""
        inputs = [name for name in entry["inputs"] if name.startswith(HOISTED)]
        outputs = {name: f"step_{index:02}/{name}" for name in inputs}
        return {name: self._renamed.get(output, output) for name, output in outputs.items()}

    def from_prelude(self, index: int, model: ir.Model) -> ir.Model:
        """The step graph with its hoisted inputs named as the prelude names them."""
        if self.prelude is None:
            return model
        model = model.clone()
        sources = self.sources(index, {"inputs": [value.name for value in model.graph.inputs]})
        for value in model.graph.inputs:
            value.name = sources.get(value.name or "", value.name)
        return model

    def _evaluate(self, embeddings: Mapping[str, Array]) -> dict[str, Array]:
        """What the network takes in of one evaluation's embeddings: input of the template -> constant."""
        feeds = {embedding_input(site): value for site, value in embeddings.items()}
        taken = {value.name for value in self.template.graph.inputs}
        values = {name: value for name, value in feeds.items() if name in taken}
        if self.time_part is not None:
            outputs = evaluate(self.time_part, feeds, reference=True)
            assert outputs is not None  # the reference evaluator takes every model
            values |= {value.name or "": o for value, o in zip(self.time_part.graph.outputs, outputs, strict=True)}
        return values

    @property
    def baked(self) -> list[ir.Model]:
        return self._steps(alike=False)[0]

    @property
    def baked_passes(self) -> list[list[PassReport]]:
        return self._steps(alike=False)[1]

    @property
    def alike(self) -> list[ir.Model]:
        return self._steps(alike=True)[0]

    @property
    def alike_passes(self) -> list[list[PassReport]]:
        return self._steps(alike=True)[1]

    def _steps(self, alike: bool) -> tuple[list[ir.Model], list[list[PassReport]]]:
        if alike not in self._made:
            made = [self._step(i, alike) for i in range(len(self.plan.evaluations))]
            self._made[alike] = [model for model, _ in made], [passes for _, passes in made]
        return self._made[alike]

    def _step(self, index: int, alike: bool) -> tuple[ir.Model, list[PassReport]]:
        """Evaluation ``index``. Each pass is checked, numbers too, on the first one: the others differ in constants."""
        rows = self.plan.evaluations
        keep = any(keeps(rows, i) for i in range(len(rows))) if alike else keeps(rows, index)
        model = self.template.clone()
        passes: list[ir.passes.InPlacePass] = [Bind(self.values[index]), Update(rows[index], keep, rows if alike else ())]
        if "absorb" in self.options.passes:
            absorb = Absorb(linear=not alike, copy_share=1.0 if len(rows) == 1 else 1e-3)
            passes.append(absorb)
        first = index == 0
        reports = run_passes(model, passes, self._feeds(model) if first else None, self._dump(index, alike), each=first)
        if first:
            found = {name: fate.detail for name, fate in absorb.fates.items()} if "absorb" in self.options.passes else {}
            self.fates["table" if alike else "baked"] = found
        return model, reports

    def _feeds(self, model: ir.Model) -> dict[str, NDArray[Any]]:
        """Random values for state, requests and history, batch 2, beside the first evaluation's constants."""
        feeds = random_feeds(model, self.size) | self.values[0]
        history = {f"history_{lag}": feeds["state"][::-1].copy() for lag in range(1, self.plan.history + 1)}
        return feeds | history

    def _dump(self, index: int, alike: bool) -> Callable[[str, ir.Model], object] | None:
        target, after = self.options.dump, self.options.dump_after
        if target is None or after is None:
            return None

        def dump(name: str, model: ir.Model) -> None:
            if name == after:
                target.mkdir(parents=True, exist_ok=True)
                graph = f"{'table' if alike else 'step'}_{index:02}"
                copy = model.clone()
                Share(WeightFile(target / f"{graph}.bin"))(copy)
                ir.save(copy, target / f"{graph}.onnx")

        return dump

    def site_report(self) -> list[dict[str, Any]]:
        """Per site: the constants it became, and where each of them is, per realisation."""
        taken = set(self.values[0])
        report = []
        for site, names in sites_of(self.time_part, self.embeddings).items():
            places = {
                name: {kind: self.hoisted.get(name, fates.get(name, "stays an operand")) for kind, fates in self.fates.items()}
                for name in names
                if name in taken
            }
            report.append({"site": site, "constants": places})
        return report


def random_feeds(model: ir.Model, size: tuple[int, ...] = ()) -> dict[str, NDArray[Any]]:
    """A value for every input: standard normal floats, integers of zero, masks that hide nothing.

    Args:
        size: for the third and fourth dimension where they are open; every other open dimension is 2.
    """
    opened = (2, 2, *size)
    generator, feeds = np.random.default_rng(0), {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else opened[axis] for axis, d in enumerate(value.shape or ())]
        if value.dtype == ir.DataType.FLOAT:
            feeds[value.name or ""] = generator.standard_normal(shape, np.float32)
        else:
            mask = value.dtype == ir.DataType.BOOL
            feeds[value.name or ""] = np.ones(shape, np.bool_) if mask else np.zeros(shape, np.int64)
    return feeds


def split_time_part(generic: ir.Model, names: Sequence[str]) -> ir.Model | None:
    """Take out of ``generic``, in place, what depends on the inputs ``names`` and constants alone.

    Returns:
        the time part: ``names -> constants``; ``generic`` takes its outputs, and those of ``names`` that meet something
        else at once, instead of ``names``. None when all of them do.
    """
    graph = generic.graph
    inputs = [value for value in graph.inputs if value.name in names]
    frontier = _frontier(generic, names)
    computed = [value for value in frontier if value not in inputs]
    cut = ir.convenience.extract(graph, inputs, computed) if computed else None
    for value in computed:
        taken = ir.Value(name=value.name, type=value.type, shape=value.shape)
        value.replace_all_uses_with(taken)
        value.name = f"{value.name}/before"
        graph.inputs.append(taken)
    common.RemoveUnusedNodesPass()(generic)
    for value in inputs:
        if value not in frontier:
            graph.inputs.remove(value)
    return None if cut is None else ir.Model(cut, ir_version=generic.ir_version)


def _frontier(model: ir.Model, names: Sequence[str]) -> list[ir.Value]:
    """Values known with the inputs ``names`` (and constants) that a node known later reads, in the graph's order."""
    times = binding_times(model, names)
    late = [node for node in model.graph if any(times[output] == BindingTime.STEP for output in node.outputs)]
    read = (value for node in late for value in node.inputs)
    return list(dict.fromkeys(v for v in read if v is not None and times[v] == BindingTime.REQUEST))


def sites_of(time_part: ir.Model | None, embeddings: Collection[str]) -> dict[str, list[str]]:
    """Site -> the constants that depend on it: outputs of the time part, or the embedding itself."""
    reach: dict[str, set[str]] = {name: {name} for name in embeddings}
    outputs = set(embeddings)
    if time_part is not None:
        reach |= _reach(time_part, embeddings)
        outputs |= {value.name or "" for value in time_part.graph.outputs}
    prefix = embedding_input("")
    return {name.removeprefix(prefix): [o for o in reach if o in outputs and name in reach[o]] for name in embeddings}


def meets(prelude: ir.Model, requests: Sequence[str]) -> dict[str, list[str]]:
    """Input of the prelude that is no request -> the request inputs that something it decides depends on too."""
    names = [value.name or "" for value in prelude.graph.inputs]
    reach = _reach(prelude, names)
    together = [reach[value.name or ""] for value in prelude.graph.outputs]
    met = {name: set().union(*(inputs for inputs in together if name in inputs)) for name in names if name not in requests}
    return {name: [request for request in requests if request in inputs] for name, inputs in met.items()}


def _reach(model: ir.Model, names: Collection[str]) -> dict[str, set[str]]:
    """Name of a value -> which of the inputs ``names`` it depends on."""
    reach: dict[str, set[str]] = {name: {name} for name in names}
    for node in model.graph:
        found = set().union(*(reach.get(v.name or "", set()) for v in node.inputs if v is not None))
        reach |= {output.name or "": found for output in node.outputs}
    return reach
