"""``export --precision auto``: what is measured decides, and what cannot be had is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.errors import InputError
from mteo_deploy.exporters import auto
from mteo_deploy.exporters.auto import Tried, export_fastest, pick
from mteo_deploy.inspection import tried_rows

FIRST = Tried("fp32", error=0.0, ratio=(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([Tried("int8", error=0.02, ratio=(0.6, 0.5, 0.7))], "int8"),
        ([Tried("int8", error=0.06, ratio=(0.6, 0.5, 0.7))], "fp32"),  # too far
        ([Tried("int8", error=0.02, ratio=(0.98, 0.9, 1.02))], "fp32"),  # within the noise
        ([Tried("bf16", error=0.01, ratio=(0.8, 0.7, 0.9)), Tried("int8", error=0.02, ratio=(0.6, 0.5, 0.7))], "int8"),
        ([Tried("bf16", error=0.01, ratio=(0.8, 0.7, 0.9)), Tried("int8", error=0.2, ratio=(0.6, 0.5, 0.7))], "bf16"),
        ([Tried("bf16", refused="no engine"), Tried("int8", error=0.02, ratio=(1.6, 1.5, 1.7))], "fp32"),
    ],
)
def test_the_fastest_that_is_near_enough(others: list[Tried], expected: str) -> None:
    assert pick([FIRST, *others], 0.05).precision == expected


def test_all_are_measured_and_one_is_left(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {"model": tiny_model, "plain": True, "steps": 2, "realisations": ["baked"], "quiet": True}
    monkeypatch.setattr(auto, "pick", lambda tried, max_error: tried[1])  # whatever is faster here
    bundle = export_fastest(
        tmp_path / "bundle", engine="onnxruntime", candidates=("fp32", "fp16", "bf16", "int4", "fp32+bf16"), seconds=0.2,
        keep=["conv_in"], max_error=0.1, **made,
    )  # fmt: skip
    found = bundle.manifest["compiler"]["auto"]
    tried = {one["precision"]: one for one in found["tried"][:-1]}
    assert bundle.manifest["precision"] == "fp16" and found["chosen"] == 1 and found["max_error"] == 0.1
    assert tried["fp32"]["error"] == 0 and 0 < tried["fp16"]["error"] < 0.01
    assert all(low <= median <= high for median, low, high in (tried["fp32"]["ratio"], tried["fp16"]["ratio"]))
    assert "found bf16" in tried["bf16"]["refused"] and "int4" in tried["int4"]["refused"]
    assert "onnxruntime does not" in found["tried"][-1]["refused"] and found["tried"][-1]["hint"] == "bf16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
    assert not (bundle.path / "engines").exists()


def test_int8_meets_the_limit_or_is_not_taken(token_model: Path, tmp_path: Path) -> None:
    """From the command line, with int8 in the way it is meant: layers in float32 where the limit or an engine asks for it."""
    out = tmp_path / "bundle"
    arguments = ["--model", str(token_model), "--plain", "--steps", "1", "--realisation", "baked", "-o", str(out), "--json"]
    found = CliRunner().invoke(main, ["export", "--precision", "auto", "--max-error", "0.03", *arguments])
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)["compiler"]["auto"]
    rows = tried_rows(told)
    assert [i for i, row in enumerate(rows) if row[-1] == "chosen"] == [told["chosen"]]
    tried = [(one["precision"], one["hint"], one["engine"]) for one in told["tried"]]
    assert [one[:2] for one in tried if one[0] in ("fp32", "fp16", "bf16")] == [
        ("fp32", "fp32"), ("fp32", "bf16"), ("fp16", "fp32"), ("bf16", "fp32"),
    ]  # fmt: skip
    both = [("int8", "fp32", "onnxruntime"), ("int8", "fp32", "openvino"), ("int8", "bf16", "openvino")]
    assert tried[4:] == both and told["max_error"] == 0.03
    for row, one in zip(rows[4:], told["tried"][4:], strict=True):
        assert "computes faster in int8" in row[-1] if one["refused"] else 0 < one["error"] < 0.1
    chosen = told["tried"][told["chosen"]]
    assert Bundle.open(out).manifest["precision"] == chosen["precision"] and chosen["error"] <= 0.03


def test_what_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected --max-error above 0"):
        export_fastest(tmp_path / "b", model=tiny_model, plain=True, max_error=0.0)
    found = CliRunner().invoke(main, ["export", "--precision", "fp16", "--engine", "openvino", "-o", str(tmp_path / "b")])
    assert found.exit_code == 2 and "expected --engine with --precision int8, fp8 or auto" in found.output
    assert not any(tmp_path.iterdir())
