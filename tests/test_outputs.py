"""What ``sample`` writes: as it is made, resumed to the same bytes, never mixed; what cannot be is refused before the work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Faulty
from PIL import Image
from test_files import files_of_at_most

from mteo_deploy.errors import EngineError, InputError
from mteo_deploy.images import check_output, kind_of, to_uint8
from mteo_deploy.outputs import RECORD, draw_into
from mteo_deploy.requests import Request, draw_all, draw_parts, take_all
from mteo_deploy.sample_request import SampleRequest
from mteo_deploy.sampler import Array, Sampler, noise_for

SETTINGS = {"seed": 5, "batch": 4, "engine": "none"}
ASKED = SampleRequest(num=10, seed=5, batch=4)
NAMES = ["folder", "images.npz", "grid.png"]
WRITER = """
import os, signal, sys
from pathlib import Path
from mteo_deploy.outputs import draw_into
from mteo_deploy.sampler import SampleRequest, noise_for
from test_outputs import ASKED, SETTINGS, drawn

def draw(start):
    if start == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return drawn(start)

draw_into(Path(sys.argv[1]), ASKED, SETTINGS, draw)
"""


def drawn(start: int) -> Array:
    return noise_for((3, 16, 8), ASKED.seed, ASKED.rows(start)).clip(-1, 1)


def everything(asked: SampleRequest = ASKED) -> Array:
    return noise_for((3, 16, 8), asked.seed, range(asked.num)).clip(-1, 1)


def contents(path: Path) -> Mapping[str, bytes]:
    files = [path] if path.is_file() else list(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


def stopping(at: int, error: BaseException) -> Callable[[int], Array]:
    def draw(start: int) -> Array:
        if start == at:
            raise error
        return drawn(start)

    return draw


# --- growing and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_drawn(name: str, tmp_path: Path) -> None:
    assert draw_into(tmp_path / name, ASKED, SETTINGS, drawn) == 0
    assert os.listdir(tmp_path) == [name]
    expected = to_uint8(everything())
    if name == "folder":
        for i in range(10):
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name / f"{i:05}.png")), expected[i])
        assert len(os.listdir(tmp_path / name)) == 10 + 1
    elif name == "images.npz":
        with np.load(tmp_path / name) as found:
            assert found.files == ["images"]
            np.testing.assert_array_equal(found["images"], everything())
    else:
        sheet = np.asarray(Image.open(tmp_path / name))
        np.testing.assert_array_equal(sheet[4:36:2, 4:20:2], expected[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["interrupted", "killed", "killed in a batch"])
def test_the_same_command_goes_on_to_the_same_bytes(how: str, name: str, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole" / name, tmp_path / "resumed" / name
    draw_into(whole, ASKED, SETTINGS, drawn)
    if how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            draw_into(path, ASKED, SETTINGS, stopping(8, KeyboardInterrupt()))
    else:
        done = subprocess.run([sys.executable, "-c", WRITER, str(path)], cwd=Path(__file__).parent, check=False)
        assert done.returncode == -signal.SIGKILL
    if how == "killed in a batch" and name == "folder":
        (path / "00006.png").write_bytes((path / "00006.png").read_bytes()[:-5])
        (path / "00007.png").unlink()
    elif how == "killed in a batch":
        data = path.with_name(f"{name}.partial") / "images"
        os.truncate(data, data.stat().st_size - 100)
    assert path.exists() == (name == "folder"), "a single file has its name when it is whole"
    made: list[int] = []
    there = draw_into(path, ASKED, SETTINGS, lambda start: (made.append(start), drawn(start))[1])
    assert (there, made) == ((4, [4, 8]) if how == "killed in a batch" else (8, [8]))
    assert contents(path) == contents(whole)
    assert os.listdir(path.parent) == [name]


def test_a_whole_folder_is_not_made_again_and_grows(tmp_path: Path) -> None:
    draw_into(tmp_path / "f", ASKED, SETTINGS, drawn)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "f").iterdir()}
    assert draw_into(tmp_path / "f", ASKED, SETTINGS, stopping(0, AssertionError())) == 10
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "f").iterdir()}
    (tmp_path / "f" / "00002.png").unlink()
    more = replace(ASKED, num=15)
    made: list[int] = []

    def draw(start: int) -> Array:
        made.append(start)
        return everything(more)[start : start + 4]

    assert draw_into(tmp_path / "f", more, SETTINGS, draw) == 4
    assert made == [0, 8, 12], "the hole, and what had fewer companions"
    draw_into(tmp_path / "at once", more, SETTINGS, draw)
    assert contents(tmp_path / "f") == contents(tmp_path / "at once")
    with pytest.raises(InputError, match="--num 15 or more"):
        draw_into(tmp_path / "f", ASKED, SETTINGS, drawn)


@pytest.mark.parametrize("name", NAMES)
def test_other_settings_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        draw_into(tmp_path / name, ASKED, SETTINGS, stopping(4, KeyboardInterrupt()))
    with pytest.raises(InputError, match=r"found seed 5 then, 6 now; delete .*or pass another -o"):
        draw_into(tmp_path / name, ASKED, {**SETTINGS, "seed": 6}, drawn)
    with pytest.raises(InputError, match="another bundle; other prompts or request inputs"):
        draw_into(tmp_path / name, ASKED, {**SETTINGS, "bundle": "a", "requests": "b"}, drawn)
    if name != "folder":
        with pytest.raises(InputError, match=r"--num 10, as .* was begun with; found 12"):
            draw_into(tmp_path / name, replace(ASKED, num=12), SETTINGS, drawn)
    assert draw_into(tmp_path / name, ASKED, SETTINGS, drawn) == 4


def test_images_of_somebody_else_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "00009.png").write_bytes(b"a photograph")
    with pytest.raises(InputError, match=r"found 00009\.png; move such files away"):
        draw_into(tmp_path, ASKED, SETTINGS, drawn)
    assert os.listdir(tmp_path) == ["00009.png"]
    (tmp_path / "00009.png").rename(tmp_path / "00010.png")
    draw_into(tmp_path, ASKED, SETTINGS, drawn)
    with pytest.raises(InputError, match=r"found 00010\.png"):
        draw_into(tmp_path, replace(ASKED, num=11), SETTINGS, drawn)
    (tmp_path / "grid.png.partial").touch()
    (tmp_path / "images.npz.partial" / "mine").mkdir(parents=True)
    for name in ("grid.png.partial", "images.npz.partial"):
        with pytest.raises(InputError, match=rf"left, at .*{name}; found something else"):
            draw_into(tmp_path / name.removesuffix(".partial"), ASKED, SETTINGS, drawn)


@pytest.mark.parametrize("name", ["images.npz", "grid.png"])
def test_a_second_writer_of_one_file_is_refused(name: str, tmp_path: Path) -> None:
    def draw(start: int) -> Array:
        if start == 4:
            with pytest.raises(InputError, match="is being written by another process"):
                draw_into(tmp_path / name, ASKED, SETTINGS, drawn)
        return drawn(start)

    draw_into(tmp_path / name, ASKED, SETTINGS, draw)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_keeps_what_is_done(name: str, tmp_path: Path) -> None:
    if name != "folder":
        (tmp_path / name).write_bytes(b"older")
    limit = {"folder": 400, "images.npz": 4 * 3 * 16 * 8 * 4 + 3, "grid.png": 4 * 3 * 16 * 8 + 3}[name]
    with files_of_at_most(limit), pytest.raises(InputError, match=r"File too large; what is done stays; .*goes on"):
        draw_into(tmp_path / name, ASKED, SETTINGS, drawn)
    if name != "folder":
        assert (tmp_path / name).read_bytes() == b"older"
        assert draw_into(tmp_path / name, ASKED, SETTINGS, drawn) == 4
    assert draw_into(tmp_path / name, ASKED, SETTINGS, drawn) == (10 if name == "folder" else 0) or name == "folder"
    draw_into(tmp_path / "whole" / name, ASKED, SETTINGS, drawn)
    assert contents(tmp_path / name) == contents(tmp_path / "whole" / name)


def test_memory_grows_with_the_batch(tmp_path: Path) -> None:
    """160 images of 0.4 MB each, two at a time: as float32 to an npz, as pixels to a grid."""
    asked = SampleRequest(num=160, batch=2)
    values = np.random.default_rng(0).uniform(-1, 1, (2, 1, 320, 320)).astype(np.float32)
    tracemalloc.start()
    try:
        draw_into(tmp_path / "a.npz", asked, {}, lambda start: values)
        npz = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert npz < 40e6 < 160 * values[0].nbytes
    with np.load(tmp_path / "a.npz") as found:
        assert found["images"].shape == (160, 1, 320, 320)
        np.testing.assert_array_equal(found["images"][158:], values)


# --- with an engine --------------------------------------------------------------------------------------------------


def sample(bundle: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "mteo_deploy.cli", "sample", str(bundle), "-q", "--batch", "4", "-o", str(output), *more]


@pytest.mark.parametrize("name", ["folder", "images.npz"])
def test_killed_by_the_system_and_run_again(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    num, path, whole = ["--num", "400"], tmp_path / name, tmp_path / "whole" / name
    process = subprocess.Popen(sample(tiny_bundle, path, *num), stdout=subprocess.DEVNULL)
    data = tmp_path / "images.npz.partial" / "images"
    while process.poll() is None and not (path / "00050.png").exists() and not (data.exists() and data.stat().st_size > 9999):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run(sample(tiny_bundle, path, *num, "--json"), capture_output=True, text=True, check=True)
    assert 0 < json.loads(again.stdout)["there"] < 400
    subprocess.run(sample(tiny_bundle, whole, *num), capture_output=True, check=True)
    assert contents(path) == contents(whole)
    other = subprocess.run(
        sample(tiny_bundle, path, "--num", "400", "--seed", "1"), capture_output=True, text=True, check=False
    )
    assert other.returncode == (2 if name == "folder" else 0)
    assert ("seed 0 then, 1 now" in other.stderr) == (name == "folder")


def test_batches_are_the_images_of_a_call(tiny_sampler: Sampler) -> None:
    asked = SampleRequest(num=7, seed=3, batch=3)
    parts = list(tiny_sampler.batches(asked))
    assert [len(part) for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(parts), tiny_sampler(num=7, seed=3, batch=3))
    np.testing.assert_array_equal(tiny_sampler.drawing(asked)(3), parts[1])
    with pytest.raises(InputError, match="--batch"):
        tiny_sampler.batches(SampleRequest(batch=0))


def test_prompts_are_encoded_with_their_batch(pipeline_bundle: Path) -> None:
    """One for each image or one for all, in batches or at once: the same images."""
    prompts = ["a castle", "a ship", "a castle", "two cats", "a storm"]
    options: dict[str, Any] = {"num": 5, "seed": 1, "prompt": prompts, "latents": True}
    with Sampler.load(pipeline_bundle) as sampler:
        at_once = sampler(batch=5, negative_prompt="blurry", **options)
        np.testing.assert_allclose(sampler(batch=2, negative_prompt="blurry", **options), at_once, atol=1e-4)
        np.testing.assert_allclose(sampler(batch=2, negative_prompt=["blurry"] * 5, **options), at_once, atol=1e-4)
        one = sampler(num=5, seed=1, batch=2, prompt="a castle", negative_prompt="blurry", latents=True)
        np.testing.assert_allclose(one[[0, 2]], at_once[[0, 2]], atol=1e-4)
        assert np.abs(one[1] - at_once[1]).max() > 1e-3
        with pytest.raises(InputError, match=r"one --prompt for all images or one for each of 5; found 4"):
            sampler(batch=2, num=5, prompt=prompts[:4])
        with pytest.raises(InputError, match=r"one --negative-prompt for all images or one for each of 5; found 2"):
            sampler(batch=2, num=5, prompt=prompts, negative_prompt=["a", "b"])


def test_images_that_are_not_finite_are_refused_by_name(tiny_sampler: Sampler, tmp_path: Path) -> None:
    calls = threading.local()
    calls.count = 0

    def fault(next_state: Array, feeds: Mapping[str, Array]) -> Array:
        calls.count += 1
        return np.where(np.arange(len(next_state)).reshape(-1, 1, 1, 1) == 1, np.nan, next_state)

    broken = tiny_sampler.reopen(lambda graph, session: Faulty(session, fault) if graph.endswith("step_01.onnx") else session)
    with pytest.raises(
        EngineError, match=r"image 4 of seed 2 has NaN or infinity from evaluation 1 on; run: mteo-deploy verify"
    ):
        draw_into(tmp_path / "f", replace(ASKED, seed=2, batch=3), {}, lambda s: broken.drawing(SampleRequest(5, 2, 3))(3))
    assert calls.count and not (tmp_path / "f").exists()
    assert np.isnan(broken.together(SampleRequest(2, 2, 2, finite=False))[1]).all(), "whoever asks gets them"
    with pytest.raises(InputError, match="image 1 of 2 has NaN"):
        to_uint8(np.array([0, np.nan], np.float32).reshape(2, 1, 1, 1))


# --- said before the work --------------------------------------------------------------------------------------------


def test_kinds_of_output(tmp_path: Path) -> None:
    (tmp_path / "v1.0").mkdir()
    kinds = {
        "a.png": "png",
        "a.PNG": "png",
        "b.Npz": "npz",
        "folder": "folder",
        "v1.0": "folder",
        ".hidden": "folder",
        ".": "folder",
    }
    assert {name: kind_of(tmp_path / name) for name in kinds} == kinds
    assert kind_of(tmp_path / "new.1", folder=True) == kind_of(tmp_path / "x.png", folder=True) == "folder"
    for name in ("a.jpg", "v2.0", "a.png.txt"):
        with pytest.raises(InputError, match=r"\.png or \.npz, or a folder \(then end it in a slash\)"):
            kind_of(tmp_path / name)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 64, 64), r"samples of 4x64x64, which have 4 channels where images have 1 or 3 \(latents"),
        ((2, 8, 8), "which have 2 channels"),
        ((3, 4, 8, 8), "which are videos"),
        ((1, 128), "which are signals"),
        ((7,), "which are arrays of 1 axes"),
    ],
)
def test_what_is_no_image_goes_to_npz(shape: tuple[int, ...], words: str, tmp_path: Path) -> None:
    for name in ("grid.png", "folder"):
        with pytest.raises(InputError, match=rf"expected an output ending in \.npz for .*{words}.*{name}"):
            check_output(tmp_path / name, shape)
    check_output(tmp_path / "a.NPZ", shape)
    check_output(tmp_path / "grid.png", (3, 8, 8))


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "null").symlink_to(os.devnull)
    (tmp_path / "null.npz").symlink_to(os.devnull)
    (tmp_path / "later").symlink_to("real")
    for name, words in {
        "file": "expected a folder at .*file; found something else",
        "file/grid.png": "expected a folder at .*file; found none",
        "file/below/f": "expected a folder at .*file; found none",
        "dir.png": "expected a file at .*; found a folder",
        "round": "circle",
        "null": "found something else",
        "null.npz": "found a device or a pipe",
        "x" * 300: "too long",
        "x" * 300 + ".png": "too long",
    }.items():
        with pytest.raises(InputError, match=words):
            check_output(tmp_path / name)
    check_output(tmp_path / "dir.png", folder=True)
    draw_into(tmp_path / "later", ASKED, SETTINGS, drawn)
    assert (tmp_path / "later").is_symlink() and (tmp_path / "real" / "00009.png").is_file()
    with pytest.raises(InputError, match="too long"):
        draw_into(tmp_path / ("x" * 246 + ".npz"), ASKED, SETTINGS, stopping(0, AssertionError()))


def test_one_row_for_all_images_is_not_copied() -> None:
    prompt = Request("prompt", "float32", (77, 64))
    row = np.random.default_rng(0).standard_normal((1, 77, 64)).astype(np.float32)
    found = take_all([prompt], {"prompt": row}, 10**9)["prompt"]
    assert found.shape == (10**9, 77, 64) and found.strides[0] == 0
    np.testing.assert_array_equal(found[12345], row[0])
    part = draw_parts([prompt], 10**4, 0, {"prompt": np.concatenate([row, -row])})
    np.testing.assert_array_equal(
        part(slice(50, 60))["prompt"], draw_all([prompt], 10**4, 0, {"prompt": np.concatenate([row, -row])})["prompt"][50:60]
    )


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e9), ("float32", 1e300), ("int64", 0.5), ("int64", 2.0**70)])
def test_values_that_a_request_input_cannot_hold(dtype: str, value: float) -> None:
    with pytest.raises(InputError, match=re.escape(f"expected mask as numbers that {dtype} holds")):
        Request("mask", dtype, (2,), mask=dtype == "int64").take([[value, 1.0]], 1)


def test_record_is_json_that_explains_itself(tmp_path: Path) -> None:
    draw_into(tmp_path / "f", ASKED, SETTINGS, drawn)
    found = json.loads((tmp_path / "f" / RECORD).read_text())
    assert found == {"format": "mteo-deploy sample", "version": 1, "num": 10, **SETTINGS}
