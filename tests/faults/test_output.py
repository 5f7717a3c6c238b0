"""A run never dies of its own output, and no text that it shows can forge a line or a color."""

import ast
import errno
import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from rdm_fast.cli import commands
from rdm_fast.config import DataConfig
from rdm_fast.data import load
from rdm_fast.errors import DataError, UserError, explained
from rdm_fast.run.folder import RunFolder
from rdm_fast.runtime import printing
from rdm_fast.runtime.printing import print_error, print_line, traceback_of, warn
from rdm_fast.training.session import record_failure
from tests.data.files import encode, put
from tests.forks import ROOT, Forked, call, environment
from tests.tiny import command, tiny

EVIL = "a\nerror: forged \x1b]0;title\x07\x1b[31m\u202e\x9b31m\r\udcff"
ESCAPED = r"a\nerror: forged \x1b]0;title\x07\x1b[31m\u202e\x9b31m\r\udcff"

# ---- one line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe 3 µm", "Größe 3 µm"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("bad \udcff byte", r"bad \udcff byte"),
        ("right\u202eleft\u2028next", r"right\u202eleft\u2028next"),
        (EVIL, ESCAPED),
    ],
)
def test_an_error_is_one_printable_line(text: str, shown: str) -> None:
    assert str(DataError(text)) == shown
    assert str(UserError(str(DataError(text)))) == shown


def test_lines_are_printed_in_the_encoding_of_the_stream() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_line("a\nb", "β \x07", file=file)
    assert file.buffer.getvalue() == b"a\\nb\n\\u03b2 \\x07\n"  # type: ignore[attr-defined]


def test_errors_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(DataError("no"), "rank 3: ")
    assert capsys.readouterr() == ("", "error: rank 3: no\n")


def test_a_traceback_has_the_message_on_one_line() -> None:
    try:
        try:
            raise KeyError(EVIL)
        except KeyError as error:
            raise ValueError(EVIL) from error
    except ValueError as error:
        lines = traceback_of(error).splitlines()
    assert lines[-1] == f"ValueError: {ESCAPED}"
    assert lines[0] == "Traceback (most recent call last):"
    assert sum("forged" in line for line in lines) == 2  # the two messages
    assert not any(line.startswith("error:") for line in lines)


def test_an_error_of_the_operating_system_is_no_bug(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / "a\nb").read_text()
    error = explained(caught.value, "", "")
    assert error.code == 74 and rf"{tmp_path}/a\nb" in str(error)
    assert explained(ValueError("x"), "", "").code == 70


def with_a_bug() -> None:
    """A command that raises what nobody expects."""
    name = "doctor"
    commands.COMMANDS[name] = replace(commands.COMMANDS[name], run=lambda *_: [][0])
    commands.main([name])


@pytest.mark.bug
@pytest.mark.parametrize("forked", [False, True])
def test_a_bug_is_one_line_with_a_code_of_its_own(
    forked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Any other test in which a command ends so fails."""
    if forked:
        code: object = Forked(with_a_bug, out=tmp_path / "out", err=tmp_path / "err").wait()
        text = (tmp_path / "err").read_text()
    else:
        monkeypatch.setattr(commands, "COMMANDS", dict(commands.COMMANDS))
        with pytest.raises(SystemExit) as ended:
            with_a_bug()
        code, text = ended.value.code, capsys.readouterr().err
    assert code == 70 and text.count("\n") == 1 and "IndexError" in text and "a bug" in text


@pytest.mark.parametrize("words", [
    ("train", EVIL), ("train", f"--{EVIL}"), ("train", "--resume", EVIL),
    ("train", "--data.name", EVIL), ("train", "--data.root", EVIL, "--data.name", "folder"),
    ("train", "--optim.epochs", EVIL), ("train", "--out", EVIL), (EVIL,), ("eval", EVIL),
    ("report", EVIL), ("export", EVIL, "--to", "timm"), ("train", "--data.classes", EVIL),
    ("doctor", "--json", EVIL + "/x"), ("train", "--allow-change", EVIL),
])  # fmt: skip
def test_no_argument_can_forge_a_line(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        commands.main(words)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.split("\n") if line]
    assert ended.value.code in (2, 65, 66, 73) and len(lines) == 1, printed
    assert lines[0].isprintable() and "\r" not in printed.err + printed.out


def test_a_setting_of_a_foreign_run_cannot_forge_a_line(tmp_path: Path) -> None:
    data = DataConfig(name="folder", root=EVIL.removesuffix("\udcff"))
    RunFolder.open(str(tmp_path), replace(tiny(), data=data), overwrite=False, rank=0).close()
    done = call("train.py", "--resume", tmp_path, cwd=tmp_path)
    assert done.returncode == 66
    assert done.stderr.count("\n") == 1 and done.stderr.strip("\n").isprintable(), done.stderr
    assert_nothing_forged(tmp_path / "logs" / "rank0.err")


def test_an_error_of_a_library_cannot_forge_a_line_of_the_log(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path), tiny(), overwrite=False, rank=0)
    with pytest.raises(UserError), record_failure(folder):
        raise OSError(errno.EIO, EVIL, "file")
    folder.close()
    assert_nothing_forged(tmp_path / "logs" / "rank0.err")


def assert_nothing_forged(log: Path) -> None:
    kept = log.read_text().splitlines()
    assert all(line.isprintable() for line in kept)
    assert not any(line.startswith("error:") for line in kept)


# ---- streams that take nothing ---------------------------------------------------------------


def train(out: str, *flags: str) -> None:
    sys.argv = ["train.py", *command("--optim.epochs 2 --log.every 1"), "--out", out, *flags]
    commands.train()


def train_into(kind: str, out: str) -> None:
    """Train with streams of a kind; python's own flush at the end is part of it."""
    if kind == "closed":
        for number in (0, 1, 2):
            os.close(number)
        sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as Python starts then
    elif kind == "full":
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1), os.dup2(full, 2)
    else:  # a pipe whose reader is gone
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1), os.dup2(writer, 2)
    train(out)


@pytest.mark.parametrize("kind", ["closed", "full", "pipe"])
def test_a_run_ends_well_though_nobody_takes_its_output(kind: str, tmp_path: Path) -> None:
    process = Forked(train_into, kind, str(tmp_path / "run"), out=tmp_path / "log")
    assert process.wait() == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    for file in (tmp_path / "run").rglob("*.json*"):
        assert b"finished:" not in file.read_bytes()  # no file has taken the stream's number


@pytest.mark.parametrize(
    "line",
    [
        "{py} -c '{main}' --help | head -n 1",
        "{py} -c '{main}' train --help | head -n 1",
        "{py} -c '{main}' train --print-config >/dev/full",
        "{py} -c '{main}' train --print-config >&- 2>&-",
        "{py} -c '{main}' eval --help >&-",
    ],
)
def test_an_answer_that_nobody_takes_is_given_with_its_exit_code(line: str, tmp_path: Path) -> None:
    program = line.format(py=sys.executable, main="from rdm_fast.cli.commands import main; main()")
    script = f"set -o pipefail; {program}"
    done = subprocess.run(
        ["bash", "-c", script], env=environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_path_that_the_stream_cannot_encode(tmp_path: Path) -> None:
    process = Forked(in_ascii, str(tmp_path / "运行"), out=tmp_path / "log")
    assert process.wait() == 0
    assert r"\u8fd0\u884c" in (tmp_path / "log").read_text("ascii")


def in_ascii(out: str) -> None:
    sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115
    train(out)


# ---- one door --------------------------------------------------------------------------------


def outside_the_door(tree: ast.AST) -> list[str]:
    """What prints or warns by itself."""
    found = []
    for node in ast.walk(tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if name in ("warnings.warn", "warnings.showwarning", "sys.stdout.write",
                    "sys.stderr.write", "traceback.print_exc", "traceback.format_exc"):  # fmt: skip
            found.append(f"{getattr(node, 'lineno', 0)}: {name}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "pprint", "tqdm"):
            found.append(f"{node.lineno}: {ast.unparse(node.func)}")
        if isinstance(node, ast.ImportFrom) and node.module in ("warnings", "logging"):
            found.append(f"{node.lineno}: from {node.module}")
    return found


def test_no_module_prints_or_warns_but_through_the_door() -> None:
    door = Path(str(printing.__file__))
    modules = [*(ROOT / "rdm_fast").rglob("*.py")]
    assert len(modules) > 100 and outside_the_door(ast.parse(door.read_text()))
    for path in modules:
        if path != door:
            assert not outside_the_door(ast.parse(path.read_text("utf-8"))), path


def test_a_librarys_warning_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    printing.guard_streams()
    warnings.simplefilter("always")
    warnings.warn(EVIL, RuntimeWarning, stacklevel=1)
    warn(EVIL)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: a") for line in lines)
    assert all(line.isprintable() for line in lines)


def test_pillows_warnings_are_not_repeated_by_every_worker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        printing.guard_streams()
        for module in ("PIL.Image", "PIL.TiffImagePlugin", "PILLAR"):
            warnings.warn_explicit("odd", UserWarning, "x.py", 1, module)
    assert capsys.readouterr().err == "warning: odd\n"


def test_pillows_warnings_come_once_a_kind_with_the_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a run that has cached nothing yet, and then in the next one."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for i in range(8):
        put(tmp_path / f"{i}.png", encode(Image.new("RGB", (12, 10 + i // 4))))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        printing.guard_streams()
        config = DataConfig(name="folder", root=str(tmp_path))
        assert len(load(config, "train")) == 8
        text = "".join(capsys.readouterr())
        assert text.count("decompression bomb") == 1 and "8 file(s), such as 0.png" in text
        warnings.warn_explicit("odd", UserWarning, "x.py", 1, "PIL.Image")
        load(config, "train")
    assert "warning" not in "".join(capsys.readouterr())


def test_a_system_that_is_not_supported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as ended:
        commands.main(["train", "--print-config"])
    err = capsys.readouterr().err
    assert ended.value.code == 69 and err.count("\n") == 1 and "Linux" in err
