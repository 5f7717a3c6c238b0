"""rdm_fast.run.folder: ownership, the lock, and what is never touched."""

import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rdm_fast.config.recipes import RECIPES
from rdm_fast.config.saved import config_digest, config_to_dict
from rdm_fast.errors import CannotCreate, ConfigMismatch, DataError, InputMissing
from rdm_fast.run.folder import RunFolder, read_config, read_status
from tests.forks import Forked

ROOT = Path(__file__).parents[2]
CONFIG = RECIPES["digits_rdm_simsiam"]()


def open_run(out: Path, *, overwrite: bool = False, rank: int = 0) -> RunFolder:
    return RunFolder.open(str(out), CONFIG, overwrite=overwrite, rank=rank)


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder except the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.name.startswith("run.lock")
    }


# ---- a new run -------------------------------------------------------------------------------


def test_a_new_folder_is_marked_and_holds_the_whole_configuration(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    with open_run(out) as folder:
        assert folder.is_new and folder.checkpoints.is_dir() and folder.logs.is_dir()
        mark = json.loads((out / "run.json").read_text())
        assert mark["project"] == "rdm-fast" and mark["format"] == 1
        assert mark["id"] == folder.id and len(folder.id) == 8
        assert mark["config_digest"] == config_digest(CONFIG)
        assert mark["created"].endswith("+00:00")
        assert yaml.safe_load((out / "config.yaml").read_text()) == config_to_dict(CONFIG)
        assert read_config(out) == CONFIG
        assert read_status(out)["state"] == "running"


def test_an_existing_empty_folder_is_taken(tmp_path: Path) -> None:
    with open_run(tmp_path) as folder:
        assert folder.is_new


def test_other_ranks_know_the_paths_and_write_nothing(tmp_path: Path) -> None:
    with open_run(tmp_path / "a", rank=3) as folder:
        assert folder.checkpoints == tmp_path / "a" / "checkpoints" and not folder.is_new
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_is_opened_as_it_is(tmp_path: Path) -> None:
    with open_run(tmp_path) as first:
        (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = content(tmp_path)
    with open_run(tmp_path) as second:
        assert not second.is_new and second.id == first.id
        assert content(tmp_path) == before


def test_a_start_that_was_killed_before_its_mark_can_be_repeated(tmp_path: Path) -> None:
    for name in ("run.lock", "run.lock.json", ".tmp-99-run.json"):
        (tmp_path / name).write_text("")
    with open_run(tmp_path) as folder:
        assert folder.is_new
        assert not (tmp_path / ".tmp-99-run.json").exists()


def test_a_start_that_was_killed_before_its_configuration_starts_over(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "checkpoints" / "step-00000001").mkdir()
    with open_run(tmp_path) as folder:
        assert folder.is_new and list(folder.checkpoints.iterdir()) == []


# ---- folders that are not ours ---------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "text"},
        {"run.json": "{}"},
        {"run.json": '{"project": "another"}'},
        {"run.json": "not JSON"},
        {"config.yaml": "{}", "checkpoints": None},
        {".hidden": ""},
    ],
    ids=lambda files: "+".join(files),
)
def test_a_foreign_folder_is_refused_and_untouched(
    tmp_path: Path, files: dict[str, str | None], overwrite: bool
) -> None:
    for name, text in files.items():
        if text is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(CannotCreate) as refused:
        open_run(tmp_path, overwrite=overwrite)
    assert f"--out {tmp_path}" in str(refused.value)
    assert content(tmp_path) == before and not (tmp_path / "run.lock").exists()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for out in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / ("x" * 300)):
        with pytest.raises(CannotCreate) as refused:
            open_run(out)
        assert f"--out {out}" in str(refused.value)


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        may_write = os.access(tmp_path, os.W_OK)  # root may; nobody may write in /proc
        with pytest.raises(CannotCreate):
            open_run(Path("/proc/run") if may_write else tmp_path / "a")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


# ---- overwrite -------------------------------------------------------------------------------


def test_overwrite_deletes_the_runs_own_contents_and_nothing_else(tmp_path: Path) -> None:
    out, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    open_run(out).close()
    for name in ("metrics.jsonl", "report.html", "spectrum.jsonl", "notes.txt"):
        (out / name).write_text("old")
    (out / "checkpoints" / "step-00000009").mkdir()
    (out / "figures").symlink_to(outside)
    with open_run(out, overwrite=True) as folder:
        assert folder.is_new
    assert set(content(out)) == {
        *("run.json", "config.yaml", "status.json", "checkpoints", "logs", "notes.txt"),
    }
    assert (outside / "precious").read_text() == "kept"
    assert (out / "notes.txt").read_text() == "old"


def test_an_overwrite_gives_the_run_a_new_id(tmp_path: Path) -> None:
    with open_run(tmp_path) as first:
        pass
    with open_run(tmp_path, overwrite=True) as second:
        assert second.id != first.id


# ---- the lock --------------------------------------------------------------------------------


def hold(out: Path) -> None:
    with open_run(out):
        if os.fork() == 0:  # like a loader's worker process, which may outlive its parent
            time.sleep(30)
            os._exit(0)
        print("held", flush=True)
        time.sleep(30)


def test_a_second_process_learns_who_holds_the_folder_until_that_one_dies(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    holder = Forked(hold, out, out=log)
    try:
        while not log.exists() or log.read_text() != "held\n":
            assert holder.poll() is None
        before = content(out)
        for overwrite in (False, True):
            with pytest.raises(CannotCreate) as refused:
                open_run(out, overwrite=overwrite)
            assert f"process {holder.pid} " in str(refused.value)
        assert content(out) == before
        holder.kill()
        holder.wait()
        with open_run(out) as folder:  # at once, though its forked child lives
            assert not folder.is_new
            assert json.loads((out / "run.lock.json").read_text())["pid"] == os.getpid()
    finally:
        os.killpg(holder.pid, 9)


def test_a_closed_folder_can_be_opened_again_and_an_open_one_cannot(tmp_path: Path) -> None:
    with open_run(tmp_path), pytest.raises(CannotCreate):
        open_run(tmp_path)
    open_run(tmp_path).close()
    assert not (tmp_path / "run.lock.json").exists()


def test_a_refusal_comes_without_loading_torch() -> None:
    program = "import sys, rdm_fast.run.folder; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


# ---- configuration and status ----------------------------------------------------------------


def test_a_run_that_never_saved_takes_another_configuration(tmp_path: Path) -> None:
    """As after a first try that was refused for its batch size."""
    with open_run(tmp_path) as folder:
        folder.accept(replace(CONFIG, seed=3))
        assert read_config(folder.path).seed == 3


def test_accept_refuses_another_run_and_keeps_its_configuration(tmp_path: Path) -> None:
    longer = replace(CONFIG, optim=replace(CONFIG.optim, epochs=99))
    with open_run(tmp_path) as folder:
        (folder.checkpoints / "step-00000002").mkdir()
        for other, name in ((replace(CONFIG, seed=3), "seed"), (longer, "optim.epochs")):
            with pytest.raises(ConfigMismatch) as refused:
                folder.accept(other)
            assert name in str(refused.value)
        assert read_config(tmp_path) == CONFIG
        folder.accept(longer, allow=("optim.epochs",))
        assert read_config(tmp_path) == longer


@pytest.mark.parametrize(
    "text",
    ["a: [", "- 1", "", "!!python/object/apply:os.system ['touch ran']", "optim: {epoch: 1}"],
)
def test_an_unusable_configuration_file_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["nothing", "a file"])
def test_a_missing_run_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(InputMissing) as missing:
        read_config(tmp_path / path)
    assert str(tmp_path / path) in str(missing.value)


def test_status_says_what_was_last_written(tmp_path: Path) -> None:
    with open_run(tmp_path) as folder:
        folder.write_status(
            "interrupted", step=70, code=75, checkpoint="step-00000070", message="stopped"
        )
        assert read_status(tmp_path) == {
            "state": "interrupted", "code": 75, "step": 70, "checkpoint": "step-00000070",
            "rank": 0, "message": "stopped",
        }  # fmt: skip
    with open_run(tmp_path, rank=2) as other:
        other.write_status("failed", step=71, code=76, message="rank 2 was lost")
    assert read_status(tmp_path)["rank"] == 2


def test_a_reader_never_sees_half_a_status(tmp_path: Path) -> None:
    folder = open_run(tmp_path)
    if (child := os.fork()) == 0:
        for step in range(10**9):
            folder.write_status("running", step=step, message="x" * 10_000)
    seen: set[Any] = set()
    try:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            status = read_status(tmp_path)
            assert status["message"] in ("", "x" * 10_000)
            seen.add(status["step"])
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        folder.close()
    assert len(seen) > 10
