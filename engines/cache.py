"""Built engines in a bundle: their key, which of them fits the bundle as it is now, and what to clean.

The key is a hash of everything that, changed, makes it the wrong engine. ``engine.json`` spells every part out, so that a
refusal can say what changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mteo_deploy.bundle import Bundle, sha256_file
from mteo_deploy.engines import AUTO, BACKENDS, backend, live, store
from mteo_deploy.engines.base import Backend
from mteo_deploy.engines.options import keyed, read
from mteo_deploy.engines.store import RECORD, locked, scratch
from mteo_deploy.errors import BundleError, InputError, MteoError
from mteo_deploy.precision import label, rank
from mteo_deploy.text import one_line

__all__ = ["RECORD", "Built", "check", "clean", "entries", "every", "find", "locked", "records", "scratch"]


@dataclass(frozen=True)
class Built:
    """A built engine: the directory ``engines/<engine>-<device>-<key>/`` of a bundle, its record, and the graphs' precision."""

    directory: Path
    backend: Backend
    record: dict[str, Any]
    graphs: str = "fp32"

    @property
    def device(self) -> str:
        return str(self.record["parts"]["device"])

    @property
    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = self.record["parts"]["options"]
        return found

    @property
    def precision(self) -> str:
        """What it computes in: the graphs' types and its own hint, as :func:`mteo_deploy.precision.label`."""
        return label(self.graphs, str(self.options.get("precision", "fp32")))


def key_parts(bundle: Bundle, backend: Backend, device: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Every part of the key: graphs with their external data, engine and version, device, machine, options."""
    return {
        "graphs": bundle.graph_hash,
        "engine": backend.name,
        "engine_version": backend.version(),
        "device": device,
        "machine": backend.machine(device, options),
        "options": keyed(backend, options),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed from the parts of one key to those of another: ``batch changed 1,4 -> 1,8``."""
    old, new = _flat(before), _flat(now)
    names = [name for name in dict.fromkeys([*new, *old]) if old.get(name) != new.get(name)]
    return [f"{name} changed {_text(name, old.get(name))} -> {_text(name, new.get(name))}" for name in names]


def _flat(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts with every option as a part of its own."""
    options = dict(parts["options"])
    return {**{name: part for name, part in parts.items() if name != "options"}, **options.pop("engine_options", {}), **options}


def _text(name: str, value: Any) -> str:
    if value is None:
        return "not given"
    return str(value)[:12] if name == "graphs" else ",".join(map(str, value)) if isinstance(value, list) else str(value)


def missed(bundle: Bundle, parts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Why the newest built engine of the same engine and device is not the one with these parts; None without one."""
    for path in records(bundle, parts["engine"], parts["device"]):
        with contextlib.suppress(BundleError):
            changed = differences(store.read_record(path)["parts"], parts)
            return {"name": path.parent.name, "changed": changed} if changed else None
    return None


def key(parts: Mapping[str, Any]) -> str:
    """Short content hash of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def directory(bundle: Bundle, parts: Mapping[str, Any]) -> Path:
    """Where the built engine with these parts lies: ``engines/<engine>-<device>-<key>/`` in the bundle."""
    return bundle.path / "engines" / f"{parts['engine']}-{parts['device']}-{key(parts)}"


def files_of(directory: Path) -> dict[str, str]:
    """SHA-256 of each file that a build wrote beside its record."""
    return {path.name: sha256_file(path) for path in sorted(directory.iterdir()) if path.name != RECORD}


def sizes_of(directory: Path) -> dict[str, int]:
    """Bytes of each of these files."""
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != RECORD}


def check(bundle: Bundle, path: Path) -> Built:
    """A built engine by its record's path.

    Raises:
        BundleError: why it does not fit the bundle as it is now.
        MteoError: why its engine does not work here.
    """
    record = store.read_record(path)
    parts = record["parts"]
    device, options = parts["device"], dict(parts["options"])
    try:
        target = backend(parts["engine"])
        read([target], dict(options.get("engine_options", {})))
        changed = differences(parts, now := key_parts(bundle, target, device, options))
    except InputError as error:
        raise BundleError(f"{error}, as another version of mteo-deploy has") from None
    if changed:
        raise BundleError("; ".join(changed))
    if path.parent != directory(bundle, now):
        raise BundleError("moved from another key")
    live.remember(path.parent, store.check_files(bundle, path.parent, record))
    return Built(path.parent, target, record, bundle.manifest["precision"])


def records(bundle: Bundle, engine: str = AUTO, device: str | None = None) -> list[Path]:
    """Records of built engines, newest first."""
    names = {entry.path: entry.path.name.rsplit("-", 2) for entry in store.entries(bundle) if entry.kind == "built"}
    wanted = [path for path, (its, on, _) in names.items() if engine in (AUTO, its) and device in (None, on)]
    times = {path / RECORD: (path / RECORD).stat().st_mtime for path in wanted}
    return sorted(times, key=lambda path: times[path], reverse=True)


def find(bundle: Bundle, engine: str = AUTO, device: str | None = None) -> Built:
    """The newest built engine that fits the bundle as it is now.

    Args:
        engine: a backend's name, or ``auto`` for any.
        device: None for any.

    Raises:
        BundleError: when there is none, saying what changed since, and the command that builds it.
        InputError: for a name without a backend.
        MissingPackageError, EngineError: when the engine does not work here.
    """
    command = f"run: {shlex.join(['mteo-deploy', 'build', str(bundle.path)])}"
    if engine != AUTO:
        backend(engine).version()
        command += f" --engine {engine}"
    command += f" --device {device}" if device else ""
    problems: list[MteoError] = []
    reasons = []
    for path in records(bundle, engine, device):
        try:
            return check(bundle, path)
        except MteoError as error:
            problems.append(error)
            reasons.append(f"{path.parent.name}: {error}")
            command += _again(path, engine) if len(reasons) == 1 else ""
    if problems and not any(isinstance(problem, BundleError) for problem in problems):
        raise problems[0]
    if reasons:
        raise BundleError(f"expected a built engine for this bundle; found stale ones ({' | '.join(reasons)}); {command}")
    if strays := [f"{one.path.name}: {one.reason}" for one in store.entries(bundle) if one.kind == "stray"]:
        command += f"; what else lies in engines/ is none ({' | '.join(map(one_line, strays[:3]))})"
    what = " ".join(part for part in ("" if engine == AUTO else engine, f"on {device}" if device else "") if part)
    raise BundleError(f"expected a built engine{what and ' of ' + what} in {bundle.path}; found none; {command}")


def every(bundle: Bundle, engines: Sequence[str] = (), device: str | None = None) -> list[Built]:
    """The newest built engine that fits the bundle as it is now, of each engine, device and precision; by engine, fp32 first.

    Args:
        engines: names of backends, each of which must have one; empty for those that are there, at least one.
        device: None for any.

    Raises:
        BundleError, InputError, MissingPackageError, EngineError: as :func:`find`, for an engine that has none.
    """
    found: dict[tuple[str, ...], Built] = {}
    for path in records(bundle, AUTO, device):
        with contextlib.suppress(MteoError):
            built = check(bundle, path)
            found.setdefault((built.backend.name, built.device, built.precision), built)
    for engine in engines or [AUTO]:
        if not any(engine in (AUTO, name) for name, *_ in found):
            find(bundle, engine, device)  # says why there is none
    order = list(engines) or list(BACKENDS)
    wanted = [place for place in found if place[0] in order]
    return [found[place] for place in sorted(wanted, key=lambda at: (order.index(at[0]), at[1], rank(at[2])))]


def _again(path: Path, engine: str) -> str:
    """The options of an older build, as the command line takes them; its engine too, where they are of that engine alone."""
    with contextlib.suppress(BundleError):
        parts = store.read_record(path)["parts"]
        options = dict(parts["options"])
        own = [("option", f"{name}={value}") for name, value in options.pop("engine_options", {}).items()]
        texts = [(name, _text(name, value)) for name, value in options.items()]
        texts += [("engine", parts["engine"]), *own] if own and engine == AUTO else own
        return "".join(f" --{name} {shlex.quote(text)}" for name, text in texts if text != "fp32")
    return ""


def entries(bundle: Bundle) -> list[dict[str, Any]]:
    """Everything under ``engines/``: name, kind, bytes, and whether it fits the bundle as it is now, or why not.

    The kind is ``built``, ``left`` (by a build that was interrupted, or of one that runs) or ``stray``: none of ours.
    """
    return [_described(bundle, entry) for entry in store.entries(bundle)]


def _described(bundle: Bundle, entry: store.Entry) -> dict[str, Any]:
    reason = entry.reason
    if entry.kind == "built":
        try:
            check(bundle, entry.path / RECORD)
        except MteoError as error:
            reason = str(error)
    found = {"name": entry.path.name, "kind": entry.kind, "bytes": entry.bytes, "fits": not reason, "reason": reason}
    return found | ({"beside": store.beside(entry)} if entry.kind == "built" else {})


def clean(bundle: Bundle, everything: bool = False) -> list[dict[str, Any]]:
    """Delete the built engines that do not fit the bundle (any more), or all of them, and what interrupted builds left.

    Strays, and what a build that runs works in, stay.

    Returns:
        what was deleted, as :func:`entries` describes it.
    """
    if not _doomed(bundle, everything):
        return []
    with locked(bundle):
        deleted = []
        for entry, found in _doomed(bundle, everything):
            if kept := store.remove(entry):
                found["reason"] = f"{found['reason'] or 'fits the bundle'}; {kept}"
            deleted.append(found)
    return deleted


def _doomed(bundle: Bundle, everything: bool) -> list[tuple[store.Entry, dict[str, Any]]]:
    found = [(entry, _described(bundle, entry)) for entry in store.entries(bundle)]
    return [
        (entry, described)
        for entry, described in found
        if (entry.kind == "built" and (everything or not described["fits"])) or entry.reason == store.INTERRUPTED
    ]
