"""``evaluate`` and the Fréchet distance: closed forms, a feature network in ONNX, a real bundle, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, Once
from helpers import Array
from onnx import TensorProto, helper, numpy_helper

from mteo_deploy import dataset
from mteo_deploy import images as pictures
from mteo_deploy.cli import main
from mteo_deploy.distillation import Recipe, distill
from mteo_deploy.engines.build import build
from mteo_deploy.errors import EngineError, InputError, MissingPackageError
from mteo_deploy.evaluation import MTEO, PLAIN, REFERENCE, evaluate
from mteo_deploy.exporters.base import load_backbone
from mteo_deploy.exporters.export import export
from mteo_deploy.quality import Statistics, features_of, frechet_distance, gap_closed
from mteo_deploy.sampler import Sampler

WIDTH = 6


def write_features(path: Path, pixels: int) -> Array:
    """A feature network ``[n, c, h, w] -> [n, 2, 3]``, linear; returns its weights ``[pixels, 6]``."""
    weights = np.random.default_rng(0).standard_normal((pixels, WIDTH)).astype(np.float32) / pixels**0.5
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["product"]),
        helper.make_node("Reshape", ["product", "shape"], ["features"]),
    ]
    constants = [
        numpy_helper.from_array(weights, "weights"),
        numpy_helper.from_array(np.array([-1, 2, 3], np.int64), "shape"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", "c", "h", "w"])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 2, 3])
    graph = helper.make_graph(nodes, "features", [images], [features], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return weights


@pytest.fixture(scope="session")
def network(once: Once) -> Path:
    return once("features", lambda directory: (directory.mkdir(), write_features(directory / "n.onnx", 64))) / "n.onnx"


@pytest.fixture
def data(tiny_model: Path) -> Path:
    return tiny_model.parents[1] / "digits.npz"


def gaussian(mean: list[float], variance: list[float]) -> Statistics:
    return Statistics(np.array(mean), np.diag(variance))


def test_distance_of_diagonal_gaussians() -> None:
    """Closed form where covariances commute: |m_a - m_b|^2 + sum (s_a - s_b)^2; features that never fire included."""
    a, b = gaussian([0, 1, 5], [4, 9, 0]), gaussian([3, 1, 5], [1, 25, 0])
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 4, abs=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_distance_does_not_change_under_rotation() -> None:
    generator = np.random.default_rng(1)
    rotation = np.linalg.qr(generator.standard_normal((3, 3)))[0]
    a, b = gaussian([0, 1, 5], [4, 9, 0.1]), gaussian([3, 1, 5], [1, 25, 0.2])
    turned = [Statistics(rotation @ s.mean, rotation @ s.covariance @ rotation.T) for s in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    with pytest.raises(InputError, match="same features; found 3 and 2"):
        frechet_distance(a, gaussian([0, 0], [1, 1]))


def test_statistics_are_those_of_numpy(tmp_path: Path) -> None:
    features = np.random.default_rng(2).standard_normal((50, 4))
    found = Statistics.of(features)
    np.testing.assert_allclose(found.covariance, np.cov(features.T), rtol=1e-12)
    np.savez(tmp_path / "s.npz", mu=found.mean, sigma=found.covariance)
    assert frechet_distance(found, Statistics.load(tmp_path / "s.npz")) == pytest.approx(0, abs=1e-9)
    np.savez(tmp_path / "bad.npz", mu=found.mean, sigma=found.covariance[:2])
    with pytest.raises(InputError, match=r"expected mu \[n\] and sigma \[n, n\]"):
        Statistics.load(tmp_path / "bad.npz")
    with pytest.raises(InputError, match="found NaN"):
        Statistics.of(np.full((3, 2), np.nan))


def test_gap_closed() -> None:
    assert gap_closed(plain=10.0, mteo=3.0, reference=1.0) == pytest.approx(7 / 9)
    assert gap_closed(plain=1.0, mteo=3.0, reference=1.0) is None


def test_a_feature_network_is_run(tmp_path: Path) -> None:
    weights = write_features(tmp_path / "n.onnx", 64)
    images = np.random.default_rng(3).uniform(-1, 1, (5, 1, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(features_of(str(tmp_path / "n.onnx"))(images), images.reshape(5, 64) @ weights, atol=1e-5)
    with pytest.raises(InputError, match=r"does not take images \[5, 1, 4, 4\]"):
        features_of(str(tmp_path / "n.onnx"))(images[:, :, :4, :4])


def test_evaluate_is_what_it_says(tiny_bundle: Path, network: Path, data: Path) -> None:
    """Against distances and errors of the same images by hand."""
    found = evaluate(tiny_bundle, data, features=str(network), num=96, batch=40, seeds=(0, 3), quiet=True)
    assert {name: one.evaluations for name, one in found.samplers.items()} == {MTEO: 3, PLAIN: 3, REFERENCE: 36}
    assert found.samplers[REFERENCE].error == (0.0, 0.0)
    extract = features_of(str(network))
    real = dataset.read(data, (8, 8), 1).astype(np.float32) / 127.5 - 1
    with Sampler.load(tiny_bundle) as sampler:
        images, plans = sampler(num=96, seed=3, batch=96).clip(-1, 1), (sampler.reference_plan, sampler.plan)
        reference, plain = (sampler.conditioned(plan, num=96, seed=3, batch=96).clip(-1, 1) for plan in plans)
    by_hand = frechet_distance(Statistics.of(extract(images)), Statistics.of(extract(real)))
    assert found.samplers[MTEO].frechet[1] == pytest.approx(by_hand, rel=1e-4)
    for name, one in ((MTEO, images), (PLAIN, plain)):
        assert found.samplers[name].error[1] == pytest.approx(np.square(one - reference).mean(), rel=1e-4)
    assert found.samplers[MTEO].frechet[0] != found.samplers[MTEO].frechet[1]


def test_plain_is_the_plan_before_its_numbers_were_learned(tiny_model: Path, network: Path, data: Path, tmp_path: Path) -> None:
    recipe = Recipe(trajectories=8, iterations=3, batch=8, lr=1.0, teacher_evaluations=6, learn=("coefficients",))
    learned = distill(tiny_model, tmp_path / "e.safetensors", steps=2, recipe=recipe, quiet=True)
    bundle = export(tmp_path / "b", model=tiny_model, embeddings=learned, realisations=("table",), quiet=True)
    build(bundle, engine="onnxruntime", realisation="table", threads=1, quiet=True)
    found = evaluate(bundle.path, data, features=str(network), num=8, batch=8, quiet=True)
    plans = bundle.reference_plan, load_backbone(tiny_model).compile_plan(2), learned.plan
    with Sampler.load(bundle.path) as sampler:
        reference, plain, moved = (sampler.conditioned(plan, num=8, batch=8).clip(-1, 1) for plan in plans)
    errors = [float(np.square(one - reference).mean()) for one in (plain, moved)]
    assert found.samplers[PLAIN].error[0] == pytest.approx(errors[0], rel=1e-4) != pytest.approx(errors[1], rel=1e-2)


def test_command(tiny_bundle: Path, network: Path, data: Path) -> None:
    arguments = ["evaluate", str(tiny_bundle), "--data", str(data), "--features", str(network), "--num", "16", "--seeds", "0,1"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0 and "reference" in shown.output and "gap" in shown.output, shown.output
    data = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    assert data["num"] == 16 and len(data["samplers"]["mteo"]["frechet"]) == 2 and len(data["gap_closed"]) == 2


def test_what_is_refused(tiny_bundle: Path, network: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"inception, or a feature network as an \.onnx"):
        evaluate(tiny_bundle, data, features="vgg")
    (tmp_path / "bad.onnx").write_text("no graph")
    with pytest.raises(EngineError, match=r"bad\.onnx"):
        evaluate(tiny_bundle, data, features=str(tmp_path / "bad.onnx"))
    with pytest.raises(InputError, match="--num of 2 or more"):
        evaluate(tiny_bundle, data, features=str(network), num=1)
    with pytest.raises(InputError, match="none of these"):
        evaluate(tiny_bundle, tmp_path / "nothing", features=str(network))
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(InputError, match="same features; found 6 and 2"):
        evaluate(tiny_bundle, tmp_path / "s.npz", features=str(network), num=4, quiet=True)


def test_inception_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(MissingPackageError, match="pip install torch-fidelity"):
        features_of("inception")


def test_images_are_read_alike_from_folder_zip_and_array(tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 255, (3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    for i, one in enumerate(pixels):
        pictures.write_png(one[..., None], tmp_path / "folder" / f"{i}.png")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for path in (tmp_path / "folder").iterdir():
            archive.write(path, path.name)
    for name in ("a.npz", "folder", "b.zip"):
        np.testing.assert_array_equal(dataset.read(tmp_path / name, (8, 8), 1)[:, 0], pixels)
    assert dataset.read(tmp_path / "folder", (4, 6), 3).shape == (3, 3, 4, 6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found none"):
        dataset.read(tmp_path / "empty", (8, 8), 1)
    with pytest.raises(InputError, match="1 or 3 channels"):
        dataset.read(tmp_path / "folder", (8, 8), 4)


def test_the_example_writes_the_classifiers_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`examples/feature_network.py`, on the classifier that the published figures are measured with."""
    path, classifier = tmp_path / "features.onnx", ROOT / "benchmarks" / "classifier.safetensors"
    command = [sys.executable, str(ROOT / "examples" / "feature_network.py"), str(classifier), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 1, 28, 28)).astype(np.float32)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from train_classifier import load

    expected = load(classifier).features(torch.from_numpy(images)).numpy()
    found = features_of(str(path))(images)
    assert found.shape == (3, 128)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
