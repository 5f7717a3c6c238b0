"""README and docs/: a site without warnings or other hosts, commands and messages that exist.

What a page says of its own subject is tested beside that subject: tests/evaluation/test_docs.py,
tests/tools/sweep/test_docs.py, tests/docs/test_scaling.py, tests/docs/test_integrations.py.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import pytest

from rdm_fast.cli.commands import COMMANDS
from rdm_fast.cli.flags import ALIASES, flags
from rdm_fast.cli.parse import (
    TrainCommand,
    parse_doctor,
    parse_evaluate,
    parse_export,
    parse_report,
    parse_sweep,
    parse_train,
)
from rdm_fast.config.recipes import RECIPES
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.tools.doctor.options import DoctorCommand
from rdm_fast.tools.export.options import ExportCommand
from rdm_fast.tools.report.options import ReportCommand
from rdm_fast.tools.sweep.options import SweepCommand
from tests.cli.test_parse import COMMANDS as SETTINGS
from tests.cli.test_parse import sentences

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


# ---- the site --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as a site; a warning fails the build."""
    pytest.importorskip("mkdocs", reason="the site is built with the extra rdm-fast[docs]")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    proxies = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class Resources(HTMLParser):
    """Addresses that a browser fetches by itself when it shows a page."""

    FETCHED = {  # noqa: RUF012
        "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src",
        "link": "href", "object": "data", "use": "href",
    }  # fmt: skip

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if (url := dict(attrs).get(self.FETCHED.get(tag, ""))) is not None:
            self.found.append(url)


def test_the_site_has_every_page_and_the_docstrings(site: Path) -> None:
    for page in DOCS.glob("*.md"):
        assert (site / page.with_suffix(".html").name).exists(), page.name
    api = (site / "api.html").read_text("utf-8")
    for name in ("rdm_fast.spectral_loss", "rdm_kernels.gram.gram", "rdm_fast.spectrum.watch"):
        assert f'id="{name}"' in api, name
    assert "mean negative cosine, one side filtered" in api


def test_nothing_on_the_site_comes_from_another_host(site: Path) -> None:
    seen = 0
    for page in site.rglob("*.html"):
        for url in Resources(page.read_text("utf-8")).found:
            parts = urlsplit(url)
            assert parts.scheme in ("", "data") and not parts.netloc, f"{page.name}: {url}"
            seen += 1
    assert seen > 50
    for sheet in site.rglob("*.css"):
        for url in re.findall(r"(?:url\(|@import\s*)[\"']?([^\"')\s]+)", sheet.read_text("utf-8")):
            assert not urlsplit(url).netloc, f"{sheet.name}: {url}"


def test_every_page_is_in_the_navigation() -> None:
    nav = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert {path for path in nav if "/" not in path} == {page.name for page in DOCS.glob("*.md")}


# ---- commands --------------------------------------------------------------------------------


def evaluated(words: list[str]) -> EvaluateCommand:
    command = parse_evaluate(words)
    command.protocol_for("cifar10")  # what is refused later, when the data set is known
    return command


PARSERS: dict[str, Callable[..., Any]] = {
    "train": parse_train, "eval": evaluated, "export": parse_export,
    "report": parse_report, "sweep": parse_sweep, "doctor": parse_doctor,
}  # fmt: skip
SCRIPTS = {"train.py": "train", "eval_linear.py": "eval"}
STAND_INS = {"RUN": "runs/a", "RECIPE": "digits_byol", "...": ""}
"""What pages write for something of the reader's own."""


@dataclass(frozen=True)
class Documented:
    """A command of ours on a page."""

    page: Path
    line: str
    name: str
    words: tuple[str, ...]


def shell_lines(text: str) -> Iterator[str]:
    """Lines of indented blocks and of blocks fenced as shell; a loop is one line."""
    text = re.sub(r"\\\n\s*", "", text)
    text = re.sub(r"\n +done$", "; done", re.sub(r"; do\n +", "; do ", text), flags=re.MULTILINE)
    fenced = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"^ {4}(.+)$", outside, re.MULTILINE)
    for block in fenced:
        yield from block.splitlines()


def unrolled(line: str) -> list[str]:
    """What a `for` loop on one line runs; any other line as it is."""
    loop = re.fullmatch(r"for (\w+) in ([^;]+); do (.+); done", line.split("  #")[0].strip())
    if loop is None:
        return [line]
    name, values, body = loop.groups()
    return [re.sub(rf"\$\{{?{name}\b\}}?", value, body) for value in values.split()]


def commands(page: Path) -> list[Documented]:
    found = []
    for line in (each for raw in shell_lines(page.read_text("utf-8")) for each in unrolled(raw)):
        words = shlex.split(line, comments=True)
        name = None
        for i, word in enumerate(words):
            if Path(word).name in SCRIPTS:
                name = SCRIPTS[Path(word).name]
            elif word == "rdm" and i + 1 < len(words):
                name, i = words[i + 1], i + 1
            if name is not None:
                rest = tuple(STAND_INS.get(w, w) for w in words[i + 1 :])
                found.append(Documented(page, line, name, tuple(w for w in rest if w)))
                break
    return found


DOCUMENTED = [command for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_can_be_meant(page: Path) -> None:
    for command in commands(page):
        assert command.name in PARSERS, command.line
        try:
            PARSERS[command.name](list(command.words))
        except Exception as error:
            pytest.fail(f"{page.name}: {command.line}\n{error}")


def test_the_commands_are_found() -> None:
    """Patterns that find nothing would make the test above say nothing."""
    assert {command.name for command in DOCUMENTED} == set(COMMANDS) == set(PARSERS)
    counts = {page.name: len(commands(page)) for page in PAGES}
    assert counts["README.md"] >= 8 and counts["evaluation.md"] >= 14, counts
    assert counts["reproducing.md"] >= 60 and counts["sweep.md"] >= 3, counts
    recipes = {command.words[0] for command in DOCUMENTED if command.words}
    assert recipes >= set(RECIPES) - {name for name in RECIPES if name.startswith("digits")}


def needs(command: Documented) -> bool:
    """Whether a command cannot run everywhere as it stands: its images are not embedded."""
    return bool(re.search(r"cifar|imagenet|\.pth|\.ckpt|/data/", command.line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_with_commands_that_need_more_than_a_checkout_says_so(page: Path) -> None:
    told = re.search(r"\bGPUs?\b|\bdownload", page.read_text("utf-8"))
    assert told or not any(map(needs, commands(page)))


def test_digits_commands_need_no_more_than_a_checkout() -> None:
    """What a page does not mark must run as it stands: on embedded images, on a CPU."""
    plain = [command for command in DOCUMENTED if not needs(command)]
    for command in plain:
        if command.name in ("train", "sweep", "doctor"):
            config = PARSERS[command.name](list(command.words)).config
            assert config.data.name == "digits" and config.device == "auto", command.line
    assert len(plain) >= 12


# ---- flags -----------------------------------------------------------------------------------

KINDS_BY_NAME: dict[str, type] = {
    "train": TrainCommand, "eval": EvaluateCommand, "export": ExportCommand,
    "report": ReportCommand, "sweep": SweepCommand, "doctor": DoctorCommand,
}  # fmt: skip
FOREIGN = {"--lars", "--pretrained", "--seconds", "--standalone"}
"""Flags of other programs that pages name."""


@cache
def known_flags() -> set[str]:
    return {"--help", *ALIASES, *(flag for kind in KINDS_BY_NAME.values() for flag in flags(kind))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text("utf-8"))
    named = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*[\w]", span)}
    tables = {f"{flag.rpartition('.')[0]}" for flag in known_flags() if "." in flag}
    unknown = {flag for flag in named - known_flags() - FOREIGN if flag not in tables}
    assert not unknown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_in_its_commands_help_with_a_default_unless_it_is_required(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        PARSERS[name](["--help"])
    options = capsys.readouterr().out.partition("show this help message")[2]
    entries = re.split(r"^. (?=--[a-z])", options, flags=re.MULTILINE)[1:]
    listed = {entry.split()[0].rstrip(",") for entry in entries}
    assert listed == {flag for flag in flags(KINDS_BY_NAME[name]) if "no-" not in flag}
    for entry in entries:
        assert "(default:" in entry or "(required)" in entry, entry


UNIT = re.compile(
    r"pixel|degree|epoch|step|batch|image|share|probab|rank|worker|process|thread|channel|layer"
    r"|width|MiB|second|lines|direction|neighbor|checkpoint|run|number|seed|passes|area|ratio"
    r"|learning rate|momentum|factor|coefficient|exponent|deviation|mean\b|color circle|decay",
    re.IGNORECASE,
)
"""Units, what is counted, and quantities of the field whose name says that they have none."""


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_every_number_says_its_unit_or_what_it_counts(kind: type) -> None:
    texts, hints = sentences(kind), get_type_hints(kind)
    for field in fields(kind):
        hint = hints[field.name]
        parts = get_args(hint) if get_origin(hint) not in (None, Literal) else (hint,)
        if {int, float} & set(parts):
            assert UNIT.search(texts[field.name]), f"{field.name}: {texts[field.name]!r}"


# ---- messages --------------------------------------------------------------------------------

HOLE = "\0"
"""Stands for what an f-string fills in."""


def _text(node: ast.expr) -> str | None:
    """A string as it is written, with holes; None for what is no string."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value) or HOLE for value in values)
        case _:
            return None


@cache
def strings() -> dict[Path, str]:
    """The strings of each module of rdm_fast, one under the other."""
    return {
        path: "\n".join(
            text
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.expr) and (text := _text(node)) is not None
        )
        for path in sorted((ROOT / "rdm_fast").rglob("*.py"))
    }


def is_written(message: str) -> bool:
    """Whether one module has all parts of a message, which are told apart by `…`."""
    parts = [part.strip(" :,;.()") for part in message.split("…")]
    assert any(len(part) >= 10 for part in parts), message
    return any(all(part in text for part in parts) for text in strings().values())


def test_every_message_on_the_page_of_troubles_is_one_of_ours() -> None:
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"`(?:error|warning): ([^`]+)`", page)
    assert len(messages) > 25
    assert not [message for message in messages if not is_written(message)]


def test_a_message_that_nothing_says_is_noticed() -> None:
    assert not is_written("--data.root … is not a place that we have ever heard of")


# ---- the container ---------------------------------------------------------------------------


def test_the_container_installs_extras_that_exist_and_copies_what_the_package_is_made_of() -> None:
    import tomllib

    dockerfile = (ROOT / "docker" / "Dockerfile").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (extras,) = re.findall(r'"\.\[([\w,-]+)\]"', dockerfile)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    copied = {word for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE)
              for word in line.split()[:-1]}  # fmt: skip
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {name.split("/")[0] for name in packages} <= copied
    assert all((ROOT / name).exists() for name in copied)
    (entry,) = re.findall(r'^ENTRYPOINT \["(\w+)"\]$', dockerfile, re.MULTILINE)
    assert entry in project["project"]["scripts"]
    (version,) = re.findall(r"^FROM python:(\d+\.\d+)", dockerfile, re.MULTILINE)
    assert tuple(map(int, version.split("."))) >= (3, 11)
    usage = re.findall(r"^# docker run .* rdm-fast (\w+) (.*)$", dockerfile, re.MULTILINE)
    assert usage
    for name, words in usage:
        PARSERS[name](shlex.split(words, comments=True))
