"""README and docs/: the site builds, and every command, flag, message and file on a page exists."""

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from rdm_fast.cli.commands import COMMANDS, main
from rdm_fast.config.recipes import RECIPES
from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.models.layouts import LAYOUTS
from rdm_fast.tools.export.targets import TARGETS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = {page.name: page.read_text("utf-8") for page in PAGES}

# ---- the site --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a network; a warning fails the build."""
    pytest.importorskip("mkdocs", reason="the site is built with the extra rdm-fast[docs]")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    proxies = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


class Resources(HTMLParser):
    """Addresses that a browser fetches to show a page."""

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


def test_the_site_has_every_page_the_docstrings_and_formulas(site: Path) -> None:
    for page in DOCS.glob("*.md"):
        assert (site / page.with_suffix(".html").name).exists(), page.name
    api = (site / "api.html").read_text("utf-8")
    for name in ("rdm_fast.spectral_loss", "rdm_kernels.gram.gram", "rdm_fast.spectrum.watch"):
        assert f'id="{name}"' in api, name
    assert (site / "method.html").read_text("utf-8").count('class="arithmatex"') > 50


def test_the_site_fetches_only_its_own_files(site: Path) -> None:
    seen = 0
    for page in site.rglob("*.html"):
        for url in Resources(page.read_text("utf-8")).found:
            parts = urlsplit(url)
            assert parts.scheme in ("", "data") and not parts.netloc, f"{page.name}: {url}"
            file = page.parent / unquote(parts.path)
            assert parts.scheme or page.name == "404.html" or file.exists(), f"{page.name}: {url}"
            seen += 1
    assert seen > 50
    for sheet in site.rglob("*.css"):
        for url in re.findall(r"(?:url\(|@import\s*)[\"']?([^\"')\s]+)", sheet.read_text("utf-8")):
            assert not urlsplit(url).netloc, f"{sheet.name}: {url}"


def test_every_page_is_in_the_navigation() -> None:
    nav = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert {path for path in nav if "/" not in path} == {page.name for page in DOCS.glob("*.md")}


# ---- commands --------------------------------------------------------------------------------


def evaluated(words: list[str]) -> Any:
    command = COMMANDS["eval"].parse(words)
    command.protocol_for("cifar10")  # checks that are made once the data set is known
    return command


PARSERS: dict[str, Callable[..., Any]] = {
    **{name: command.parse for name, command in COMMANDS.items()}, "eval": evaluated,
}  # fmt: skip
SCRIPTS = {"train.py": "train", "torchrun.sh": "train", "eval_linear.py": "eval"}
PLACEHOLDERS = {"RUN": "runs/a", "RECIPE": "digits_byol", "...": ""}


class Documented(NamedTuple):
    """A command of this project on a page."""

    line: str
    name: str
    words: tuple[str, ...]


def shell_lines(text: str) -> Iterator[str]:
    """Lines of indented blocks and of blocks fenced as shell; a `for` loop is one line."""
    text = re.sub(r"\\\n\s*", "", text)
    text = re.sub(r"\n +done$", "; done", re.sub(r"; do\n +", "; do ", text), flags=re.MULTILINE)
    fenced = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"^ {4}(.+)$", outside, re.MULTILINE)
    for block in fenced:
        yield from block.splitlines()


def unrolled(line: str) -> list[str]:
    """The commands that a `for` loop runs; any other line as it is."""
    loop = re.fullmatch(r"for (\w+) in ([^;]+); do (.+); done", line.split("  #")[0].strip())
    if loop is None:
        return [line]
    name, values, body = loop.groups()
    return [re.sub(rf"\$\{{?{name}\b\}}?", value, body) for value in values.split()]


def commands(text: str) -> Iterator[Documented]:
    for line in (each for raw in shell_lines(text) for each in unrolled(raw)):
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            name = SCRIPTS.get(Path(word).name)
            if word == "rdm" and i + 1 < len(words):
                name, i = words[i + 1], i + 1
            if name is not None:
                given = (PLACEHOLDERS.get(word, word) for word in words[i + 1 :])
                yield Documented(line, name, tuple(filter(None, given)))
                break


DOCUMENTED = {name: list(commands(text)) for name, text in TEXTS.items()}
ALL = [command for found in DOCUMENTED.values() for command in found]


def needs_images(command: Documented) -> bool:
    """Whether a command needs more than the embedded images."""
    return bool(re.search(r"cifar|imagenet|\.pth|\.ckpt|/data/", command.line))


@pytest.mark.parametrize("page", DOCUMENTED)
def test_every_command_on_a_page_parses(page: str) -> None:
    for command in DOCUMENTED[page]:
        assert command.name in PARSERS, command.line
        try:
            parsed = PARSERS[command.name](list(command.words))
        except Exception as error:
            pytest.fail(f"{command.line}\n{error}")
        if command.name in ("train", "sweep", "doctor") and not needs_images(command):
            assert parsed.config.data.name == "digits", command.line
            assert parsed.config.device == "auto", command.line
    if any(map(needs_images, DOCUMENTED[page])):
        assert re.search(r"\bGPUs?\b|\bdownload", TEXTS[page]), "say what the commands need"


def test_the_commands_are_found() -> None:
    """Patterns that find nothing would make the test above prove nothing."""
    assert {command.name for command in ALL} == set(COMMANDS) == set(PARSERS)
    least = {"README.md": 15, "evaluation.md": 14, "reproducing.md": 60, "scaling.md": 6}
    for page, count in least.items():
        assert len(DOCUMENTED[page]) >= count, page
    recipes = {command.words[0] for command in ALL if command.words}
    assert recipes >= {name for name in RECIPES if not name.startswith("digits")}
    assert sum(not needs_images(command) for command in ALL) >= 12


# ---- flags -----------------------------------------------------------------------------------

FOREIGN = {"--lars", "--max-restarts", "--pretrained", "--seconds", "--standalone"}
"""Flags of other programs that pages name."""

UNIT = re.compile(
    r"pixel|degree|epoch|step|batch|image|share|probab|rank|worker|process|thread|channel|layer"
    r"|width|MiB|second|lines|direction|neighbor|checkpoint|run|number|seed|passes|area|ratio"
    r"|learning rate|momentum|factor|coefficient|exponent|deviation|mean\b|color circle|decay",
    re.IGNORECASE,
)
"""Units, counted things, and quantities whose name implies that they have none."""


@cache
def help_text(command: str) -> str:
    """The help of `rdm COMMAND`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main([command, "--help"])
    return printed.getvalue()


@pytest.mark.parametrize("page", TEXTS)
def test_every_flag_that_a_page_names_exists(page: str) -> None:
    known = {flag for name in COMMANDS for flag in re.findall(r"--[a-z][\w.-]*", help_text(name))}
    groups = {flag.rpartition(".")[0] for flag in known}
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", TEXTS[page])
    named = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", span)}
    assert not named - known - groups - FOREIGN


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_default_for_every_flag_and_a_unit_for_every_number(name: str) -> None:
    entries = re.split(r"^. (?=--[a-z][\w.-]*[ ,])", help_text(name), flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        _, _, text = re.sub(r"[\s│]+", " ", entry).partition(" ")
        assert "(default:" in text or "(required)" in text, entry
        assert UNIT.search(text) or not re.search(r"\b(?:INT|FLOAT)\b", text), entry


# ---- messages, tables, files -------------------------------------------------------------------


def _text(node: ast.expr) -> str | None:
    """A string literal, with NUL for the holes of an f-string; None for other expressions."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value) or "\0" for value in values)
        case _:
            return None


def test_every_message_on_the_troubleshooting_page_exists() -> None:
    """Its parts between `…` are in the strings of one module."""
    strings = [
        "\n".join(
            text
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.expr) and (text := _text(node)) is not None
        )
        for path in (ROOT / "rdm_fast").rglob("*.py")
    ]

    def is_written(message: str) -> bool:
        parts = [part.strip(" :,;.()") for part in message.split("…")]
        assert any(len(part) >= 10 for part in parts), message
        return any(all(part in text for part in parts) for text in strings)

    messages = re.findall(r"`(?:error|warning): ([^`]+)`", TEXTS["troubleshooting.md"])
    assert len(messages) > 25
    assert not [message for message in messages if not is_written(message)]
    assert not is_written("--data.root … is no message of this project")


def test_the_evaluation_page_names_every_protocol_target_and_layout() -> None:
    page = TEXTS["evaluation.md"]
    for name in (*PROTOCOLS, *TARGETS):
        assert f"`{name}`" in page, name
    for layout in LAYOUTS.values():
        assert not layout.prefix or layout.prefix == "module." or layout.prefix in page, layout


def test_every_test_file_that_a_page_names_exists() -> None:
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    rows = re.findall(r"\| ([^|]*`test_[^|]*) \|$", TEXTS["reproducing.md"], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(test_\w+)`", row)} <= tests and rows
    paths = {path for text in TEXTS.values() for path in re.findall(r"`(tests/[\w/.]+)`", text)}
    assert paths and all((ROOT / path).exists() for path in paths), paths


def test_lines_are_at_most_120_columns_outside_tables() -> None:
    others = (ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG", "LOG"))
    for page in [*PAGES, *others]:
        lines = page.read_text("utf-8").splitlines()
        long = [line for line in lines if len(line) > 120 and line[0] not in "|!"]
        assert not long, f"{page.name}: {long[0]}"


def test_the_container_copies_the_packages_and_installs_existing_extras() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (extras,) = re.findall(r'"\.\[([\w,-]+)\]"', dockerfile)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    copies = re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE)
    copied = {word for words in copies for word in words.split()}
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
