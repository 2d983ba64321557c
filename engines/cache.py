"""The key of a built engine: a hash of everything that, changed, makes it the wrong engine.

``engine.json`` spells every part out, so that a refusal can say what changed.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.base import Backend
from mteo_deploy.errors import BundleError

RECORD = "engine.json"


def key_parts(bundle: Bundle, backend: Backend, device: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Every part of the key: graphs with their external data, engine and version, device, machine, options."""
    return {
        "graphs": bundle.graph_hash,
        "engine": backend.name,
        "engine_version": backend.version(),
        "device": device,
        "machine": platform.machine(),
        "options": dict(options),
    }


def key(parts: Mapping[str, Any]) -> str:
    """Short content hash of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def directory(bundle: Bundle, parts: Mapping[str, Any]) -> Path:
    """Where the built engine with these parts lies: ``engines/<engine>-<device>-<key>/`` in the bundle."""
    return bundle.path / "engines" / f"{parts['engine']}-{parts['device']}-{key(parts)}"


def find(bundle: Bundle, backend: Backend, device: str) -> dict[str, Any]:
    """The newest built engine that fits the bundle as it is now.

    Returns:
        its record, with ``parts``.

    Raises:
        BundleError: when there is none, saying what changed since, and the command that builds it.
    """
    command = f"run: mteo-deploy build {bundle.path} --engine {backend.name} --device {device}"
    records = sorted(
        bundle.path.glob(f"engines/{backend.name}-{device}-*/{RECORD}"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    reasons, older = [], []
    for path in records:
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            built, options = record["parts"], record["parts"]["options"]
        except (ValueError, KeyError, TypeError):
            reasons.append(f"{path.parent.name}: {RECORD} cannot be read")
            continue
        older.append(options)
        now = key_parts(bundle, backend, device, options)
        changed = [
            f"{name} changed {built.get(name)!s:.12} -> {now[name]!s:.12}" for name in now if built.get(name) != now[name]
        ]
        if not changed and path.parent == directory(bundle, now):
            return record
        reasons.append(f"{path.parent.name}: {'; '.join(changed) or 'moved from another key'}")
    if reasons:
        threads = next((f" --threads {o['threads']}" for o in older if "threads" in o), "")
        raise BundleError(
            f"expected a built engine for this bundle; found stale ones ({' | '.join(reasons)}); {command}{threads}"
        )
    raise BundleError(f"expected a built {backend.name} engine for {device} in {bundle.path}; found none; {command}")
