"""The command line: exit codes, one-line errors on standard error, JSON that parses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import altered, edit_json

from mteo_deploy import __version__
from mteo_deploy.cli import main
from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.sampler import Sampler

VERBS = ("distill", "merge", "export", "build", "sample", "verify", "profile", "bench", "inspect")
QUICK = ["--trajectories", "16", "--iterations", "2", "--batch", "8"]


def call(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: Any) -> str:
    """The error line of a call that must end with exit code 2."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.endswith(f"{line}\n")
    return line


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert f"mteo-deploy {verb}" in result.stdout and "Example:" in result.stdout
    assert verb in call("-h").stdout


def test_installed_command() -> None:
    command = shutil.which("mteo-deploy", path=str(Path(sys.executable).parent))
    assert command is not None, "install the checkout: pip install -e ."
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"mteo-deploy, version {__version__}\n")
    done = subprocess.run([command, "inspect", "nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_unknown_verb_and_option() -> None:
    assert call("distil").exit_code == 2
    assert call("sample", "--nmu", "3").exit_code == 2
    assert call("sample").exit_code == 2


def test_all_verbs_in_a_row(tiny_model: Path, tmp_path: Path) -> None:
    embeddings, bundle = tmp_path / "e.safetensors", tmp_path / "bundle"
    result = call("distill", "--model", tiny_model, "--steps", 2, *QUICK, "-o", embeddings, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["sha256"] == EmbeddingSet.load(embeddings).sha256()

    result = call("export", "--model", tiny_model, "--embeddings", embeddings, "-o", bundle, "-q")
    assert result.exit_code == 0, result.stderr
    assert "2 evaluations, baked, table, fused" in result.stdout and f"next: mteo-deploy build {bundle}" in result.stdout

    result = call("build", bundle, "--threads", 1, "--realisation", "table", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["parts"]["options"] == {"precision": "fp32", "threads": 1}

    images = tmp_path / "images.npz"
    result = call("sample", bundle, "--num", 5, "--seed", 9, "--batch", 2, "-o", images, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["num"] == 5
    with np.load(images) as arrays:
        np.testing.assert_allclose(arrays["images"], Sampler.load(bundle)(num=5, seed=9), rtol=0, atol=1e-5)

    result = call("verify", bundle, "--seconds", 0, "-o", tmp_path / "report.json", "--json")
    assert result.exit_code == 0, result.stdout
    assert json.loads(result.stdout)["passed"] is True
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(result.stdout)


@pytest.mark.parametrize("what", ["bundle", "embeddings"])
def test_inspect(what: str, tiny_bundle: Path, tiny_embeddings: Path) -> None:
    path = tiny_bundle if what == "bundle" else tiny_embeddings
    assert json.loads(call("inspect", path, "--json").stdout)["plan"]["steps"] == 3
    text = call("inspect", path).stdout
    assert "plan: euler, 3 steps, polynomial schedule" in text and "1,536 numbers" in text


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = {entry["engine"]: entry for entry in json.loads(call("doctor", "--json").stdout)}
    assert found["onnxruntime"]["devices"] == ["cpu"] and found["onnxruntime"]["precisions"] == ["fp32"]
    assert "pip install 'mteo-deploy[tensorrt]'" in found["tensorrt"]["problem"]
    assert f"onnxruntime {found['onnxruntime']['version']}: fp32" in call("doctor").stdout


def test_cache(bundle_copy: Path) -> None:
    (name,) = (path.name for path in (bundle_copy / "engines").iterdir())
    assert call("cache", "list", bundle_copy).stdout.endswith("fits the bundle\n")
    left = bundle_copy / "engines" / ".build.abcd1234.tmp"
    left.mkdir()
    (left / ".lock").touch()  # which nobody holds: its writer died
    stale = bundle_copy / "engines" / "onnxruntime-cpu-000000000000"
    shutil.copytree(bundle_copy / "engines" / name, stale)
    entries = {entry["name"]: entry for entry in json.loads(call("cache", "list", bundle_copy, "--json").stdout)}
    assert {name: entry["reason"] for name, entry in entries.items()} == {
        left.name: "left by a build that was interrupted",
        "onnxruntime-cpu-000000000000": "moved from another key",
        name: "",
    }
    assert len(json.loads(call("cache", "clean", bundle_copy, "--json").stdout)) == 2
    assert [path.name for path in (bundle_copy / "engines").iterdir()] == [name]
    assert call("cache", "clean", bundle_copy).stdout == "nothing\n"
    assert call("cache", "clean", bundle_copy, "--all").stdout.startswith(f"deleted {name}, ")
    assert "no built engines" in call("cache", "list", bundle_copy).stdout


def test_sample_to_a_picture(tiny_bundle: Path, tmp_path: Path) -> None:
    result = call("sample", tiny_bundle, "--num", 4, "-o", tmp_path / "grid.png", "-q")
    assert result.exit_code == 0 and "4 images of 3 evaluations" in result.stdout
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_verify_text_and_exit_codes(tiny_bundle: Path, tmp_path: Path) -> None:
    good = call("verify", tiny_bundle, "--seconds", 0)
    assert good.exit_code == 0 and good.stdout.endswith("verified\n") and "FAILED" not in good.stdout
    path = altered(tiny_bundle, tmp_path / "b", lambda manifest: manifest["reference"].update(seed=1))
    assert call("build", path, "--engine", "onnxruntime", "--realisation", "baked", "-q").exit_code == 0
    bad = call("verify", path, "--seconds", 0)
    assert bad.exit_code == 1 and bad.stdout.endswith("NOT verified: noise\n") and "FAILED" in bad.stdout
    as_json = call("verify", path, "--seconds", 0, "--json")
    assert as_json.exit_code == 1 and json.loads(as_json.stdout)["passed"] is False
    budget = call("verify", tiny_bundle, "--seconds", 0.1, "--max-p50-ms", 0.0001)
    assert budget.exit_code == 1 and "NOT verified: budget p50" in budget.stdout


def test_verify_budget_file_and_older_report(tiny_bundle: Path, tmp_path: Path) -> None:
    budgets, report = tmp_path / "budgets.toml", tmp_path / "report.json"
    budgets.write_text("max_p50_ms = 0.0001\n")
    found = call("verify", tiny_bundle, "--seconds", 0.1, "--budgets", budgets, "-o", tmp_path / "junit.xml")
    assert found.exit_code == 1 and "NOT verified: budget p50" in found.stdout
    assert 'failures="1"' in (tmp_path / "junit.xml").read_text()
    assert call("verify", tiny_bundle, "--seconds", 0.1, "--budgets", budgets, "--max-p50-ms", 1e6, "-o", report).exit_code == 0
    again = call("verify", tiny_bundle, "--seconds", 0.1, "--against", report, "-q")
    assert "no slower: step" in again.stdout and "no slower: sample" in again.stdout
    assert "report.json" in refused("verify", tiny_bundle, "--against", tiny_bundle / "manifest.json")
    assert "nothing.toml" in refused("verify", tiny_bundle, "--budgets", tiny_bundle / "nothing.toml")


def test_profile_text_and_trace(tiny_bundle: Path, tmp_path: Path) -> None:
    trace = tmp_path / "sample.trace.json"
    found = call("profile", tiny_bundle, "--loops", 2, "--top", 3, "-o", trace)
    assert found.exit_code == 0 and "convolution" in found.stdout and "time-conditioned" in found.stdout
    assert json.loads(trace.read_text())["traceEvents"]
    as_json = call("profile", tiny_bundle, "--loops", 2, "--json")
    assert json.loads(as_json.stdout)["groups"]
    assert "--loops" in refused("profile", tiny_bundle, "--loops", 0)


def test_bad_input_is_one_line_and_exit_code_2(tiny_model: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "expected a bundle" in refused("sample", tmp_path, "-o", out)
    assert "expected a bundle" in refused("verify", tmp_path)
    assert "expected a bundle" in refused("build", tmp_path)
    assert "expected a bundle" in refused("inspect", tmp_path)
    assert "found nothing there" in refused("inspect", tmp_path / "e.safetensors")
    assert "--num" in refused("sample", tiny_bundle, "--num", 0, "-o", out)
    assert "2**64" in refused("sample", tiny_bundle, "--seed", -1, "-o", out)
    assert ".png or .npz" in refused("sample", tiny_bundle, "-o", tmp_path / "x.gif")
    assert "onnxruntime" in refused("build", tiny_bundle, "--engine", "tflite")
    assert "cpu" in refused("build", tiny_bundle, "--device", "npu")
    assert "--seconds" in refused("verify", tiny_bundle, "--seconds", 0, "--max-overhead", 0.02)
    assert "--steps" in refused("export", "--model", tiny_model, "--plain", "--steps", 0, "-o", out)
    assert "--plain" in refused("export", "--model", tiny_model, "-o", out)
    assert "dpmpp-2m" in refused("distill", "--model", tiny_model, "--solver", "rk45", "-o", tmp_path / "e.safetensors")
    assert "logsnr" in refused("distill", "--model", tiny_model, "--schedule", "cosine", "-o", tmp_path / "e.safetensors")
    assert "--lr" in refused("distill", "--model", tiny_model, "--lr", -1, "-o", tmp_path / "e.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_stale_engine_is_one_line(bundle_copy: Path) -> None:
    (record,) = bundle_copy.glob("engines/*/engine.json")
    edit_json(record, lambda data: data["parts"].update(engine_version="0.0.1"))
    assert f"run: mteo-deploy build {bundle_copy}" in refused("sample", bundle_copy, "-o", bundle_copy / "x.png")


def test_missing_training_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mteo_deploy.distillation", raising=False)
    monkeypatch.delitem(sys.modules, "mteo_deploy.distillation.run", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'mteo-deploy[train]'" in refused("distill", "-o", tmp_path / "e.safetensors")


def test_no_progress_bar_outside_a_terminal(tiny_bundle: Path, tmp_path: Path) -> None:
    result = call("sample", tiny_bundle, "--num", 2, "-o", tmp_path / "x.npz")
    assert (result.exit_code, result.stderr) == (0, "")


def test_output_that_cannot_be_written(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused("sample", tiny_bundle, "--num", 1, "-o", tmp_path / "file" / "grid.png")
    assert str(tmp_path / "file") in message


def test_options_of_engines(bundle_copy: Path) -> None:
    build = ("build", bundle_copy, "--engine", "onnxruntime", "--realisation", "baked", "--threads", 1)
    found = call(*build, "--option", "spinning=off", "--option", "prepacking=off").stdout
    assert "did not fit: spinning changed not given -> off; prepacking changed not given -> off\n" in found
    assert "did not fit" not in call(*build, "--option", "prepacking=off", "--option", "spinning=off").stdout
    assert "--option NAME=VALUE; found 'spinning'" in refused(*build, "--option", "spinning")
    assert "--option spinning=off or run or always [default: run]" in call("doctor").stdout


def test_merge(tiny_embeddings: Path, tmp_path: Path) -> None:
    output = tmp_path / "half.safetensors"
    assert call("merge", tiny_embeddings, "--weights", "0.5", "-o", output).stdout == f"{output}: 0.5 * {tiny_embeddings}\n"
    told = json.loads(call("merge", tiny_embeddings, output, "-o", tmp_path / "mean.safetensors", "--json").stdout)
    assert told["sha256"] == EmbeddingSet.load(tmp_path / "mean.safetensors").sha256()
    assert "merged from 0.5 * " in call("inspect", output).stdout
    line = refused("merge", tiny_embeddings, "--weights", "half", "-o", tmp_path / "no.safetensors")
    assert line == "error: expected --weights as numbers, by comma; found 'half'"
    assert not (tmp_path / "no.safetensors").exists()
