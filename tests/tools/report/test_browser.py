"""Headless Chromium, without network, draws the page, and it is not blank."""

import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tools.report.made import make_run
from tests.tools.report.test_page import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, HEIGHT = 1100, 3000
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip


def screenshot(page: Path, folder: Path) -> np.ndarray:
    """A browser's picture of a file, [H, W, 3]; it can resolve no name."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        reason = f"no page was drawn: none of {', '.join(NAMES)} is installed"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    picture = folder / "screenshot.png"
    command = [
        browser, *FLAGS, f"--screenshot={picture}",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{HEIGHT}",
        page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert picture.exists(), done.stderr[-2000:]
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.slow  # starts a browser
def test_chromium_shows_the_page_and_its_figures(tmp_path: Path) -> None:
    """Text and lines cover part of the page, in the colors of the figures too."""
    report(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b"), "--out", "page.html")
    pixels = screenshot(tmp_path / "page.html", tmp_path)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    paper = pixels[0, 0]
    inked = (np.abs(pixels.astype(int) - paper).max(axis=2) > 40).mean(axis=1)
    assert 0.01 < inked.mean() < 0.5
    blank = np.flatnonzero(inked > 0)
    assert np.diff(blank).max() < 200, "a part of the page is blank"
    colors = {tuple(color) for color in pixels.reshape(-1, 3)[::7].tolist()}
    for color in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):  # the first two runs' lines
        assert min(max(abs(a - b) for a, b in zip(color, c, strict=True)) for c in colors) < 12
