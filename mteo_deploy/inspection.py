"""``inspect``: what a bundle or an embedding set is, in plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mteo_deploy.bundle import Bundle
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.plan import Plan


def _plan(plan: Plan, plain: Plan) -> dict[str, Any]:
    return {
        "summary": plan.summary(plain),
        "solver": plan.solver,
        "schedule": plan.schedule,
        "steps": plan.steps,
        "evaluations": [
            {"sigma": e.sigma, "timestep": e.timestep, "carry": e.carry, "weights": list(e.weights)} for e in plan.evaluations
        ],
    }


def compiler(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the compiler did, pass by pass, without the names of the weights that it removed.

    Returns:
        ``time_conditioned``: ``nodes``, ``parameters``, ``bytes`` before any pass; ``graphs``: for each ``graph``, its
        ``passes`` (``name``, ``modified``, ``before`` and ``after`` as above, ``error``) and the number of
        ``removed_weights``; ``sites``: for each ``site``, what became of its ``constants`` in each realisation;
        ``precision`` and ``auto``, of a bundle below float32 and of one whose precision was measured. Empty where the bundle
        does not tell.
    """
    found = manifest.get("compiler")
    if not found:
        return {}
    graphs = [
        {"graph": one["graph"], "passes": one["passes"], "removed_weights": len(one["removed_weights"])}
        for one in found["graphs"]
    ]
    told = {name: found[name] for name in ("precision", "auto") if found.get(name)}
    return {"time_conditioned": found["time_conditioned"], "graphs": graphs, "sites": found["sites"], **told}


def layer_fates(found: Mapping[str, Any]) -> str:
    """How many layers of a bundle's ``compiler.precision`` are quantised, or stayed in float32, and why."""
    counts = Counter(found["layers"].values() if "layers" in found else found["float32"])
    words = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    return f"layers quantised: {words}" if "layers" in found else f"in float32: {words or 'nothing'}"


TRIED = ("precision", "engine", "time / fp32", "median image's error", "")


def tried_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row under :data:`TRIED` for each candidate of a bundle's ``compiler.auto``."""
    rows = []
    for i, one in enumerate(found["tried"]):
        name = one["precision"] if one["hint"] == "fp32" else f"{one['precision']}, computed in {one['hint']}"
        if one["refused"]:
            rows.append([name, one["engine"] or "", "", "", one["refused"]])
            continue
        median, low, high = one["ratio"]
        near = "" if one["error"] <= found["max_error"] else f"above {found['max_error']:g}"
        note = "chosen" if i == found["chosen"] else near
        rows.append([name, one["engine"], f"{median:.2f} [{low:.2f}, {high:.2f}]", f"{one['error']:.1e}", note])
    return rows


KINDS = ("layers", "how many", "time with them in fp32", "")


def kind_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row under :data:`KINDS` for each kind of layer of a bundle's ``compiler.precision`` whose time was measured."""
    rows = []
    for one in found.get("kinds", []):
        median, low, high = one["ratio"]
        note = "left in fp32" if high < 1 else "" if low > 1 else "no difference"
        rows.append([one["name"], f"{len(one['layers'])}", f"{median:.3f} [{low:.3f}, {high:.3f}]", note])
    return rows


def inspect(path: Path | str) -> dict[str, Any]:
    """Describe a bundle (checked whole first) or an embedding set.

    Raises:
        BundleError, InputError: when it is neither, or not whole.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        found = EmbeddingSet.load(path)
        return {
            "kind": "embedding set",
            "backbone": found.backbone,
            "sha256": found.sha256(),
            "parameters": found.parameters,
            "sites": {name: delta.shape[1] for name, delta in found.deltas.items()},
            "plan": _plan(found.plan, found.plain_plan),
            "training": found.training,
        }
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    return {
        "kind": "bundle",
        **{key: manifest[key] for key in ("schema", "versions", "backbone", "embeddings", "precision", "batch")},
        "digest": manifest.get("digest"),
        "batches": bundle.batches,
        "dynamic": manifest.get("dynamic", []),
        "requests": [request.to_json() for request in bundle.requests],
        "decoder": bundle.decoder,
        "text_encoder": bundle.text_encoder,
        "left_out": manifest.get("left_out", {}),
        "plan": _plan(bundle.plan, bundle.plain_plan),
        "compiler": manifest["compiler"],
        "files": {name: entry["bytes"] for name, entry in manifest["files"].items()},
        "engines": sorted(p.parent.name for p in path.glob("engines/*/engine.json")),
    }
