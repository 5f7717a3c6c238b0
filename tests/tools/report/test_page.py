"""rdm report from arguments to page, parsed as a browser parses it: nothing is fetched."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdm_fast.cli import commands as cli
from rdm_fast.errors import CannotCreate, Unavailable, UsageError
from rdm_fast.tools.report import make, style
from rdm_fast.tools.report.make import make_report
from rdm_fast.tools.report.measure import Embeddings, Spectra
from rdm_fast.tools.report.page import NONE, clock, number
from rdm_fast.tools.report.snapshots import ABSENT
from tests.runs import rdm
from tests.spies import refused
from tests.tiny import tiny
from tests.tools.report.made import evaluate, line, make_run, spectrum_line

FETCHING = {"src", "href", "srcset", "data", "poster", "action", "formaction", "background", "ping"}
VOID = {"meta", "img", "link", "br", "hr", "input"}
SECTIONS = 8


class Page(HTMLParser):
    """Elements and text of a page whose tags close in order."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def fake_measure(
    *_: object, images: int, spectra: bool, **__: object
) -> tuple[Spectra | None, Embeddings | None]:
    """Falling spectra and three groups of embeddings."""
    n = np.arange(1, 21, dtype=np.float64)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, size=40)
    rows = np.eye(3, 8)[labels] + 0.1 * generator.normal(size=(40, 8))
    found = Spectra(8, n**-2, n**-1, n**-1, n**-0.5, np.r_[n[:-1] ** -0.5, np.nan])
    embeddings = Embeddings(rows.astype(np.float32), labels, ["a", "b", "<c>"])
    return found if spectra else None, embeddings if images else None


def report(folder: Path, *args: object, measure: bool = True) -> Page:
    """`rdm report` in a folder; with `measure`, as if every run had a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        if measure:
            patch.setattr(make, "measure", fake_measure)
        patch.setattr(style, "DPI", 60)  # half the time
        patch.chdir(folder)
        command = cli.COMMANDS["report"].parse([*map(str, args)])
        return Page(folder / make_report(command))


NAME = "<script>alert(1)<script>&amp;$x_"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: `run`, interrupted and evaluated, and one whose name looks like markup."""
    folder = tmp_path_factory.mktemp("report")
    evaluate(make_run(folder / "run", state="interrupted", message="stopped"), top1=91.26)
    make_run(folder / NAME, replace(tiny(), seed=1), state="failed", message="<img src=x>")
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Page:
    return report(folder, "run")


@pytest.fixture(scope="module")
def two(folder: Path) -> Page:
    return report(folder, "run", NAME, "--out", "out/mine.html")


# ---- a page that needs nothing else ------------------------------------------------------------


def require_nothing_fetched(page: Page) -> None:
    """No element and no style names anything outside the page."""
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}> is a script"
            if name in FETCHING or "url(" in value:
                assert value.startswith(("#", "data:image/png;base64,")), f"<{tag} {name}={value}>"
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.source)
    assert not re.search(r"url\(|@import|https?:|//[a-z]", without_pictures)
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_pages_fetch_nothing_and_hold_their_figures(folder: Path, one: Page, two: Page) -> None:
    for page, figures, stem in (
        (one, folder / "run" / "figures", "report"),
        (two, folder / "out" / "figures", "mine"),
    ):
        require_nothing_fetched(page)
        sources = [image["src"] for image in page.all("img")]
        pictures = [base64.b64decode(src.partition("base64,")[2]) for src in sources]
        files = sorted(figures.iterdir())
        assert len(files) == SECTIONS
        assert all(file.name.startswith(f"{stem}-") for file in files)
        assert sorted(file.read_bytes() for file in files) == sorted(pictures)
    assert len(one.all("table")) + 1 == len(two.all("table"))  # that of differing settings
    assert NAME in two.text and "<img src=x>" in two.text  # text, not markup
    assert report(folder, "run").source == one.source


def test_links_lead_somewhere_and_every_picture_has_a_text(one: Page) -> None:
    ids = [attributes["id"] for _, attributes in one.elements if "id" in attributes]
    assert len(ids) == len({*ids})
    assert {link["href"] for link in one.all("a")} == {f"#{name}" for name in ids} - {"#notes"}
    for image in one.all("img"):
        assert len(image["alt"]) > 20 and int(image["width"]) == 60 * style.WIDTH
    headings = [tag for tag, _ in one.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1" and {*headings[1:]} == {"h2"}
    assert one.all("html") == [{"lang": "en"}]
    assert all("scope" in cell for cell in one.all("th"))
    assert len(one.all("caption")) == len(one.all("table"))


def test_several_runs_have_their_report_here_and_it_may_lack_the_map(folder: Path) -> None:
    page = report(folder, "run", NAME, "--map", "none")
    assert len(page.all("img")) == SECTIONS - 1 and "--map none" in page.text
    assert (folder / "report.html").exists()


def test_the_summary_shows_last_values(one: Page) -> None:
    table = one.source.partition("<tbody>")[2].partition("</tbody>")[0]
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", table, re.DOTALL)
    expected = ["run", "SimSiam, target s^-1", "interrupted", "2 of 2", "-0.800", "50.0", "91.3"]
    assert cells == [*expected, "10.0", "21.0", "21.0", "11.00", "168", "16 s"]


def test_a_number_has_its_digits_and_zero_has_no_sign() -> None:
    assert [number(x, 2) for x in (-0.001, 1234.5, 3)] == ["0.00", "1,234.50", "3.00"]
    assert {number(x, 2) for x in (None, float("nan"), "x")} == {NONE}
    assert [clock(x) for x in (59.6, 660.0, 7300.0)] == ["60 s", "11 min", "2.0 h"]


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (8, 2, 4), (10, 2, 5)]
)
def test_panels_are_a_grid_with_titles_that_fit(count: int, rows: int, columns: int) -> None:
    figure, axes = style.panels(["a" * 99] * count, (3.0, 2.0))
    grid = axes[0].get_gridspec()
    assert (len(axes), grid.nrows, grid.ncols) == (count, rows, columns)
    assert len(figure.axes) == count
    assert figure.get_size_inches()[1] == (3.0 if count == 1 else 2.0 * rows)
    assert 9 < len(axes[0].get_title()) <= 120 // columns
    styles = [str(style.line_style(i)) for i in range(2 * len(style.RUNS))]
    assert len({*styles}) == len(styles)


# ---- runs that are not whole -------------------------------------------------------------------


FILES = ["config.yaml", "status.json", "metrics.jsonl"]
GAPS: dict[str, Any] = dict.fromkeys(("loss", "rank_difference"))
DAMAGE: dict[str, dict[str, bytes | str | None]] = {  # new contents of files; None for no file
    "no metrics": {"metrics.jsonl": None},
    "nothing but its mark": dict.fromkeys(FILES),
    "binary metrics": {"metrics.jsonl": bytes(range(256)) * 40},
    "only gaps": {"metrics.jsonl": "".join(json.dumps(line(i, **GAPS)) + "\n" for i in (2, 4))},
    "damaged spectra": {"metrics.jsonl": None, "spectrum.jsonl": spectrum_line(2, s="damaged")},
}


def damage(path: Path, kind: str) -> None:
    for name, content in DAMAGE[kind].items():
        if content is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def require_notes(page: Page, printed: str, label: str) -> None:
    """Warnings about a run that are printed also stand in the page."""
    assert "Traceback" not in printed
    start = f"warning: {label}: "
    notes = [text.removeprefix(start) for text in printed.splitlines() if text.startswith(start)]
    assert notes and all(note in page.text for note in notes)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noted(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured for real: there is no checkpoint, which is a note too."""
    damage(make_run(tmp_path / "broken"), kind)
    page = report(tmp_path, "broken", measure=False)
    require_nothing_fetched(page)
    require_notes(page, capsys.readouterr().out, "broken")
    assert ABSENT in page.text and "No loss was logged." in page.text


def test_damaged_runs_do_not_hide_a_sound_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in DAMAGE:
        damage(make_run(tmp_path / kind), kind)
    make_run(tmp_path / "sound")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(style, "DPI", 60)
    assert rdm("report . --map none --out page.html") == 0
    page, printed = Page(tmp_path / "page.html"), capsys.readouterr().out
    for kind in DAMAGE:
        require_notes(page, printed, kind)
    assert "No loss was logged." not in page.text
    assert len(page.all("img")) == SECTIONS - 3  # spectra, response and map


def test_spectra_that_training_recorded_are_shown_without_a_checkpoint(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "spectrum.jsonl").write_text("".join(map(spectrum_line, (2, 4, 6, 8))))
    page = report(tmp_path, path, measure=False)
    assert len(page.all("img")) == SECTIONS - 1 and "Step: 8." in page.text
    assert "No map: " in page.text


def test_the_parts_of_dino_s_and_swav_s_rank_difference_are_drawn(tmp_path: Path) -> None:
    parts = {"sharpening": 2.0, "equipartition": 1.25}
    found = {f"rank_difference/{key}": value for key, value in parts.items()}
    path = make_run(tmp_path / "run", lines=[line(step, **found) for step in (2, 4, 6, 8)])
    page = report(tmp_path, path, measure=False)
    texts = " ".join(image["alt"] for image in page.all("img"))
    assert len(page.all("img")) == SECTIONS - 3 + 1 and "Sinkhorn 1.25" in texts
    assert "older weights" not in texts


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("", "run folders"),
        ("x --out page.pdf", "--out page.pdf"),
        ("x --images 3", "--images=3"),
        ("x --map pca", "--map"),
        ("x --sede 1", "--seed"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(args: str, named: str) -> None:
    with pytest.raises(UsageError) as error:
        cli.COMMANDS["report"].parse(args.split())
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_page_that_cannot_be_written_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(CannotCreate, "--out"):
        report(tmp_path, make_run(tmp_path / "run"), "--map", "none", "--out", "file/page.html")


def test_a_missing_matplotlib_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(style.importlib.util, "find_spec", lambda name: None)
    with refused(Unavailable, "rdm-fast[plot]"):
        report(tmp_path, "absent")
