"""docs/sweep.md, docs/report.md: commands can be meant, and a sweep's results find their place."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from rdm_fast.command_line import parse_report, parse_sweep

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "sweep.md"


@pytest.mark.parametrize("page", [PAGE, PAGE.with_name("report.md")], ids=lambda page: page.name)
def test_every_command_on_a_page_can_be_meant(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"^ {4}rdm (\w+) (.*)$", text, re.MULTILINE)
    parsers = {"sweep": parse_sweep, "report": parse_report}
    assert page.stem in {name for name, _ in commands}
    for name, words in commands:
        parsers[name](shlex.split(words, comments=True))


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
