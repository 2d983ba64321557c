"""The Hub, with the real huggingface_hub against a server on this machine: a bundle there and back, a backbone by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import altered
from hub_server import Repositories, hub

from mteo_deploy import hub as ours
from mteo_deploy.bundle import Bundle
from mteo_deploy.errors import InputError


@pytest.fixture
def repositories() -> Repositories:
    return {}


@pytest.fixture
def endpoint(repositories: Repositories) -> Iterator[str]:
    with hub(repositories) as address:
        yield address


def call(endpoint: str, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads where the Hub is when it is imported."""
    variables = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_test", **environment}
    variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", "from mteo_deploy.cli import main; main()", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=120)


def test_a_bundle_goes_there_and_back(
    endpoint: str, repositories: Repositories, tiny_bundle: Path, tiny_sampler: object, tmp_path: Path
) -> None:
    repositories["org/tiny"] = {"graphs/old.onnx": b"of an older bundle", ".gitattributes": b""}
    pushed = call(endpoint, tmp_path, "push", str(tiny_bundle), "org/tiny")
    assert pushed.returncode == 0, pushed.stderr
    files = set(repositories["org/tiny"])
    assert files == {*Bundle.open(tiny_bundle).manifest["files"], "manifest.json", "README.md", ".gitattributes"}
    card = repositories["org/tiny"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: mteo-deploy") and "mteo-deploy pull org/tiny" in card and "UNet2DModel" in card
    pulled = call(endpoint, tmp_path, "pull", "org/tiny", "-o", str(tmp_path / "back"))
    assert pulled.returncode == 0, pulled.stderr
    assert "all hashes right" in pulled.stdout
    assert Bundle.open(tmp_path / "back").manifest == Bundle.open(tiny_bundle).manifest
    assert not (tmp_path / "back" / ".cache").exists() and not (tmp_path / "back" / "engines").exists()


def test_a_spoiled_bundle_is_not_kept(endpoint: str, repositories: Repositories, tiny_bundle: Path, tmp_path: Path) -> None:
    assert call(endpoint, tmp_path, "push", str(tiny_bundle), "org/tiny").returncode == 0
    name = next(path for path in repositories["org/tiny"] if path.endswith("weights.bin"))
    data = repositories["org/tiny"][name]
    repositories["org/tiny"][name] = bytes([data[0] ^ 1]) + data[1:]
    pulled = call(endpoint, tmp_path, "pull", "org/tiny", "-o", str(tmp_path / "back"))
    assert pulled.returncode == 2 and "was altered" in pulled.stderr
    assert not (tmp_path / "back").exists()


def test_what_is_not_there(endpoint: str, repositories: Repositories, tmp_path: Path) -> None:
    repositories["org/other"] = {"README.md": b"no bundle"}
    missing = call(endpoint, tmp_path, "pull", "org/none", "-o", str(tmp_path / "b"))
    assert missing.returncode == 2 and "expected bundle org/none on the Hub; found none" in missing.stderr
    revision = call(endpoint, tmp_path, "pull", "org/other", "--revision", "v2", "-o", str(tmp_path / "b"))
    assert revision.returncode == 2 and "expected a revision" in revision.stderr
    other = call(endpoint, tmp_path, "pull", "org/other", "-o", str(tmp_path / "b"))
    assert other.returncode == 2 and "expected a bundle" in other.stderr
    offline = call(endpoint, tmp_path, "pull", "org/other", "-o", str(tmp_path / "b"), HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "cannot be reached" in offline.stderr and len(offline.stderr.splitlines()) == 1
    nobody = call("http://127.0.0.1:9", tmp_path, "pull", "org/new", "-o", str(tmp_path / "b"))
    assert nobody.returncode == 2 and "cannot be reached" in nobody.stderr and len(nobody.stderr.splitlines()) == 1
    assert not (tmp_path / "b").exists()


def test_a_repository_is_told_from_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ours.is_repository("org/name") and ours.is_repository(Path("org/name@v1.0"))
    assert not any(map(ours.is_repository, ["name", "a/b/c", "./x/y", str(tmp_path), "/abs/name"]))
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not ours.is_repository("org/name")
    with pytest.raises(InputError, match="org/name"):
        ours.pull("name", tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("---\ntags: [a]\nlicense: 'mit'\n---\nlicense: other", "mit"),
        ("# no front matter\nlicense: mit", None),
        ("---\ntags: [a]\n---\nlicense: mit", None),
        (None, None),
    ],
)
def test_licence_of_a_card(text: str | None, expected: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert ours.license_of(tmp_path) == expected


def test_card_names_licence_and_base(tiny_bundle: Path, tmp_path: Path) -> None:
    def change(manifest: dict[str, dict[str, str]]) -> None:
        manifest["backbone"] |= {"source": "org/base@main", "license": "mit"}

    card = ours.card(Bundle.open(altered(tiny_bundle, tmp_path / "b", change)), "org/new")
    assert "license: mit\nbase_model: org/base\n" in card
    assert json.loads((tiny_bundle / "manifest.json").read_text())["backbone"]["family"] in card


def repository_of(pipeline: Path) -> dict[str, bytes]:
    return {path.relative_to(pipeline).as_posix(): path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}


def test_a_backbone_by_its_name(endpoint: str, repositories: Repositories, tiny_model: Path, tmp_path: Path) -> None:
    """No pickled weights are fetched; the card's licence is kept; the second time it comes from the cache, offline."""
    files = repository_of(tiny_model) | {
        "unet/diffusion_pytorch_model.bin": b"pickled",
        "README.md": b"---\nlicense: mit\n---\n",
    }
    repositories["org/tiny"] = files
    shown = call(endpoint, tmp_path, "inspect", "--model", "org/tiny", "--revision", "main", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["source"] == "org/tiny@main"
    assert not list(tmp_path.rglob("*.bin"))
    export = ("export", "--model", "org/tiny", "--plain", "--steps", "1", "--realisation", "table", "-q")
    done = call(endpoint, tmp_path, *export, "-o", str(tmp_path / "b"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    backbone = Bundle.open(tmp_path / "b").manifest["backbone"]
    assert (backbone["source"], backbone["license"]) == ("org/tiny", "mit")
    missing = call(endpoint, tmp_path, "inspect", "--model", "org/none")
    assert missing.returncode == 2 and "org/none, which is no directory here, on the Hub; found none" in missing.stderr
    alone = call(endpoint, tmp_path, "export", "--revision", "v1", "-o", str(tmp_path / "c"))
    assert alone.returncode == 2 and "--revision with --model" in alone.stderr
