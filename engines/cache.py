"""Built engines in a bundle: their key, which of them fits the bundle as it is now, and what to clean.

The key is a hash of everything that, changed, makes it the wrong engine. ``engine.json`` spells every part out, so that a
refusal can say what changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mteo_deploy.bundle import MANIFEST, Bundle, sha256_file
from mteo_deploy.engines import AUTO, BACKENDS, backend
from mteo_deploy.engines.base import Backend
from mteo_deploy.engines.options import keyed, read
from mteo_deploy.errors import BundleError, InputError, MteoError
from mteo_deploy.precision import label, rank

RECORD = "engine.json"


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
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            changed = differences(json.loads(path.read_text(encoding="utf-8"))["parts"], parts)
            return {"name": path.parent.name, "changed": changed} if changed else None
    return None


def key(parts: Mapping[str, Any]) -> str:
    """Short content hash of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def directory(bundle: Bundle, parts: Mapping[str, Any]) -> Path:
    """Where the built engine with these parts lies: ``engines/<engine>-<device>-<key>/`` in the bundle."""
    return bundle.path / "engines" / f"{parts['engine']}-{parts['device']}-{key(parts)}"


def files_of(directory: Path) -> dict[str, str]:
    """SHA-256 of each file of a built engine beside its record."""
    return {path.name: sha256_file(path) for path in sorted(directory.iterdir()) if path.name != RECORD}


def check(bundle: Bundle, path: Path) -> Built:
    """A built engine by its record's path.

    Raises:
        BundleError: why it does not fit the bundle as it is now.
        MteoError: why its engine does not work here.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        parts = record["parts"]
        name, device, options = parts["engine"], parts["device"], dict(parts["options"])
        given = dict(options.get("engine_options", {}))
    except (OSError, ValueError, KeyError, TypeError):
        raise BundleError(f"{RECORD} cannot be read") from None
    target = backend(name)
    try:
        read([target], given)
        changed = differences(parts, now := key_parts(bundle, target, device, options))
    except InputError as error:
        raise BundleError(f"{error}, as another version of mteo-deploy has") from None
    if changed:
        raise BundleError("; ".join(changed))
    if path.parent != directory(bundle, now):
        raise BundleError("moved from another key")
    if files_of(path.parent) != record.get("files", {}):
        raise BundleError("its files were altered")
    return Built(path.parent, target, record, bundle.manifest["precision"])


def records(bundle: Bundle, engine: str = AUTO, device: str | None = None) -> list[Path]:
    """Records of built engines, newest first."""
    pattern = f"engines/{'*' if engine == AUTO else engine}-{device or '*'}-*/{RECORD}"
    return sorted(bundle.path.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)


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
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
        options = parts["options"]
        own = [("option", f"{name}={value}") for name, value in options.pop("engine_options", {}).items()]
        texts = [(name, _text(name, value)) for name, value in options.items()]
        texts += [("engine", parts["engine"]), *own] if own and engine == AUTO else own
        return "".join(f" --{name} {shlex.quote(text)}" for name, text in texts if text != "fp32")
    return ""


def entries(bundle: Bundle) -> list[dict[str, Any]]:
    """Every directory under ``engines/``: name, bytes, and whether it fits the bundle as it is now, or why not."""
    found = []
    for path in sorted((bundle.path / "engines").glob("*")):
        if not path.is_dir():
            continue
        reason = ""
        try:
            check(bundle, path / RECORD)
        except MteoError as error:
            reason = str(error) if (path / RECORD).is_file() else "left by a build that was interrupted"
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        found.append({"name": path.name, "bytes": size, "fits": not reason, "reason": reason})
    return found


def clean(bundle: Bundle, everything: bool = False) -> list[dict[str, Any]]:
    """Delete the built engines that do not fit the bundle (any more), or all of them; returns what was deleted."""
    with locked(bundle):
        doomed = [entry for entry in entries(bundle) if everything or not entry["fits"]]
        for entry in doomed:
            shutil.rmtree(bundle.path / "engines" / entry["name"])
    return doomed


@contextlib.contextmanager
def locked(bundle: Bundle) -> Iterator[None]:
    """One build (or clean) at a time per bundle: a second one waits. Released when the process ends, however it ends.

    Without ``fcntl`` (Windows) two builds run side by side, and the last one to finish stays.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (bundle.path / MANIFEST).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch(bundle: Bundle) -> Iterator[Path]:
    """A directory under ``engines/`` for what a build may still discard; it is gone when the block ends, or with :func:`clean`.

    Raises:
        InputError: for a bundle that cannot be written to.
    """
    parent = bundle.path / "engines"
    try:
        parent.mkdir(exist_ok=True)
        directory = tempfile.TemporaryDirectory(prefix=".build.", suffix=".tmp", dir=parent)
    except OSError as error:
        raise InputError(f"cannot write into {bundle.path}: {error.strerror or error}; build a copy") from None
    try:
        with directory as name:
            yield Path(name)
    finally:
        with contextlib.suppress(OSError):  # not empty: what was built
            parent.rmdir()
