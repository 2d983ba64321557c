"""The VAE of a pipeline: its decoder as a graph of the bundle, from torch to images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, AutoencoderTiny
from helpers import altered, edit_json, failed, relative
from pipelines import add_part, random_vae
from test_imports import BLOCK, python

from mteo_deploy.bundle import Bundle
from mteo_deploy.cli import main
from mteo_deploy.engines.build import build
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import load_backbone
from mteo_deploy.exporters.decoder import Decoder
from mteo_deploy.exporters.evaluate import evaluate
from mteo_deploy.exporters.pipeline import load_pipeline
from mteo_deploy.exporters.taken import SCALED, SHIFTED
from mteo_deploy.exporters.trace import trace_decoder
from mteo_deploy.inspection import inspect
from mteo_deploy.sampler import Sampler
from mteo_deploy.verification import verify


@pytest.fixture(scope="module")
def model(pipeline_model: Path) -> Path:
    return pipeline_model


@pytest.fixture(scope="module")
def bundle(pipeline_bundle: Path) -> Path:
    return pipeline_bundle


@pytest.fixture(scope="module")
def vae(model: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(model / "vae", use_safetensors=True)


def images_of(vae: AutoencoderKL, latents: np.ndarray) -> np.ndarray:
    """As diffusers' pipelines decode."""
    with torch.no_grad():
        scaled = torch.from_numpy(latents) / vae.config.scaling_factor  # Stable Diffusion has no shift_factor
        return np.asarray(vae.decode(scaled).sample)


@pytest.mark.parametrize("size", [None, (12, 10)])
def test_images_equal_torch(bundle: Path, vae: AutoencoderKL, size: tuple[int, int] | None) -> None:
    with Sampler.load(bundle) as sampler:
        given = sampler.bundle.reference_requests(3)
        latents = sampler(num=3, seed=1, requests=given, size=size, latents=True)
        images = sampler(num=3, seed=1, requests=given, size=size)
        assert latents.shape == (3, *sampler.bundle.shape_at(size)) and images.shape[1:] == sampler.bundle.image_shape_at(size)
        assert relative(images, images_of(vae, latents)) < 1e-4
        np.testing.assert_allclose(sampler(num=3, seed=1, batch=2, requests=given, size=size), images, atol=1e-4)


def test_large_images_are_decoded_in_parts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sampler.load(bundle) as sampler:
        latents = np.random.default_rng(0).standard_normal((3, 2, 8, 8), dtype=np.float32)
        whole, calls, session = sampler.decode(latents), [], sampler._other("decoder")
        run = session.run

        def counted(feeds: Any) -> Any:
            calls.append(len(feeds["latents"]))
            return run(feeds)

        monkeypatch.setattr(session, "run", counted)
        monkeypatch.setattr("mteo_deploy.decoding.AT_ONCE", 2 * 16 * 16)
        np.testing.assert_allclose(sampler.decode(latents), whole, atol=1e-5)
        assert calls == [2, 1]


def test_the_manifest_and_one_weight_file(bundle: Path, vae: AutoencoderKL) -> None:
    opened = Bundle.open(bundle)
    entry = opened.decoder
    assert entry is not None and entry["graph"] == "graphs/decoder.onnx" and entry["inputs"] == ["latents"]
    parts = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    assert (entry["scale"], entry["channels"]) == (2, 3) and entry["parameters"] == sum(p.numel() for p in parts)
    assert opened.image_shape_at(None) == (3, 16, 16) and opened.image_shape_at((10, 12)) == (3, 20, 24)
    assert (bundle / "graphs" / "weights.bin").stat().st_size > 4 * entry["parameters"]
    assert {path.name for path in (bundle / "graphs").glob("*.bin")} == {"weights.bin", "conditioned.bin"}
    assert inspect(bundle)["decoder"] == entry


def test_verify_reports_its_share(bundle: Path) -> None:
    report = verify(bundle, seconds=0.3, quiet=True)
    assert report.passed, failed(report)
    names = {check.name for check in report.checks}
    assert {"decoder", "decoder, size 20x24", "decoder finite"} <= names
    share = report.latency["decoder"]
    assert 0 < share["share"] < 1 and any("of a whole sampling" in line for line in report.latency_lines())


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        (lambda images: images * 1.01, {"decoder", "decoder, size 20x24"}),
        (lambda images: np.where(images > 0.5, np.inf, images), {"decoder", "decoder, size 20x24", "decoder finite"}),
    ],
    ids=["scaled", "overflow"],
)
def test_verify_catches_a_faulty_decoder(bundle: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, caught: set[str]) -> None:
    decode = Sampler.decode
    monkeypatch.setattr(Sampler, "decode", lambda self, states: fault(decode(self, states)).astype(np.float32))
    report = verify(bundle, seconds=0, quiet=True)
    assert failed(report) == caught
    assert all("decoder's images" in check.detail for check in report.checks if not check.passed)


def test_verify_catches_a_fault_in_the_graph(bundle: Path, tmp_path: Path) -> None:
    """Another VAE's graph on the same weights: here the one without its last convolution's bias."""
    import onnx

    def zeroed(directory: Path) -> None:
        path = directory / "graphs" / "decoder.onnx"
        graph = onnx.load(str(path), load_external_data=False)
        next(t for t in graph.graph.initializer if t.name == "vae.decoder.conv_out.bias").raw_data = np.ones(3, "<f4").tobytes()
        onnx.save(graph, str(path))

    broken = altered(bundle, tmp_path / "bundle", files=zeroed)
    build(broken, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    assert failed(verify(broken, seconds=0, quiet=True)) == {"decoder", "decoder, size 20x24"}


def test_command_line(bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "prompt.npz", **Bundle.open(bundle).reference_requests(1))
    draw = ["sample", str(bundle), "--num", "2", "-q", "--requests", str(tmp_path / "prompt.npz"), "-o"]
    assert CliRunner().invoke(main, [*draw, str(tmp_path / "a.npz")]).exit_code == 0
    assert CliRunner().invoke(main, [*draw, str(tmp_path / "b.npz"), "--latents"]).exit_code == 0
    assert CliRunner().invoke(main, [*draw, str(tmp_path / "grid.png"), "--size", "12x8"]).exit_code == 0
    assert np.load(tmp_path / "a.npz")["images"].shape == (2, 3, 16, 16)
    assert np.load(tmp_path / "b.npz")["images"].shape == (2, 2, 8, 8)
    assert "decoder    AutoencoderKL" in CliRunner().invoke(main, ["inspect", str(bundle)]).output


def test_decodes_without_torch(bundle: Path, tmp_path: Path) -> None:
    code = """
import numpy as np
from mteo_deploy import Bundle, Sampler, build, verify

path = sys.argv[1]
build(path, engine="openvino", threads=1, seconds=0.2, quiet=True)
with Sampler.load(path, engine="openvino") as sampler:
    images = sampler(num=2, requests=Bundle.open(path).reference_requests(2))
assert images.shape == (2, 3, 16, 16) and np.isfinite(images).all()
report = verify(path, engine="openvino", seconds=0, quiet=True)
assert report.passed, report.checks
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
print("done")
"""
    done = python(BLOCK + code, str(altered(bundle, tmp_path / "bundle")))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_what_does_not_fit(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    edit_json(index, lambda found: found["vae"].__setitem__(1, "AutoencoderDC"))
    adapter = load_backbone(tmp_path / "pipeline")
    with pytest.raises(InputError, match=r"AutoencoderKL or AutoencoderTiny.*found a AutoencoderDC.*--latents"):
        load_pipeline(adapter)
    assert "the vae (AutoencoderDC) was left out with --latents" in load_pipeline(adapter, latents=True).left_out["decoder"]
    edit_json(index, lambda found: found["vae"].__setitem__(1, "AutoencoderKL"))
    add_part(tmp_path / "pipeline", "vae", random_vae(latent_channels=4))
    with pytest.raises(InputError, match=r"expected a VAE of 2 latent channels.*has 4.*--latents"):
        load_pipeline(load_backbone(tmp_path / "pipeline"))
    edit_json(tmp_path / "pipeline" / "vae" / "config.json", lambda config: config.update(decoder_type="wide"))
    with pytest.raises(InputError, match=r"vae/config.json; found decoder_type 'wide'"):
        load_pipeline(load_backbone(tmp_path / "pipeline"))
    shutil.rmtree(tmp_path / "pipeline" / "vae")  # a backbone alone, with the index of the whole
    with pytest.raises(InputError, match=r"and no directory .*vae; for a bundle .*--latents"):
        load_pipeline(load_backbone(tmp_path / "pipeline"))
    found = load_pipeline(load_backbone(tmp_path / "pipeline", leave_out=["vae"]))
    assert found.decoder is None and "with --leave-out" in found.left_out["decoder"]


def test_tiny_autoencoder_and_means_per_channel() -> None:
    torch.manual_seed(2)
    options: dict[str, Any] = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = AutoencoderTiny(**options, latent_channels=2, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    latents = torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        found = evaluate(trace_decoder(Decoder(tiny), (2, 6, 6)), {"latents": latents.numpy()})
        assert found is not None and relative(found[0], tiny.decode(latents).sample.numpy()) < 1e-5
        vae = random_vae(shift_factor=None, latents_mean=(0.1, -0.2), latents_std=(0.7, 1.3)).eval()
        mean, std = (torch.tensor(values).reshape(1, 2, 1, 1) for values in ((0.1, -0.2), (0.7, 1.3)))
        torch.testing.assert_close(Decoder(vae)(latents), vae.decode(latents * std / 0.5 + mean).sample)
        torch.testing.assert_close(Decoder(vae, SCALED)(latents), vae.decode(latents / 0.5).sample)  # what StableDiffusion does
        shifted = random_vae().eval()
        torch.testing.assert_close(Decoder(shifted, SHIFTED)(latents), shifted.decode(latents / 0.5 + 0.1).sample)
        torch.testing.assert_close(Decoder(shifted, SCALED)(latents), shifted.decode(latents / 0.5).sample)


def tiled(vae: AutoencoderKL, latents: np.ndarray, tile: int) -> np.ndarray:
    """As diffusers decodes in tiles of so many latents."""
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = tile, 2 * tile
    try:
        return images_of(vae, latents)
    finally:
        vae.disable_tiling()


@pytest.mark.parametrize(("tile", "size"), [(4, (8, 8)), (8, (14, 20)), (8, (10, 30))])
def test_tiles_are_diffusers(bundle: Path, vae: AutoencoderKL, tile: int, size: tuple[int, int]) -> None:
    """Overlap and blending, with tiles that are cut short at the edges; and not the image decoded whole."""
    latents = np.random.default_rng(3).standard_normal((3, 2, *size), dtype=np.float32)
    with Sampler.load(bundle) as sampler:
        found, whole = sampler.decode(latents, tile), sampler.decode(latents)
        assert found.shape == whole.shape and relative(found, tiled(vae, latents, tile)) < 1e-5
        assert relative(found, whole) > 1e-2
        np.testing.assert_array_equal(sampler.decode(latents, 0), whole)
        np.testing.assert_array_equal(sampler.decode(latents, 32), whole)  # not larger than a tile
        given = sampler.bundle.reference_requests(2)
        drawn = sampler(2, requests=given, size=size, latents=True)
        np.testing.assert_allclose(sampler(2, requests=given, size=size, tile=tile), sampler.decode(drawn, tile), atol=1e-5)


def test_a_bundle_exported_for_tiles(model: Path, vae: AutoencoderKL, tmp_path: Path) -> None:
    """Its states have one size, its decoder takes any; verify compares tiles with tiles."""
    output, requests = tmp_path / "bundle", tmp_path / "prompt.npz"
    export = ["export", "--model", str(model), "--plain", "--steps", "1", "--realisation", "baked", "-q", "-o", str(output)]
    done = CliRunner().invoke(main, [*export, "--tile", "4"])
    assert done.exit_code == 0, done.output
    built = build(output, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    entry = Bundle.open(output).decoder
    assert built and entry is not None and entry["tile"] == 4 and entry["open"]
    assert Bundle.open(output).manifest["dynamic"] == ["batch"]
    report = verify(output, seconds=0, quiet=True)
    assert report.passed, failed(report)
    np.savez(requests, **Bundle.open(output).reference_requests(1))
    draw = ["sample", str(output), "--num", "2", "--requests", str(requests), "-q"]
    for name, options in {"tiles": [], "whole": ["--tile", "0"], "latents": ["--latents"]}.items():
        done = CliRunner().invoke(main, [*draw, *options, "-o", str(tmp_path / f"{name}.npz")])
        assert done.exit_code == 0 and ("of it decoding" in done.output) == (name != "latents"), done.output
    tiles, whole, latents = (np.load(tmp_path / f"{name}.npz")["images"] for name in ("tiles", "whole", "latents"))
    assert relative(tiles, tiled(vae, latents, 4)) < 1e-4 and relative(whole, images_of(vae, latents)) < 1e-4
    found = CliRunner().invoke(main, [*draw, "--json", "-o", str(tmp_path / "again.npz")])
    assert 0 < json.loads(found.output)["decoding"] < json.loads(found.output)["seconds"]


def test_tiles_that_are_refused(model: Path, bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    fixed = altered(bundle, tmp_path / "fixed", lambda manifest: manifest["decoder"].update(open=False))
    build(fixed, engine="onnxruntime", threads=1, seconds=0.1, quiet=True)
    with Sampler.load(fixed) as sampler, pytest.raises(InputError, match=r"any height and width for --tile.*--tile 8, or with"):
        sampler(1, requests=sampler.bundle.reference_requests(1), tile=8)
    for tile in (6, -4):
        with pytest.raises(InputError, match=f"multiple of 4 latents .*found {tile}"):
            load_pipeline(load_backbone(model), tile)
    with pytest.raises(InputError, match="--tile with a pipeline whose VAE is decoded"):
        load_pipeline(load_backbone(tiny_model), 8)
