"""A real page of a report in a real browser: Chromium, without a window. Skipped where there is none."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from test_report import Elements, magenta

from mteo_deploy.page import page
from mteo_deploy.report import Report
from mteo_deploy.verification import verify

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
)
MAGENTA, BLUE, INK = (255, 0, 255), (0x00, 0x72, 0xB2), (0x1F, 0x23, 0x28)
PNG = "data:image/png;base64,"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; on Debian: apt-get install chromium")


def browse(text: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Chromium with a profile of its own, on a page in a file."""
    folder.mkdir()
    (folder / "page.html").write_text(text, encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", *arguments]
    command.append((folder / "page.html").as_uri())
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def screenshot(text: str, folder: Path, width: int = 1200, height: int = 2600) -> tuple[NDArray[np.uint8], str]:
    """The page as it is shown, ``[height, width, 3]``, and what the browser had to say."""
    shot = folder / "shot.png"
    done = browse(text, folder, f"--window-size={width},{height}", f"--screenshot={shot}")
    with Image.open(shot) as image:
        assert image.size == (width, height)
        return np.asarray(image.convert("RGB")), done.stderr


def count(pixels: NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
    return int((pixels == colour).all(axis=2).sum())


@pytest.fixture(scope="module")
def report(tiny_bundle: Path) -> Report:
    return verify(tiny_bundle, seconds=0.1, quiet=True)


def test_images_and_drawings_are_shown(report: Report, tmp_path: Path) -> None:
    """Every image decoded: exactly its own pixels' area is of a colour that nothing else has."""
    text = page(magenta(report))
    shown, said = screenshot(text, tmp_path / "whole")
    assert count(shown, MAGENTA) == 3 * 2 * 96 * 96
    assert count(shown, BLUE) > 1000 and count(shown, INK) > 1000
    assert (shown == 255).all(axis=2).mean() > 0.5
    assert "Content Security Policy" not in said
    broken, _ = screenshot(text.replace(PNG, PNG + "AAAA"), tmp_path / "broken")
    assert count(broken, MAGENTA) == 0


def test_narrow_screen_shows_all_without_scrolling_sideways(report: Report, tmp_path: Path) -> None:
    """On a telephone nothing reaches into the right margin; a line that cannot break does."""
    text = page(report)
    shown, _ = screenshot(text, tmp_path / "narrow", width=400)
    assert count(shown, INK) > 500
    assert (shown[:, -10:] == 255).all()
    wide, _ = screenshot(text.replace("<h1>", f'<h1 style="white-space: nowrap">{"wide " * 40}'), tmp_path / "wide", width=400)
    assert not (wide[:, -10:] == 255).all()


def test_browser_is_asked_for_nothing(report: Report, tmp_path: Path) -> None:
    """The page's own policy refuses what would leave it, and says so; it has nothing to refuse."""
    done = browse(page(report), tmp_path / "page", "--dump-dom")
    found = Elements(done.stdout)
    assert found.outward() == [] and len(found.named("svg")) == 3 and report.checks[0].detail in found.text
    assert "Content Security Policy" not in done.stderr
    planted = page(report).replace("</body>", '<img src="https://example.invalid/x.png"></body>')
    done = browse(planted, tmp_path / "planted", "--dump-dom")
    assert "Content Security Policy" in done.stderr and len(Elements(done.stdout).outward()) == 1
