"""Step graphs run while compiling: what each evaluation takes in on a trajectory, and what lies inside.

ONNX Runtime runs them as they are written, with no optimisation, so that any value of a graph can be looked at. Weights lie in
one file for all graphs, and are mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mteo_deploy.engines.onnxruntime import session_options
from mteo_deploy.errors import MissingPackageError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.emulate import emulate, has_bf16
from mteo_deploy.exporters.passes.share import Share, WeightFile
from mteo_deploy.exporters.steps import Steps
from mteo_deploy.files import Scratch
from mteo_deploy.sampler import noise_for

Values = Mapping[str, NDArray[Any]]
Run = Callable[[Values], dict[str, NDArray[Any]]]


def available() -> bool:
    """Whether graphs can be run here."""
    return find_spec("onnxruntime") is not None


class Graphs:
    """Graphs opened in ONNX Runtime, their files in a directory that goes with this object."""

    def __init__(self) -> None:
        if not available():
            raise MissingPackageError(
                "expected onnxruntime for this precision, whose scales are calibrated by running the graphs; found none; run: "
                "pip install 'mteo-deploy[cpu]', or take --precision fp16, bf16 or int4"
            )
        self._scratch = Scratch("mteo-deploy-precision-")
        self._directory = self._scratch.path
        self._weights = WeightFile(self._directory / "weights.bin")
        self._count = 0

    def open(self, model: ir.Model, inner: Sequence[str] = ()) -> Run:
        """The graph as a function: inputs by name (others are left out) to outputs by name.

        Args:
            inner: values inside the graph to give too.
        """
        import onnxruntime

        model = emulate(model) if has_bf16(model) else model.clone()
        known = {value.name: value for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]}
        there = {value.name for value in [*model.graph.outputs, *model.graph.inputs]}
        model.graph.outputs.extend(known[name] for name in inner if name not in there)
        Share(self._weights)(model)
        path = self._directory / f"graph_{self._count}.onnx"
        self._count += 1
        ir.save(model, path)
        options = session_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # a session of each evaluation is open at once: none keeps weights of its own beside the mapped ones, or an arena
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs, names = [v.name for v in session.get_inputs()], [v.name for v in session.get_outputs()]
        passed = [name for name in inner if name in inputs]

        def run(values: Values) -> dict[str, NDArray[Any]]:
            found = dict(zip(names, session.run(None, {name: values[name] for name in inputs}), strict=True))
            return found | {name: np.asarray(values[name]) for name in passed}

        return run


class Trajectories:
    """What each evaluation takes in, on trajectories of the float32 step graphs from noise of a seed.

    Attributes:
        feeds: per batch, per evaluation: input of its graph -> values.
        states: per batch: the state after each evaluation.
        requests: per batch: request inputs of the backbone.
    """

    def __init__(self, adapter: Adapter, steps: Steps, graphs: Graphs, count: int, seed: int) -> None:
        self.steps = steps
        size = steps.options.fixed_batch or min(count, 8)
        run_prelude = graphs.open(steps.prelude) if steps.prelude is not None else None
        runs = [graphs.open(model) for model in steps.baked]
        self.feeds: list[list[dict[str, NDArray[Any]]]] = []
        self.states: list[list[NDArray[np.float32]]] = []
        self.requests: list[dict[str, NDArray[Any]]] = []
        self._crossing: list[dict[str, NDArray[Any]]] = []
        for start in range(0, count, size):
            requests = {name: values.numpy() for name, values in adapter.draw_requests(size, seed + start).items()}
            self.requests.append(requests)
            self._crossing.append({**requests, **(run_prelude(requests) if run_prelude else {})})
            noise = noise_for(adapter.sample_shape, seed, range(start, start + size))
            self.feeds.append([])
            self.states.append(self.walk(runs, noise, self._crossing[-1], self.feeds[-1]))

    def walk(
        self,
        runs: Sequence[Run],
        noise: NDArray[np.float32],
        crossing: Values,
        feeds: list[dict[str, NDArray[Any]]] | None = None,
    ) -> list[NDArray[np.float32]]:
        """The states that step graphs make of noise.

        Args:
            crossing: request inputs and the prelude's outputs.
            feeds: to which what each evaluation takes in is appended.
        """
        state, history, states = noise * np.float32(self.steps.plan.initial_scale), list[NDArray[Any] | None](), []
        for i, run in enumerate(runs):
            given: dict[str, NDArray[Any]] = {"state": state, **crossing}
            given |= {f"history_{lag}": value for lag, value in enumerate(history, start=1) if value is not None}
            given |= {name: crossing[source] for name, source in self._sources(i).items()}
            if feeds is not None:
                feeds.append(given)
            outputs = run(given)
            state = outputs["next_state"]
            history.insert(0, outputs.get("kept"))
            states.append(state)
        return states

    def _sources(self, index: int) -> dict[str, str]:
        names = [value.name for value in self.steps.baked[index].graph.inputs]
        return self.steps.sources(index, {"inputs": names})

    def again(self, runs: Sequence[Run]) -> list[list[NDArray[np.float32]]]:
        """The states that other step graphs make of the same noise, per batch."""
        pairs = zip(self.feeds, self._crossing, strict=True)
        scale = np.float32(self.steps.plan.initial_scale)
        return [self.walk(runs, (feeds[0]["state"] / scale).astype(np.float32), crossing) for feeds, crossing in pairs]
