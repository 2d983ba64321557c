"""Pipelines as widely used repositories publish them: configurations in ``tests/published/``, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import redraw
from pipelines import add_clip

from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.exporters.taken import current_class

ENTRIES = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "published").glob("*.json"))}
FURTHER = ("DiT-XL-2-256", "stable-diffusion-v1-5")
"""Taken on to ``verify``."""


def published(entry: dict[str, Any], path: Path) -> Path:
    """The repository's directory, networks of its classes and configurations, smaller and random."""
    for name, content in entry["files"].items():
        config, file = content | entry.get("smaller", {}).get(name, {}), path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.name == "config.json":
            torch.manual_seed(0)
            network = getattr(diffusers, current_class(config["_class_name"], config)).from_config(config)
            redraw(network).save_pretrained(file.parent)
        file.write_text(json.dumps(config))
    if "clip" in entry:
        add_clip(path, "", entry["clip"], None)
    return path


def run(*arguments: Any, code: int = 0) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ENTRIES)
def test_published_pipelines(name: str, tmp_path: Path) -> None:
    entry, bundle = ENTRIES[name], tmp_path / "bundle"
    model = ["--model", published(entry, tmp_path / name)]
    model += ["--size", "x".join(map(str, entry["size"]))] if "size" in entry else []
    if "refused" in entry:
        assert entry["refused"] in run("inspect", *model, code=2)
        assert entry["refused"] in run("export", *model, "--plain", code=2)
        return
    model += [argument for part in entry.get("leave_out", []) for argument in ("--leave-out", part)]
    told = run("inspect", *model, "--json")
    assert json.loads(told)["source"] == name and json.loads(told)["tokens"] == entry.get(
        "tokens", 77 if "clip" in entry else None
    )
    export = ["export", *model, "--plain", "--steps", 1, "--realisation", "baked", "-q", "-o", bundle]
    if entry.get("latents"):
        vae = entry["files"]["model_index.json"]["vae"][1]
        assert f"found a {vae}" in run(*export, code=2)
        export.append("--latents")
    run(*export)
    manifest = Bundle.open(bundle).manifest
    assert {*entry.get("left_out", ())} <= {*manifest["left_out"]} and ("decoder" in manifest["left_out"]) == (
        bool(entry.get("latents")) or "vae" in entry.get("leave_out", ())
    )
    if name in FURTHER:
        run("build", bundle, "--engine", "onnxruntime", "--threads", 1, "-q")
        given = ["--prompt", "a castle"] if "clip" in entry else ["--class-labels", "3"]
        run("sample", bundle, "--num", 2, *given, "-q", "-o", tmp_path / "images.npz")
        images = np.load(tmp_path / "images.npz")["images"]
        assert images.shape == (2, 3, 64, 64) and np.isfinite(images).all() and np.abs(images[0] - images[1]).max() > 1e-3
        run("verify", bundle, "--engine", "onnxruntime", "--seconds", 0)
