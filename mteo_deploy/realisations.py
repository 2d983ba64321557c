"""Realisations: how the N evaluations of a plan become engine calls.

``baked`` opens one graph per evaluation, ``table`` one graph for all of them, ``fused`` one graph that holds the loop.
All come from the same step graphs and give the same images within rounding; which is fastest depends on engine, machine
and backbone, so ``build`` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.base import OpenGraph
from mteo_deploy.engines.device import Value, Values, device_of
from mteo_deploy.errors import EngineError

PREFIX = "history_"


class Loop(Protocol):
    """A realisation opened in an engine. States are ``[batch, ...]``, at unit variance, and stay where the first one lies."""

    name: str

    def states(self, state: Value, request: Values) -> list[Value]:
        """The state after each evaluation, from the first state; the last one is the image.

        Args:
            request: request inputs and the prelude's outputs, by name.
        """

    def calls(self, state: Value, request: Values) -> Value:
        """The engine calls of one loop and nothing else, all on the same state: what the loop costs at least; the last's."""


class Stepwise:
    """A realisation that runs one evaluation per engine call."""

    name: str

    def __init__(self, evaluations: int, history: int) -> None:
        self.evaluations, self.history = evaluations, history

    def step(self, index: int, state: Value, history: Sequence[Value], request: Values) -> tuple[Value, Value | None]:
        """Evaluation ``index``: ``(next state, kept quantity or None)``; ``history`` is newest first, an entry for each."""
        raise NotImplementedError

    def states(self, state: Value, request: Values, count: int | None = None) -> list[Value]:
        """As :meth:`Loop.states`; of the first ``count`` evaluations only, where that is given."""
        history: list[Value] = []
        states = []
        for i in range(self.evaluations if count is None else count):
            state, kept = self.step(i, state, history, request)
            history.insert(0, state if kept is None else kept)  # a lag counts evaluations, also those that nothing is kept of
            del history[self.history :]
            states.append(state)
        return states

    def calls(self, state: Value, request: Values) -> Value:
        history = [state] * self.history
        return [self.step(i, state, history, request)[0] for i in range(self.evaluations)][-1]


class Prelude:
    """What runs once per request; nothing, in a bundle whose compiler hoisted nothing."""

    def __init__(self, bundle: Bundle, open_graph: OpenGraph) -> None:
        self._entry: dict[str, Any] = bundle.manifest.get("prelude") or {}
        self._session = open_graph(self._entry["graph"]) if self._entry else None

    def __call__(self, requests: Values) -> dict[str, Value]:
        """Request inputs and what depends on them alone, by name."""
        if self._session is None:
            return dict(requests)
        outputs = self._session.run({name: requests[name] for name in self._entry["inputs"]})
        return {**requests, **dict(zip(self._entry["outputs"], outputs, strict=True))}


class Baked(Stepwise):
    """One graph per evaluation, all constants inside."""

    name = "baked"

    def __init__(self, bundle: Bundle, open_graph: OpenGraph) -> None:
        entries = bundle.step_graphs
        super().__init__(len(entries), bundle.plan.history)
        self.sessions = [open_graph(entry["graph"]) for entry in entries]
        self._lags = [_lags(entry) for entry in entries]
        self._sources = [_sources(bundle, entry, entry.get("requests", {})) for entry in entries]

    def step(self, index: int, state: Value, history: Sequence[Value], request: Values) -> tuple[Value, Value | None]:
        feeds: dict[str, Value] = {"state": state}
        feeds |= {name: history[lag - 1] for name, lag in self._lags[index].items()}
        feeds |= {name: request[source] for name, source in self._sources[index].items()}
        next_state, *kept = self.sessions[index].run(feeds)
        return next_state, kept[0] if kept else None


class Table(Stepwise):
    """One graph for every evaluation; row ``i`` of a table holds what is special about evaluation ``i``.

    Args:
        tables: bundle whose table and plan to use; None for the bundle's own.

    Raises:
        EngineError: when the other bundle's graph is not the same graph.
    """

    name = "table"

    def __init__(self, bundle: Bundle, open_graph: OpenGraph, tables: Bundle | None = None) -> None:
        entry, other = bundle.realisations[self.name], (tables or bundle)
        theirs = other.realisations.get(self.name, {})
        if theirs.get("content") != entry["content"]:
            raise EngineError(
                f"expected a bundle with the table graph of {bundle.path}; {other.path} has "
                f"{'another one (backbone, or a solver that keeps more)' if theirs else 'none'}; export and build it on its own"
            )
        table = other.table()
        super().__init__(len(table), other.plan.history)
        self._session = open_graph(entry["graph"])
        self._lags = _lags(entry)
        put = device_of(self._session).put
        self._table, self._rows = put(table), [put(np.array(i, dtype=np.int64)) for i in range(self.evaluations)]
        self._names = [name for name in entry["inputs"] if name in ("evaluation", "table")]
        requests = theirs.get("requests", [])
        self._sources = [_sources(bundle, entry, requests[i] if requests else {}) for i in range(self.evaluations)]

    def step(self, index: int, state: Value, history: Sequence[Value], request: Values) -> tuple[Value, Value | None]:
        feeds: dict[str, Value] = {"state": state}
        for name, lag in self._lags.items():  # a factor of zero meets what is not there yet
            feeds[name] = history[lag - 1] if lag <= len(history) else state
        feeds |= {name: request[source] for name, source in self._sources[index].items()}
        if self._names:
            feeds |= {"evaluation": self._rows[index], "table": self._table}
        next_state, *kept = self._session.run(feeds)
        return next_state, kept[0] if kept else None


class Fused:
    """One graph that holds the whole loop."""

    name = "fused"

    def __init__(self, bundle: Bundle, open_graph: OpenGraph) -> None:
        entry = bundle.realisations[self.name]
        self._session = open_graph(entry["graph"])
        self._requests = [name for name in entry["inputs"] if name != "state"]

    def states(self, state: Value, request: Values) -> list[Value]:
        return self._session.run({"state": state, **{name: request[name] for name in self._requests}})

    def calls(self, state: Value, request: Values) -> Value:
        return self.states(state, request)[-1]


def _lags(entry: dict[str, Any]) -> dict[str, int]:
    """History inputs of a graph: name -> how many evaluations back."""
    return {name: int(name.removeprefix(PREFIX)) for name in entry["inputs"] if name.startswith(PREFIX)}


def _sources(bundle: Bundle, entry: dict[str, Any], hoisted: dict[str, str]) -> dict[str, str]:
    """What each of a graph's request-time inputs takes: an output of the prelude, or the request input itself."""
    names = {request.name for request in bundle.requests}
    return {name: name for name in entry["inputs"] if name in names} | hoisted


NAMES = ("baked", "table", "fused")


def open_loop(name: str, bundle: Bundle, open_graph: OpenGraph, tables: Bundle | None = None) -> Loop:
    """Open a realisation of a bundle.

    Raises:
        EngineError: for a realisation the bundle does not have, or ``tables`` with another one than ``table``.
    """
    if name not in bundle.realisations:
        raise EngineError(
            f"expected a realisation out of {', '.join(bundle.realisations)} in {bundle.path}; found {name!r}; export again "
            f"with --realisation {name}"
        )
    if name == "table":
        return Table(bundle, open_graph, tables)
    if tables is not None:
        raise EngineError(
            f"expected the realisation table with --tables; the built engine is {name}; build --realisation table"
        )
    return Baked(bundle, open_graph) if name == "baked" else Fused(bundle, open_graph)
