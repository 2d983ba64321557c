"""``build``: make a bundle's graphs ready in an engine, each run once; engine and realisation picked by measuring."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mteo_deploy import latency
from mteo_deploy.bundle import Bundle, whole_directory
from mteo_deploy.engines import AUTO, backend, best_device, cache, installed
from mteo_deploy.engines.base import Backend, Session
from mteo_deploy.engines.batches import at_any_size
from mteo_deploy.engines.options import read
from mteo_deploy.errors import EngineError, InputError, MteoError
from mteo_deploy.precision import HINTS
from mteo_deploy.progress import Reporter, reporter
from mteo_deploy.realisations import NAMES
from mteo_deploy.sampler import Sampler, noise_for


@dataclass
class Candidate:
    """A bundle opened in one engine: its realisations, and the fastest of them.

    Attributes:
        beside: where the graphs that the loop does not run were saved; they are closed again, for they hold the weights too.
    """

    backend: Backend
    device: str
    options: dict[str, Any]
    beside: Path
    samplers: dict[str, Sampler] = field(default_factory=dict)
    sessions: dict[str, dict[str, Session]] = field(default_factory=dict)
    seconds_to_open: dict[str, float] = field(default_factory=dict)
    realisation: str = ""
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> Sampler:
        return self.samplers[self.realisation]

    def close(self, keep: str | None = None) -> None:
        """Close its realisations, but for one."""
        for name in [name for name in self.samplers if name != keep]:
            self.samplers.pop(name).close()


def build(
    bundle: Bundle | Path | str,
    *,
    engine: str = AUTO,
    device: str | None = None,
    realisation: str = AUTO,
    precision: str = "fp32",
    batch: Sequence[int] = (),
    seconds: float = 2.0,
    threads: int | None = None,
    engine_options: Mapping[str, object] | None = None,
    quiet: bool = False,
) -> Path:
    """Build a bundle in an engine, run each graph once, and leave the built engine in the bundle.

    Args:
        engine: a backend's name, or ``auto``: time those that are installed and take the fastest.
        device: ``cpu``, ...; None for the engine's best.
        realisation: ``baked``, ``table``, ``fused``, or ``auto``: time those the bundle has and take the fastest.
        precision: ``fp32`` or ``bf16``; what the engine may compute in where the graphs' own types say no less.
        batch: batch sizes to compile for, the first one above all, which is also the one that is measured; empty for those
            that the bundle was exported for, and for any size, measured at 1, where it was for none.
        seconds: how long to measure.
        threads: threads inside an operator; None for the engine's own choice.
        engine_options: name -> value of settings of the engine's own; :func:`mteo_deploy.engines.doctor` lists them.

    Returns:
        the directory of the built engine.

    Raises:
        BundleError: for a bundle that is not whole.
        MissingPackageError: when the engine's package is not installed.
        EngineError: when the engine refuses a graph, a graph's output is not finite, or the bundle lacks the realisation.
        InputError: for an engine, realisation, precision, batch, time or engine option that does not exist.
    """
    if realisation not in (*NAMES, AUTO):
        raise InputError(f"expected --realisation out of {', '.join(NAMES)}, {AUTO}; found {realisation!r}")
    if precision not in HINTS:
        raise InputError(
            f"expected --precision out of {', '.join(HINTS)}; found {precision!r}; it is what an engine may compute in; the "
            "graphs' own types are chosen by: mteo-deploy export --precision"
        )
    if any(size < 1 for size in batch) or seconds <= 0:
        raise InputError(f"expected --batch of 1 or more and --seconds above 0; found {list(batch)} and {seconds}")
    if threads is not None and threads < 1:
        raise InputError(f"expected --threads of 1 or more; found {threads}; leave it out for the engine's own choice")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    batch = batch or bundle.batches
    targets = [one for one in (installed() if engine == AUTO else [backend(engine)]) if precision in one.precisions]
    if not targets:
        raise InputError(f"expected an engine that computes in {precision}; {engine} does not; mteo-deploy doctor lists them")
    options: dict[str, Any] = {"precision": precision}
    options |= {"threads": threads} if threads is not None else {}
    options |= {"batch": list(dict.fromkeys(batch))} if batch else {}
    options |= {"engine_options": read(targets, engine_options)} if engine_options else {}
    names = list(bundle.realisations) if realisation == AUTO else [realisation]
    size = batch[0] if batch else 1
    with cache.locked(bundle), cache.scratch(bundle) as scratch, reporter(quiet) as report:
        candidates, refused = [], {}
        for target in targets:
            try:
                found = Candidate(target, device or best_device(target), options, scratch / target.name)
                _open(bundle, found, names, size, seconds, report)
                candidates.append(found)
            except MteoError as error:
                if len(targets) == 1:
                    raise
                refused[target.name] = error
        if not candidates:
            raise next(iter(refused.values()))
        best, engines = _fastest(bundle, candidates, size, seconds)
        for other in candidates:
            other.close(keep=best.realisation if other is best else None)
        _time_decoder(bundle, best, size, seconds)
        if engine == AUTO and len(targets) > 1:
            best.measured["engines"] = {**engines, "refused": {name: str(error) for name, error in refused.items()}}
        return _save(bundle, best)


def _open(bundle: Bundle, found: Candidate, names: list[str], size: int, seconds: float, report: Reporter) -> None:
    """Open a bundle's graphs in one engine, check that they give finite values, time the realisations, leave the fastest open.

    What the loop does not run comes first and is closed again: open together, both would hold the weights.
    """
    _check_types(bundle, found)
    task = report.task(f"building {found.backend.name}", len(names) + 2)
    _save_beside(bundle, found, report)
    report.advance(task, 1, "conditioned")
    for name in names:
        found.sessions[name] = {}
        found.samplers[name] = Sampler(bundle, _opener(bundle, found, found.sessions[name], report), name)
        _check_loop(bundle, found.samplers[name])
        report.advance(task, 1, name)
    found.realisation, found.measured = _choose(bundle, found.samplers, size, seconds)
    found.close(keep=found.realisation)
    _check_decoder(bundle, found.chosen)
    report.advance(task, 1, "measuring")


def _check_types(bundle: Bundle, candidate: Candidate) -> None:
    """An engine has every layer of the bundle's precision; what it would say itself names one layer and no way out."""
    name, runs = bundle.manifest["precision"], candidate.backend.runs(candidate.device)
    if name not in runs:
        raise EngineError(
            f"expected a bundle whose graphs are in {', '.join(runs)} for {candidate.backend.name} on {candidate.device}; "
            f"found {name}; build with another --engine, or export again with another --precision"
        )


def _opener(bundle: Bundle, candidate: Candidate, sessions: dict[str, Session], report: Reporter) -> Callable[[str], Session]:
    def open_graph(graph: str) -> Session:
        clock = time.monotonic()
        sessions[graph] = candidate.backend.open(bundle, graph, candidate.device, candidate.options, None, report)
        candidate.seconds_to_open[graph] = round(time.monotonic() - clock, 4)
        return sessions[graph]

    return open_graph


def _save(bundle: Bundle, built: Candidate) -> Path:
    """Leave what the chosen realisation needs, and the record."""
    parts = cache.key_parts(bundle, built.backend, built.device, built.options)
    directory, missed = cache.directory(bundle, parts), cache.missed(bundle, parts)
    with whole_directory(directory, replace=cache.RECORD) as temporary:
        for path in built.beside.iterdir():
            path.rename(temporary / path.name)
        for graph, session in built.sessions[built.realisation].items():
            session.save(temporary, graph)
        record = {
            "parts": parts,
            "key": cache.key(parts),
            "realisation": built.realisation,
            "missed": missed,
            "measured": built.measured,
            "seconds_to_open": built.seconds_to_open,
            "files": cache.files_of(temporary),
            "bytes": cache.sizes_of(temporary),
        }
        (temporary / cache.RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return directory


def _save_beside(bundle: Bundle, candidate: Candidate, report: Reporter) -> None:
    """The baseline of every comparison, and the text encoder where there is one: each opened, run, saved and closed again.

    Raises:
        EngineError: when the engine refuses one, or a value is not finite.
        InputError: when the disk cannot take it.
    """
    state = {"state": np.zeros((1, *bundle.sample_shape), np.float32), "timestep": np.zeros(1, np.float32)}
    beside = {bundle.manifest["conditioned"]["graph"]: {**state, **bundle.reference_requests(1)}}
    if bundle.text_encoder is not None:
        beside[bundle.text_encoder["graph"]] = bundle.reference_tokens(1)
    candidate.beside.mkdir()
    for graph, feeds in beside.items():
        session = at_any_size(_opener(bundle, candidate, {}, report)(graph), bundle.manifest["batch"])
        if not all(np.isfinite(output).all() for output in session.run(feeds)):
            raise EngineError(f"{graph} gives values that are not finite for a zero state or the stored prompt; export again")
        try:
            session.save(candidate.beside, graph)
        except OSError as error:
            raise InputError(f"could not write the built {graph}: {error.strerror or error}; free space") from error
        session.close()


def _check_decoder(bundle: Bundle, sampler: Sampler) -> None:
    """Where there is one, it opens and gives finite values."""
    images = sampler.decode(np.zeros((1, *bundle.sample_shape), np.float32))
    if not np.isfinite(images).all():
        raise EngineError("the decoder gives values that are not finite for latents of zero; export again")


def _time_decoder(bundle: Bundle, built: Candidate, batch: int, seconds: float) -> None:
    noise, requests = noise_for(bundle.sample_shape, 0, range(batch)), bundle.reference_requests(batch)
    if found := built.chosen.decoder_share(noise, requests, seconds / 4):
        built.measured["decoder"] = {"batch": batch, **found}


def _check_loop(bundle: Bundle, sampler: Sampler) -> None:
    """Every evaluation gives finite values for a zero state."""
    states = sampler.states(np.zeros((1, *bundle.sample_shape), np.float32), bundle.reference_requests(1))
    for i, state in enumerate(states):
        if not np.isfinite(state).all():
            raise EngineError(
                f"{sampler.loop.name}: evaluation {i} gives values that are not finite for a zero state; export again"
            )


def _choose(bundle: Bundle, samplers: dict[str, Sampler], batch: int, seconds: float) -> tuple[str, dict[str, Any]]:
    """The fastest realisation and what was measured: whole loops, each interleaved with the first one's."""
    ratios = _against_first(bundle, samplers, batch, seconds)
    if not ratios:
        return next(iter(samplers)), {}
    chosen = min(samplers, key=lambda name: ratios[name]["ratio"] if name in ratios else 1.0)
    return chosen, {"batch": batch, "against": next(iter(samplers)), "loops": ratios}


def _fastest(bundle: Bundle, candidates: list[Candidate], batch: int, seconds: float) -> tuple[Candidate, dict[str, Any]]:
    """The fastest engine and what was measured: whole loops of each engine's fastest realisation."""
    ratios = _against_first(bundle, {one.backend.name: one.chosen for one in candidates}, batch, seconds)
    best = min(candidates, key=lambda one: ratios[one.backend.name]["ratio"] if one.backend.name in ratios else 1.0)
    return best, {"batch": batch, "against": candidates[0].backend.name, "loops": ratios}


def _against_first(bundle: Bundle, samplers: dict[str, Sampler], batch: int, seconds: float) -> dict[str, dict[str, Any]]:
    first, *others = samplers
    noise, requests = noise_for(bundle.sample_shape, 0, range(batch)), bundle.reference_requests(batch)

    def loop(name: str) -> Callable[[], object]:
        return lambda: samplers[name].image(noise, requests)

    return {name: latency.compare(loop(name), loop(first), seconds=seconds / len(others)).to_json() for name in others}
