"""rdm report from its words to its page, parsed as a browser parses it: nothing is fetched."""

import base64
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rdm_fast.cli import commands as cli
from rdm_fast.errors import CannotCreate, Unavailable, UsageError
from rdm_fast.tools.report import make, style
from rdm_fast.tools.report.make import make_report
from rdm_fast.tools.report.measure import Embeddings, Measurement, Spectra
from rdm_fast.tools.report.page import NONE, clock, number
from tests.tiny import tiny
from tests.tools.report.made import evaluate, line, make_run, spectrum_line

FETCHING = {"src", "href", "srcset", "data", "poster", "action", "formaction", "background", "ping"}
VOID = {"meta", "img", "link", "br", "hr", "input"}
SECTIONS = 8


class Page(HTMLParser):
    """What tests ask of a page: its elements, its text, and whether tags close in order."""

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


def fake_measurement(*_: object, images: int, spectra: bool, **__: object) -> Measurement:
    """Falling spectra and three groups of embeddings."""
    n = np.arange(1, 21, dtype=np.float64)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, size=40)
    rows = np.eye(3, 8)[labels] + 0.1 * generator.normal(size=(40, 8))
    found = Spectra(8, n**-2, n**-1, n**-1, n**-0.5, np.r_[n[:-1] ** -0.5, np.nan])
    embeddings = Embeddings(rows.astype(np.float32), labels, ["a", "b", "<c>"])
    return Measurement(found if spectra else None, embeddings if images else None)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Page]:
    """`rdm report` with these words; runs are measured as if they had checkpoints."""
    monkeypatch.setattr(make, "measure", fake_measurement)
    monkeypatch.setattr(style, "DPI", 60)  # half the time
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Page:
        return Page(make_report(cli.COMMANDS["report"].parse([*map(str, words)])))

    return call


def pictures(page: Page) -> list[bytes]:
    prefix = "data:image/png;base64,"
    assert all(image["src"].startswith(prefix) for image in page.all("img"))
    return [base64.b64decode(image["src"].removeprefix(prefix)) for image in page.all("img")]


# ---- a page that needs nothing else ----------------------------------------------------------


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


@pytest.mark.parametrize("count", [1, 2, 10])
def test_a_page_of_any_number_of_runs_fetches_nothing_and_is_complete(
    count: int, tmp_path: Path, report: Callable[..., Page]
) -> None:
    config = tiny()
    paths = [make_run(tmp_path / f"run{i}", replace(config, seed=i)) for i in range(count)]
    evaluate(paths[0])
    page = report(*paths, "--out", "out/mine.html")
    require_nothing_fetched(page)
    assert page.all("aside") == []
    files = sorted((tmp_path / "out" / "figures").iterdir())
    assert len(files) == SECTIONS and all(file.name.startswith("mine-") for file in files)
    assert sorted(file.read_bytes() for file in files) == sorted(pictures(page))
    for i in range(count):
        assert f"run{i}" in page.text
    assert ("Settings that differ" in page.text) == (count > 1)


def test_links_lead_somewhere_and_every_picture_has_words(
    tmp_path: Path, report: Callable[..., Page]
) -> None:
    page = report(make_run(tmp_path / "run"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len({*ids})
    assert {link["href"] for link in page.all("a")} == {f"#{name}" for name in ids}
    assert len(page.all("img")) == SECTIONS
    for image in page.all("img"):
        assert len(image["alt"]) > 20 and int(image["width"]) == 60 * style.WIDTH
    headings = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1" and {*headings[1:]} == {"h2"}
    assert page.all("html") == [{"lang": "en"}]
    assert all("scope" in cell for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_what_a_run_is_called_cannot_become_markup(
    tmp_path: Path, report: Callable[..., Page]
) -> None:
    name = "<script>alert(1)<script>&amp;$x_"
    page = report(make_run(tmp_path / name, state="failed", message="<img src=x>"))
    require_nothing_fetched(page)
    assert name in page.text and "<img src=x>" in page.text


def test_the_same_runs_give_the_same_page(tmp_path: Path, report: Callable[..., Page]) -> None:
    path = make_run(tmp_path / "run")
    assert report(path).source == report(path).source


def test_one_run_has_its_report_in_its_folder_and_several_have_it_here(
    tmp_path: Path, report: Callable[..., Page]
) -> None:
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    page = report(paths[0], "--map", "none")
    assert len(page.all("img")) == SECTIONS - 1 and "Not asked for (--map none)." in page.text
    assert (paths[0] / "report.html").exists() and not (tmp_path / "report.html").exists()
    assert (paths[0] / "figures" / "report-loss.png").exists()
    report(*paths, "--map", "none")
    assert (tmp_path / "report.html").exists()


def test_the_summary_shows_last_values_with_their_units(
    tmp_path: Path, report: Callable[..., Page]
) -> None:
    path = make_run(tmp_path / "run", state="interrupted", message="stopped")
    evaluate(path, top1=91.26)
    page = report(path)
    table = page.source.partition("<tbody>")[2].partition("</tbody>")[0]
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", table, re.DOTALL)
    expected = ["run", "SimSiam, target s^-1", "interrupted", "2 of 2", "-0.800", "50.0", "91.3"]
    assert cells == [*expected, "10.0", "21.0", "21.0", "11.00", "168", "16 s"]


def test_a_number_has_its_digits_and_zero_has_no_sign() -> None:
    assert [number(x, 2) for x in (-0.001, 1234.5, 3)] == ["0.00", "1,234.50", "3.00"]
    assert {number(x, 2) for x in (None, float("nan"), "x")} == {NONE}
    assert [clock(x) for x in (59.6, 660.0, 7300.0)] == ["60 s", "11 min", "2.0 h"]


# ---- runs that are not whole -----------------------------------------------------------------


def no_metrics(path: Path) -> None:
    (path / "metrics.jsonl").unlink()


def nothing_but_its_mark(path: Path) -> None:
    for name in ("config.yaml", "status.json", "metrics.jsonl"):
        (path / name).unlink()


def binary_metrics(path: Path) -> None:
    (path / "metrics.jsonl").write_bytes(bytes(range(256)) * 40)


def only_gaps(path: Path) -> None:
    lines = [line(step, **dict.fromkeys(("loss", "rank_difference"))) for step in (2, 4)]
    shutil.rmtree(path)
    make_run(path, lines=lines)


DAMAGE = [no_metrics, nothing_but_its_mark, binary_metrics, only_gaps]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a sound run"])
def test_a_damaged_run_is_a_sentence_in_the_page_and_on_the_console(
    damage: Callable[[Path], None],
    beside: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Measured for real: there is no checkpoint, which is a sentence too."""
    monkeypatch.chdir(tmp_path)
    broken = make_run(tmp_path / "broken")
    damage(broken)
    others = [make_run(tmp_path / "sound")] if beside else []
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(broken), *map(str, others), "--out", "page.html"])
    assert ended.value.code == 0
    page = Page(tmp_path / "page.html")
    require_nothing_fetched(page)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    notes = [text for text in printed.out.splitlines() if text.startswith("warning: broken: ")]
    assert notes
    for note in notes:
        assert note.removeprefix("warning: broken: ") in page.text
    assert "No spectra were recorded, and no checkpoint could be used." in page.text
    assert ("No loss was logged." in page.text) == (not beside)


def test_spectra_that_training_recorded_are_shown_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = make_run(tmp_path / "run")
    (path / "spectrum.jsonl").write_text("".join(map(spectrum_line, (2, 4, 6, 8))))
    page = Page(make_report(cli.COMMANDS["report"].parse([str(path)])))
    assert len(page.all("img")) == SECTIONS - 1 and "Step: 8." in page.text
    assert "No map: the run in" in page.text
    (path / "spectrum.jsonl").write_text(spectrum_line(2, s="damaged"))
    page = Page(make_report(cli.COMMANDS["report"].parse([str(path)])))
    assert len(page.all("img")) == SECTIONS - 3
    assert "spectrum.jsonl cannot be used" in page.text


# ---- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "name one or more run folders"),
        ("x --out page.pdf", "--out page.pdf is not the name of a page"),
        ("x --images 3", "--images 3: give 10 or more"),
        ("x --map pca", "--map cannot be pca: use one of tsne"),
        ("x --sede 1", "unknown flag --sede: did you mean --seed?"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(words: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        cli.COMMANDS["report"].parse(words.split())
    assert "\n" not in str(caught.value)


def test_a_page_that_cannot_be_written_names_the_flag(
    tmp_path: Path, report: Callable[..., Page]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotCreate, match=r"give --out a name"):
        report(make_run(tmp_path / "run"), "--map", "none", "--out", "file/page.html")


def test_a_missing_matplotlib_is_one_sentence_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = style.importlib.util.find_spec
    monkeypatch.setattr(
        style.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(Unavailable, match=r"matplotlib, .* pip install \"rdm-fast\[plot\]\""):
        make_report(cli.COMMANDS["report"].parse([str(tmp_path / "absent")]))
