"""``verify --costs``: what sampling costs beside one median, each against what it could depend on.

Times come from interleaved rounds with a warm-up, as everywhere; starts and memory from processes of their own. A part that
this machine, engine or bundle does not tell is there with the reason under ``missing``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mteo_deploy import cold_start, latency
from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.base import Session
from mteo_deploy.machine import EnergyCounter, Reach, reach
from mteo_deploy.processors import processors
from mteo_deploy.realisations import Stepwise
from mteo_deploy.sampler import Sampler, noise_for

BATCHES = (1, 2, 4, 8)
STARTS = 5
"""Processes started for the cold start; medians are reported."""

COUNTED = ("flops", "weight_bytes", "activation_bytes")


def measure_costs(sampler: Sampler, batch: int, seconds: float, starts: int = STARTS) -> dict[str, Any]:
    """Measure every part.

    Args:
        batch: images per engine call, where the part is not about batches.
        seconds: for each timed part.
        starts: processes for the cold start.

    Returns:
        plain data: ``evaluations``, ``batches``, ``threads``, ``cold_start``, ``memory``, ``energy``, ``limit``.

    Raises:
        InputError: for a sampler without a built engine.
        EngineError: when the engine does not open with another number of threads, or a process fails.
    """
    built = sampler.built_engine("--costs")
    begun = [cold_start.one(sampler.bundle.path, built.directory, sampler.loop.name, batch) for _ in range(starts)]
    sizes = batches(sampler, sorted({*BATCHES, batch}), seconds)
    took = next(row["milliseconds"] for row in sizes["rows"] if row["batch"] == batch) / 1e3
    return {
        "batch": batch,
        "realisation": sampler.loop.name,
        "evaluations": evaluations(sampler, batch, seconds),
        "batches": sizes,
        "threads": threads(sampler, batch, seconds),
        "cold_start": {name: float(np.median([one[name] for one in begun])) for name in ("process", "import", "load", "first")}
        | {"starts": starts},
        "memory": memory(begun),
        "energy": energy(lambda: sampler.states(*_given(sampler, batch)), batch, seconds),
        "limit": limit(sampler, batch, took),
    }


def _given(sampler: Sampler, batch: int) -> tuple[Any, Any]:
    return noise_for(sampler.bundle.sample_shape, 0, range(batch)), sampler.bundle.reference_requests(batch)


def line(counts: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """Least squares ``time = a + b * count``: ``(a, b, root mean square of what is left)``; at least two different counts."""
    columns = np.stack([np.ones(len(counts)), np.asarray(counts, np.float64)], axis=1)
    (a, b), *_ = np.linalg.lstsq(columns, np.asarray(times, np.float64), rcond=None)
    left = np.asarray(times) - columns @ [a, b]
    return float(a), float(b), float(np.sqrt(np.mean(left**2)))


def evaluations(sampler: Sampler, batch: int, seconds: float) -> dict[str, Any]:
    """Time of the first ``n`` evaluations for every ``n``, and the line through it.

    A fused graph has no first evaluations; the time-conditioned graph is run in its place, and named.
    """
    functions = _firsts(sampler, batch)
    if len(functions) < 2:
        return {"missing": "one evaluation: no line through it"}
    found = latency.interleave(functions, seconds=seconds)
    fixed, each, left = line(range(1, len(functions) + 1), found.medians)
    of = sampler.loop.name if isinstance(sampler.loop, Stepwise) else "time-conditioned"
    return {
        "of": of,
        "milliseconds": found.medians,
        "fixed": fixed,
        "each": each,
        "residual": left,
        "doubts": found.doubts,
    }


def _firsts(sampler: Sampler, batch: int) -> list[Callable[[], object]]:
    noise, requests = _given(sampler, batch)
    state, loop = noise * np.float32(sampler.plan.initial_scale), sampler.loop
    counts = range(1, len(sampler.plan.evaluations) + 1)
    if isinstance(loop, Stepwise):
        request = sampler.prepare(requests)
        return [lambda n=n: loop.states(state, request, n) for n in counts]  # type: ignore[misc]
    session = sampler.conditioned_session
    steps = [np.array([row.timestep], np.float32) for row in sampler.plan.evaluations]

    def first(n: int) -> None:
        for timestep in steps[:n]:
            session.run({"state": state, "timestep": timestep, **requests})

    return [lambda n=n: first(n) for n in counts]  # type: ignore[misc]


def batches(sampler: Sampler, sizes: Sequence[int], seconds: float) -> dict[str, Any]:
    """Whole samplings at several batch sizes. An engine built for certain sizes runs the others in parts."""
    given = [_given(sampler, size) for size in sizes]
    functions = [lambda one=one: sampler.states(*one) for one in given]  # type: ignore[misc]
    found = latency.interleave(functions, seconds=seconds)
    rows = [
        {"batch": size, "milliseconds": took, "images_per_second": 1e3 * size / took}
        for size, took in zip(sizes, found.medians, strict=True)
    ]
    return {"rows": rows, "doubts": found.doubts}


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself."""
    return sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {most})


def threads(sampler: Sampler, batch: int, seconds: float) -> dict[str, Any]:
    """Whole samplings with 1, 2, 4, ... threads inside an operator, each opened anew and interleaved with one thread's."""
    built, counts = sampler.built_engine("--costs"), thread_counts(processors())
    if built.device != "cpu":
        return {"missing": f"threads of the host do not matter on {built.device}"}
    given, one = _given(sampler, batch), _with_threads(sampler, 1)
    rows: list[dict[str, Any]] = []
    for count in counts[1:]:
        several = _with_threads(sampler, count)  # two at a time: every sampler holds weights of its own
        found = latency.compare(
            lambda: several.states(*given),  # noqa: B023 (used in this round only)
            lambda: one.states(*given),
            seconds=seconds / (len(counts) - 1),
        )
        rows.append({"threads": count, "milliseconds": found.a_p50, "speed": 1 / found.ratio, "doubts": found.doubts})
        single = found.b_p50
    if not rows:
        return {"missing": "one processor"}
    return {"rows": [{"threads": 1, "milliseconds": single, "speed": 1.0, "doubts": []}, *rows]}


def _with_threads(sampler: Sampler, count: int) -> Sampler:
    built, bundle = sampler.built_engine("--costs"), sampler.bundle

    def open_graph(graph: str) -> Session:
        return built.backend.open(bundle, graph, built.device, {**built.options, "threads": count})

    return Sampler(bundle, open_graph, sampler.loop.name)


def memory(begun: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the started processes: at the peak, and private at the end; each with the part that importing took."""
    names = ("peak_bytes", "peak_import", "private_bytes", "private_import")
    told = {name: [one[name] for one in begun] for name in names}
    found = {name: int(np.median(values)) for name, values in told.items() if None not in values}
    return found or {"missing": "not told by this machine"}


def energy(run: Callable[[], object], images: int, seconds: float, counter: EnergyCounter | None = None) -> dict[str, Any]:
    """Energy of the processor packages per image, whatever else they did meanwhile: idling, and other programs.

    Args:
        run: draws ``images`` images.
        counter: None for this machine's.
    """
    counter = counter or EnergyCounter.find()
    if counter is None:
        return {"missing": "not told by this machine"}
    others, drawn, clock, before = latency.OtherPrograms(), 0, time.perf_counter(), counter.read()
    while time.perf_counter() - clock < seconds or not drawn:
        run()
        drawn += images
    used, took = counter.joules(before, counter.read()), time.perf_counter() - clock
    return {"joules_per_image": used / drawn, "watts": used / took, "images": drawn, "busy": others.share()}


def work(bundle: Bundle, realisation: str, batch: int) -> dict[str, float] | str:
    """Work of one sampling of ``batch`` images: what the export counted, or why there is none.

    Returns:
        ``flops`` in convolutions and matrix products, and ``bytes``: weights, read once per evaluation, and what those
        layers read and write.
    """
    counted = {entry["graph"]: entry.get("work") for entry in bundle.manifest["compiler"]["graphs"]}
    entries, runs = bundle.realisations[realisation], 1
    if realisation == "table":
        runs = len(bundle.plan.evaluations)
    graphs = [entry["graph"] for entry in (entries if isinstance(entries, list) else [entries])] * runs
    prelude = bundle.manifest.get("prelude")
    total = dict.fromkeys(COUNTED, 0)
    for graph in [*graphs, *([prelude["graph"]] if prelude else [])]:
        found = counted.get(graph)
        if not found:
            return "the bundle does not tell its work: an older version made it; export again"
        if "unknown" in found:
            return f"{graph}: {found['unknown']}"
        total = {name: total[name] + found[name] for name in COUNTED}
    return {"flops": total["flops"] * batch, "bytes": total["weight_bytes"] + total["activation_bytes"] * batch}


def limit(sampler: Sampler, batch: int, seconds: float, reached: Reach | None = None) -> dict[str, Any]:
    """How far a sampling is from what this machine reaches in a matrix product and in a copy.

    Args:
        seconds: that it takes.
        reached: None to measure it now, with as many threads as the engine has.
    """
    built, counted = sampler.built_engine("--costs"), work(sampler.bundle, sampler.loop.name, batch)
    if built.device != "cpu":
        return {"missing": f"the limits of {built.device} are not measured"}
    if isinstance(counted, str):
        return {"missing": counted}
    reached = reached or reach(int(built.options.get("threads") or processors()))
    rates = {name: counted[name] / seconds for name in ("flops", "bytes")}
    return {
        **counted,
        "seconds": seconds,
        "threads": reached.threads,
        "flops_per_second": rates["flops"],
        "bytes_per_second": rates["bytes"],
        "matrix_product": reached.flops,
        "copy": reached.bytes,
        "flops_share": rates["flops"] / reached.flops,
        "bytes_share": rates["bytes"] / reached.bytes,
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """Costs in words; empty when there are none."""
    if not found:
        return []
    made = [f"costs, {found['realisation']}, batch {found['batch']}"]
    for name, words in _WORDS.items():
        part = found[name]
        made.append(f"{name.replace('_', ' ')}: {part['missing'] if 'missing' in part else words(part)}")
    doubted = {f"{name}: {doubt}" for name in _WORDS for doubt in _doubts(found[name])}
    return [*made, *([f"costs marked unreliable: {'; '.join(sorted(doubted))}"] if doubted else [])]


def _doubts(part: Mapping[str, Any]) -> list[str]:
    return [*part.get("doubts", []), *(doubt for row in part.get("rows", []) for doubt in row.get("doubts", []))]


def _evaluations(part: Mapping[str, Any]) -> str:
    fixed, each, left = part["fixed"], part["each"], part["residual"]
    return f"{each:.3f} ms each ({part['of']}) and {fixed:+.3f} ms once, {left:.3f} ms off that line on average"


def _batches(part: Mapping[str, Any]) -> str:
    return ", ".join(f"{r['batch']}: {r['milliseconds']:.2f} ms, {r['images_per_second']:.1f} images/s" for r in part["rows"])


def _threads(part: Mapping[str, Any]) -> str:
    return ", ".join(f"{r['threads']}: {r['milliseconds']:.2f} ms, {r['speed']:.2f}x" for r in part["rows"])


def _cold_start(part: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{name} {part[name]:.2f} s" for name in ("import", "load", "first"))
    return f"{parts}, whole process {part['process']:.2f} s (medians of {part['starts']})"


def _memory(part: Mapping[str, Any]) -> str:
    said = [f"peak {part['peak_bytes'] / 1e6:.1f} MB (of it imports {part['peak_import'] / 1e6:.1f})"]
    if "private_bytes" in part:
        said.append(f"private {part['private_bytes'] / 1e6:.1f} MB (imports {part['private_import'] / 1e6:.1f})")
    return ", ".join(said)


def _energy(part: Mapping[str, Any]) -> str:
    return f"{part['joules_per_image']:.3g} J per image at {part['watts']:.1f} W, whole processor packages, idling included"


def _limit(part: Mapping[str, Any]) -> str:
    more = ", above 100 % where caches hold the weights" if part["bytes_share"] > 1 else ""
    return (
        f"{part['flops_per_second'] / 1e9:.2f} GFLOP/s, {part['flops_share']:.0%} of a matrix product's; "
        f"{part['bytes_per_second'] / 1e9:.2f} GB/s, {part['bytes_share']:.0%} of a copy's{more} ({part['threads']} threads)"
    )


_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "evaluations": _evaluations,
    "batches": _batches,
    "threads": _threads,
    "cold_start": _cold_start,
    "memory": _memory,
    "energy": _energy,
    "limit": _limit,
}
