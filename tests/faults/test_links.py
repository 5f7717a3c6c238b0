"""A run writes in its folder, the index and a private temporary folder; a link never leads it out.

The folder may come from a stranger: a link in it could stand for anything of its reader's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rdm_fast.errors import CannotCreate
from rdm_fast.run import checkpoint
from rdm_fast.run.environment import _git_commit
from rdm_fast.run.folder import CONTENTS, LOCK, RunFolder
from rdm_fast.runtime import atomic_files
from tests.forks import ROOT, Forked, call, environment
from tests.runs import run, run_to
from tests.tiny import command, tiny

FILES = ["run.json", *(name for name in CONTENTS if "." in name), LOCK]
FOLDERS = [name for name in CONTENTS if "." not in name]
INSIDE = [
    "logs/rank0.err", "logs/sweep.log", "logs/link", "checkpoints/.tmp-1-2",
    "checkpoints/step-00000002", "checkpoints/step-00000009", "checkpoints/step-00000002/more",
    "tensorboard/events.out.tfevents.1", "export/step-00000002-timm.pth", "figures/report-map.png",
    "evaluation/step-00000002-train.safetensors", "evaluation/step-00000002-closed-form.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interrupted run with one checkpoint."""
    out = tmp_path_factory.mktemp("made") / "run"
    run_to(out, tiny(), 2)
    (out / LOCK).unlink(missing_ok=True)
    return out


@pytest.fixture
def hostile(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Of the run's reader: a folder and a file that a link in the run may point to."""
    home = tmp_path / "home"
    (home / "folder" / ".tmp-precious").mkdir(parents=True)
    (home / "folder" / "step-00000001").mkdir()
    (home / "file").write_text("key\n")
    (home / "folder" / ".tmp-precious" / "file").write_text("kept\n")
    return home


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def put(place: Path, target: Path | str) -> None:
    """A link in the place of what is there."""
    atomic_files.remove(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


# ---- a run folder with links -----------------------------------------------------------------


@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
@pytest.mark.parametrize("name", [*FILES, *FOLDERS, *INSIDE])
def test_a_link_in_a_run_folder_is_refused_by_name(
    name: str, target: str, hostile: Path, home: Path
) -> None:
    put(hostile / name, home / target)
    before = content(home)
    with pytest.raises(CannotCreate) as refused:
        run(hostile, tiny())
    assert str(hostile / name) in str(refused.value)
    for rank in (0, 1):
        with pytest.raises(CannotCreate):
            RunFolder.open(str(hostile), tiny(), overwrite=False, rank=rank)
    assert content(home) == before


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_overwrite_deletes_links_and_not_what_they_point_to(
    name: str, hostile: Path, home: Path
) -> None:
    put(hostile / name, home / ("folder" if name in FOLDERS else "file"))
    before = content(home)
    try:
        RunFolder.open(str(hostile), tiny(), overwrite=True, rank=0).close()
    except CannotCreate:
        assert name == "run.json"  # without its mark the folder is another's
    assert content(home) == before


@pytest.mark.parametrize("name", ["logs/fifo", "metrics.jsonl", "checkpoints/step-00000002/more"])
def test_a_pipe_in_a_run_folder_is_refused_and_not_waited_for(name: str, hostile: Path) -> None:
    atomic_files.remove(hostile / name)
    os.mkfifo(hostile / name)
    with pytest.raises(CannotCreate) as refused:
        run(hostile, tiny())
    assert str(hostile / name) in str(refused.value)


def test_links_of_other_names_and_leftovers_are_no_obstacle(hostile: Path, home: Path) -> None:
    (hostile / "notes").symlink_to(home / "folder")
    (hostile / ".tmp-1-run.json").symlink_to(home / "file")
    (hostile / ".tmp-2").symlink_to(home / "folder")
    (hostile / ".tmp-3").mkdir()
    before = content(home)
    run(hostile, tiny())
    assert content(home) == before and (hostile / "notes").is_symlink()
    assert not list(hostile.glob(".tmp-*"))


def test_out_itself_may_be_a_link(made: Path, hostile: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(hostile)
    run(tmp_path / "link", tiny())
    assert json.loads((hostile / "status.json").read_text())["step"] == 8
    assert (tmp_path / "link").is_symlink()


def test_second_names_of_a_file_keep_their_content(hostile: Path, home: Path) -> None:
    """A hard link cannot be told from a file by its kind; what is appended to gets a file anew."""
    key = home / "file"
    for name in [*FILES[1:], "logs/rank0.err", "logs/sweep.log"]:
        if (hostile / name).exists():
            continue
        os.link(key, hostile / name)
    before = content(home)
    with atomic_files.appending(hostile / "logs" / "sweep.log") as log:
        log.write(b"line\n")
    assert (hostile / "logs" / "sweep.log").read_bytes() == b"key\nline\n"
    with pytest.raises(OSError):
        atomic_files.overwrite(hostile / "logs" / "rank0.err", "text")
    run(hostile, tiny())
    assert content(home) == before


# ---- the writer ------------------------------------------------------------------------------


def test_nothing_is_created_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    for target in ("kept", "made"):
        (tmp_path / "link").symlink_to(tmp_path / target)
        for write in (atomic_files.create, atomic_files.overwrite):
            with pytest.raises(OSError):
                write(tmp_path / "link", "text")
        with pytest.raises(OSError):
            atomic_files.appending(tmp_path / "link")
        atomic_files.replace(tmp_path / "link", "text")
        assert not (tmp_path / "link").is_symlink()
        (tmp_path / "link").unlink()
    assert (tmp_path / "kept").read_text() == "kept" and not (tmp_path / "made").exists()


def test_a_link_is_removed_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    atomic_files.remove(tmp_path / "link")
    atomic_files.remove(tmp_path / "link")
    assert (tmp_path / "folder" / "inner").is_dir() and not (tmp_path / "link").is_symlink()
    atomic_files.remove(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_temporary_names_cannot_be_foreseen(tmp_path: Path) -> None:
    names = {atomic_files.temporary(tmp_path).name for _ in range(100)}
    assert len(names) == 100 and all(re.fullmatch(r"\.tmp-[0-9a-f]{16}", name) for name in names)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/null")  # /dev/zero would have no end
    with pytest.raises(OSError):
        atomic_files.read(path)


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.MANIFEST])
def test_a_pipe_in_a_checkpoint_is_damage(name: str, hostile: Path) -> None:
    path = hostile / "checkpoints" / "step-00000002"
    (path / name).unlink()
    os.mkfifo(path / name)
    assert checkpoint.newest(path.parent, lambda _: None) is None


# ---- every write of a run --------------------------------------------------------------------

WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.link",
          "os.symlink", "os.truncate", "os.chmod", "os.utime"}  # fmt: skip


def watched(report: str, out: str, *words: str) -> None:
    """Run train.py; write what it changes on the disk to a file, path by path."""
    from rdm_fast.cli import commands

    changed: set[str] = set()

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event not in WRITES:
            return
        path, *rest = arguments
        if event == "open":
            mode, flags = (str(rest[0] or ""), int(str(rest[1] or 0)))
            writing = any(c in mode for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR)
            if not writing or isinstance(path, int):
                return
        both = event in ("os.rename", "os.link")
        beside = rest[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
        folder = os.readlink(f"/proc/self/fd/{beside}") if beside != -1 else os.getcwd()
        for each in (path, rest[0]) if both else (path,):
            if isinstance(each, str | bytes | os.PathLike):
                changed.add(os.path.realpath(os.path.join(folder, os.fsdecode(each))))

    sys.addaudithook(note)
    sys.argv = ["train.py", *words]
    try:
        commands.train()
    finally:
        Path(report).write_text("\n".join(sorted(changed)))


def elsewhere(paths: list[str], out: Path) -> list[str]:
    """Those outside the run folder, the private temporary folder and what is no file."""
    private = rf"{re.escape(os.path.realpath(os.environ.get('TMPDIR', '/tmp')))}/rdm-(fast|ranks)-"
    return [
        path
        for path in paths
        if not Path(path).is_relative_to(out) and not re.match(rf"{private}|/dev/|/proc/", path)
    ]


@pytest.mark.parametrize("case", ["new", "resumed", "hostile"])
def test_a_run_changes_nothing_outside_its_folder(
    case: str, made: Path, tmp_path: Path, home: Path
) -> None:
    out = tmp_path / "run"
    words = [*command(), "--out", str(out)]
    if case != "new":
        shutil.copytree(made, out)
        words = ["--resume", str(out)]
    if case == "hostile":
        put(out / "logs" / "rank0.err", home / "file")
    before, report = content(home), tmp_path / "report"
    process = Forked(watched, str(report), str(out), *words, out=tmp_path / "log")
    assert process.wait() == (73 if case == "hostile" else 0), (tmp_path / "log").read_text()
    changed = report.read_text().splitlines()
    assert elsewhere(changed, out) == [] and content(home) == before
    assert case == "hostile" or any(path.startswith(f"{out}/checkpoints/.tmp-") for path in changed)


CHANGING = re.compile(
    r"^(?:\[pid +\d+\] |\d+ +)?(?:(openat|open|creat)\(.*O_(?:WRONLY|RDWR|CREAT|TRUNC)"
    r"|(?:mkdir|mkdirat|rename\w*|unlink\w*|rmdir|link\w*|symlink\w*|truncate)\()"
)


NAMED = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
"""A path, after the folder that it starts from if the call names one."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("case", ["new", "hostile"])
def test_no_system_call_of_a_run_changes_anything_outside_its_folder(
    case: str, made: Path, tmp_path: Path, home: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "strace"
    words = [*command(), "--out", str(out)]
    if case == "hostile":
        shutil.copytree(made, out)
        put(out / "checkpoints" / ".tmp-1-2", home / "folder")
        words = ["--resume", str(out)]
    calls = "openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir"
    traced = [
        "strace",
        "-f",
        "-y",
        "-o",
        str(log),
        "-e",
        f"trace={calls},link,linkat,symlink,truncate",
    ]
    done = subprocess.run(
        [*traced, sys.executable, "-B", str(ROOT / "train.py"), *words], cwd=tmp_path,
        env=environment() | {"TORCHINDUCTOR_CACHE_DIR": str(out), "TRITON_CACHE_DIR": str(out)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == (73 if case == "hostile" else 0), done.stderr
    lines = [line for line in log.read_text(errors="replace").splitlines()
             if CHANGING.match(line) and " = -1 " not in line]  # fmt: skip
    named = [(tmp_path / beside, path) for line in lines for beside, path in NAMED.findall(line)]
    paths = [os.path.normpath(folder / path) for folder, path in named]
    assert len(paths) > 10 or case == "hostile"
    assert elsewhere(paths, out) == []


# ---- other commands --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("evaluation", "eval {run} --protocol closed-form --device cpu"),
        ("evaluation/step-00000002-train.safetensors", "eval {run} --device cpu"),
        ("export", "export {run} --to safetensors"),
        ("figures", "report {run} --map none"),
        ("report.html", "report {run} --map none"),
    ],
)
def test_other_commands_refuse_links_where_they_write(
    link: str, words: str, hostile: Path, home: Path
) -> None:
    put(hostile / link, home / "folder")
    before = content(home)
    done = call("rdm", *words.format(run=hostile).split(), cwd=home.parent)
    assert done.returncode == 73 and str(hostile / link) in done.stderr, done.stderr
    assert content(home) == before


def test_a_sweep_refuses_a_link_in_the_place_of_a_run(tmp_path: Path, home: Path) -> None:
    from rdm_fast.tools.sweep.make import MARK, _prepare

    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / MARK).write_text("{}")
    (home / "empty").mkdir()
    (sweep / "run").symlink_to(home / "empty")
    before = content(home)
    config = tiny()
    object.__setattr__(config, "out", str(sweep / "run"))
    with pytest.raises(CannotCreate):
        _prepare(config, overwrite=False)
    assert content(home) == before


def test_asking_git_for_the_commit_leaves_the_checkout_alone(tmp_path: Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    git = ["git", "-C", str(tmp_path), *identity]
    file = tmp_path / "file"
    file.write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    os.utime(file, (1, 1))  # git may want to save that the content is the same
    before = content(tmp_path / ".git")
    assert _git_commit(tmp_path) == commit.strip()
    assert content(tmp_path / ".git") == before
    file.write_text("2")
    assert _git_commit(tmp_path) == f"{commit.strip()}-dirty"
    assert content(tmp_path / ".git") == before and _git_commit(tmp_path / "none") is None
