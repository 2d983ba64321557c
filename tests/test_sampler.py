"""The sampler: an image depends on (seed, index) and nothing else, and is the torch sampler's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import relative, torch_states

from mteo_deploy.embeddings import EmbeddingSet
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.images import grid, save, to_uint8
from mteo_deploy.sampler import Sampler, noise_for

BATCHES = (1, 3, 16)


@pytest.fixture(params=["tiny_sampler", "history_sampler"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    found: Sampler = request.getfixturevalue(request.param)
    return found


def test_noise_of_an_image_is_its_own() -> None:
    whole = noise_for((1, 8, 8), 4, range(16))
    for batch in BATCHES:
        parts = [noise_for((1, 8, 8), 4, range(i, min(i + batch, 16))) for i in range(0, 16, batch)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(noise_for((1, 8, 8), 4, [9, 2]), whole[[9, 2]])


def test_noise_is_standard_normal_and_independent() -> None:
    noise = noise_for((64,), 0, range(2000)).astype(np.float64)
    other = noise_for((64,), 1, range(2000)).astype(np.float64)
    n = noise.size
    assert abs(noise.mean()) < 4 / np.sqrt(n)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs((noise * other).mean()) < 4 / np.sqrt(n), "two seeds"
    assert abs((noise[1:] * noise[:-1]).mean()) < 4 / np.sqrt(n), "two images"


def test_noise_is_what_it_always_was() -> None:
    """Philox with key (seed, index) is fixed by its paper; a change here changes every published seed."""
    expected = np.random.Generator(np.random.Philox(key=(12 << 64) + 5)).standard_normal(4, dtype=np.float32)
    np.testing.assert_array_equal(noise_for((4,), 5, [12])[0], expected)


def test_same_seed_same_image_at_any_batch(sampler: Sampler) -> None:
    found = [sampler(num=16, seed=3, batch=batch) for batch in BATCHES]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(sampler(num=2, seed=3), found[0][:2], atol=1e-5, rtol=0)


def test_other_seed_or_index_other_image(sampler: Sampler) -> None:
    a, b = sampler(num=4, seed=0), sampler(num=4, seed=1)
    assert a.dtype == np.float32 and a.shape == (4, 1, 8, 8) and np.isfinite(a).all()
    everything = np.concatenate([a, b]).reshape(8, -1)
    distances = np.linalg.norm(everything[:, None] - everything[None], axis=-1)
    assert distances[~np.eye(8, dtype=bool)].min() > 0.1


def test_round_trip_equals_torch(tiny_sampler: Sampler, learned: EmbeddingSet, tiny_adapter: Adapter) -> None:
    """distill -> export -> build -> sample, against the plan run in torch on the embedding set's own file."""
    expected = torch_states(tiny_adapter, learned, noise_for((1, 8, 8), 21, range(8)))
    states = tiny_sampler.states(noise_for((1, 8, 8), 21, range(8)))
    assert max(relative(a, b) for a, b in zip(states, expected, strict=True)) < 1e-4
    assert relative(tiny_sampler(num=8, seed=21), expected[-1]) < 1e-4


def test_round_trip_with_history_equals_torch(
    history_sampler: Sampler, plain_history: EmbeddingSet, tiny_adapter: Adapter
) -> None:
    expected = torch_states(tiny_adapter, plain_history, noise_for((1, 8, 8), 21, range(8)))
    assert relative(history_sampler(num=8, seed=21, batch=3), expected[-1]) < 1e-4


def test_learned_embeddings_are_what_was_baked(tiny_sampler: Sampler, learned: EmbeddingSet, tiny_adapter: Adapter) -> None:
    """The control of the round trip: with the pretrained embeddings the images are others."""
    zero = EmbeddingSet({name: np.zeros_like(delta) for name, delta in learned.deltas.items()}, learned.plan, learned.backbone)
    plain = torch_states(tiny_adapter, zero, noise_for((1, 8, 8), 21, range(8)))[-1]
    assert relative(tiny_sampler(num=8, seed=21), plain) > 0.1
    conditioned = tiny_sampler.conditioned(learned.plan, num=8, seed=21, batch=5)
    assert relative(conditioned, plain) < 1e-4


def test_baked_images_are_nearer_to_the_reference_than_the_plain_solver(tiny_sampler: Sampler) -> None:
    """The point of the project, in the engine alone: fresh seeds, reference run on the conditioned graph."""
    reference = tiny_sampler.conditioned(tiny_sampler.reference_plan, num=32, seed=77)
    plain = tiny_sampler.conditioned(tiny_sampler.bundle.plan, num=32, seed=77)
    baked = tiny_sampler(num=32, seed=77)
    assert np.mean((baked - reference) ** 2) < 0.7 * np.mean((plain - reference) ** 2)


def test_progress_counts_images(tiny_sampler: Sampler) -> None:
    counts: list[int] = []
    tiny_sampler(num=7, batch=3, progress=counts.append)
    assert counts == [3, 3, 1]


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"seed": 2**64}, {"num": 0}, {"batch": 0}, {"num": -2}])
def test_out_of_range(arguments: dict[str, int], tiny_sampler: Sampler) -> None:
    with pytest.raises(InputError, match="found"):
        tiny_sampler(**arguments)


def test_largest_seed(tiny_sampler: Sampler) -> None:
    assert relative(tiny_sampler(seed=2**64 - 1), tiny_sampler(seed=2**63)) > 0.01


# --- images ----------------------------------------------------------------------------------------------------------


def test_pixels() -> None:
    values = np.array([-1.5, -1.0, 0.0, 1.0, 7.0], np.float32).reshape(5, 1, 1, 1)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255]
    sheet = grid(np.zeros((5, 1, 2, 2), np.float32) - 1, columns=3, gap=1)
    assert sheet.shape == (7, 10, 1) and int((sheet == 0).sum()) == 5 * 4


def test_save(tiny_sampler: Sampler, tmp_path: Path) -> None:
    from PIL import Image

    images = tiny_sampler(num=3)
    for name in ("a/images.npz", "a/grid.png", "folder"):
        save(images, tmp_path / name)
    with np.load(tmp_path / "a" / "images.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], images)
    with Image.open(tmp_path / "folder" / "00002.png") as single:
        np.testing.assert_array_equal(np.asarray(single), to_uint8(images)[2, :, :, 0])
    assert len(list((tmp_path / "folder").iterdir())) == 3
    with Image.open(tmp_path / "a" / "grid.png") as sheet:
        assert sheet.size == (2 * (2 * 8 + 3 * 2), 2 * (2 * 8 + 3 * 2))
    with pytest.raises(InputError, match=r"\.png or \.npz"):
        save(images, tmp_path / "images.gif")


def test_png_of_a_video_is_refused(tmp_path: Path) -> None:
    videos = np.zeros((2, 3, 4, 4, 8), np.float32)
    with pytest.raises(InputError, match=r"npz for samples of 3x4x4x8, which are videos; found .*grid.png"):
        save(videos, tmp_path / "grid.png")
    save(videos, tmp_path / "videos.npz")
    with np.load(tmp_path / "videos.npz") as found:
        np.testing.assert_array_equal(found["images"], videos)
