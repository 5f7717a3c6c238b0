"""docs/sweep.md: a sweep's results find their place. (tests/docs reads its commands.)"""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "sweep.md"


def test_results_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    copy = runpy.run_path(str(ROOT / "docs" / "sweep_results.py"))["copy"]
    page, sweep = tmp_path / "page.md", tmp_path / "sweep"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    sweep.mkdir()
    for number in ("one", "two"):
        (sweep / "sweep.md").write_text(f"| {number} |\n")
        (sweep / "sweep.png").write_bytes(number.encode())
        copy(sweep, page)
    text = page.read_text(encoding="utf-8")
    assert "| two |" in text and "| one |" not in text
    assert text.startswith("# Sweeping over filters") and text.count("](sweep.png)") == 1
    assert (tmp_path / "sweep.png").read_bytes() == b"two"
