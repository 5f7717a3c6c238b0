"""A full, read-only or emptied disk costs what does not fit; status.json says how a run ended."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rdm_fast import __main__ as entries
from rdm_fast.errors import CannotCreate, InputMissing, OutputFailed
from rdm_fast.run import checkpoint
from rdm_fast.run.folder import RunFolder, read_status
from rdm_fast.runtime import atomic_files
from rdm_fast.training.session import record_failure
from rdm_fast.training.trainer import Trainer
from tests.forks import ROOT, Forked, call, environment
from tests.processes import of_rank
from tests.runs import in_step, metrics, newest, run, run_to
from tests.tiny import command, tiny


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- a full disk -----------------------------------------------------------------------------


def test_the_end_of_a_run_is_recorded_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder.open(str(tmp_path), tiny(), overwrite=False, rank=0) as folder:
        folder.write_status("running", step=3, message="x" * 500)
        with monkeypatch.context() as patch, pytest.raises(OutputFailed):
            patch.setattr(atomic_files, "replace", no_room)
            with record_failure(folder):
                raise OutputFailed("the disk is full")
    status = read_status(tmp_path)
    assert (status["state"], status["code"], status["step"]) == ("failed", 74, 3)


def full_from_the_third_step(words: Sequence[str]) -> None:
    """A rank whose disk takes no new file any more."""

    def fill(trainer: Trainer) -> None:
        for owner, name in ((atomic_files, "replace"), (checkpoint, "save")):
            setattr(owner, name, no_room)

    fit = Trainer.fit
    Trainer.fit = lambda self: (in_step(self, 3, fill), fit(self))  # type: ignore[assignment]
    sys.argv = ["train.py", *words]
    entries.train()


def test_two_ranks_on_a_full_disk_end_with_one_line(tmp_path: Path) -> None:
    words = [*command("--log.save-every 1"), "--out", str(tmp_path / "run")]
    ranks = [
        Forked(full_from_the_third_step, words, out=tmp_path / "out",
               env=environment() | of_rank(number, 2, tmp_path))
        for number in range(2)
    ]  # fmt: skip
    assert [process.wait() for process in ranks] == [74, 74]
    text = (tmp_path / "out").read_text()
    assert text.count("error:") == 1 and "Traceback" not in text, text
    status = read_status(tmp_path / "run")
    assert (status["state"], status["code"], status["step"]) == ("failed", 74, 2)


def may_mount() -> bool:
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        ).returncode
    )


def mounted(options: str, program: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A program with the folder on a file system of its own; status.json is printed at last."""
    script = f'mount {options} "$1"; "${{@:2}}"; code=$?; cat "$1/run/status.json"; exit $code'
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "bash", str(folder), *program],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="only root may mount a full disk")
def test_a_run_on_a_full_disk(tmp_path: Path) -> None:
    out = tmp_path / "disk"
    out.mkdir()
    words = [*command("--optim.epochs 2 --log.save-every 1 --log.keep 8"), "--model.width", "32"]
    program = [sys.executable, str(ROOT / "train.py"), *words, "--out", str(out / "run")]
    done = mounted("-t tmpfs -o size=3m tmpfs", program, out)
    assert done.returncode == 74 and done.stderr.count("error:") == 1, done.stderr
    status = json.loads(done.stdout[done.stdout.index("{") :])
    assert (status["state"], status["code"]) == ("failed", 74)


# ---- a read-only disk ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="only root may mount a read-only disk")
def test_a_finished_run_on_a_read_only_disk_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "disk" / "run"
    run(out, tiny())
    with RunFolder.open(str(out), tiny(), overwrite=False, rank=0) as folder:
        folder.write_status("finished", step=8, checkpoint="step-00000008")
    program = [sys.executable, str(ROOT / "train.py"), "--resume", str(out)]
    options = f"--bind -o ro {out.parent}"
    done = mounted(options, program, out.parent)
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr


def test_a_finished_run_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rdm_fast.training.session import train

    config = replace(tiny(), out=str(tmp_path / "run"))
    run(tmp_path / "run", config)
    with RunFolder.open(config.out, config, overwrite=False, rank=0) as folder:
        folder.write_status("finished", step=8, checkpoint="step-00000008")
    monkeypatch.setattr(atomic_files, "replace", no_room)
    monkeypatch.setattr(atomic_files, "create", no_room)
    train(config, overwrite=False, allow_change=())
    with pytest.raises(CannotCreate):
        train(config, overwrite=True, allow_change=())


# ---- what is deleted while a run goes on -----------------------------------------------------


def test_a_folder_that_is_deleted_while_its_run_goes_on_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(out, tiny(), lambda trainer: in_step(trainer, 5, lambda _: shutil.rmtree(out)))
    printed = capsys.readouterr()
    assert f"warning: {out} was deleted" in printed.out
    assert newest(out).name == "step-00000008"
    with RunFolder.open(str(out), tiny(), overwrite=False, rank=0) as folder:
        assert not folder.is_new


def test_metrics_that_are_deleted_are_written_to_a_new_file(tmp_path: Path) -> None:
    def delete(_: Trainer) -> None:
        (tmp_path / "metrics.jsonl").unlink()

    run(tmp_path, tiny(), lambda trainer: in_step(trainer, 5, delete))
    assert [line["step"] for line in metrics(tmp_path)] == [6, 8]


@pytest.mark.parametrize(
    "lose", [shutil.rmtree, lambda path: [shutil.rmtree(p) for p in path.iterdir()]]
)
def test_a_run_whose_checkpoints_are_gone_does_not_start_at_zero(
    lose: Callable[[Path], object], tmp_path: Path
) -> None:
    run_to(tmp_path, tiny(), 2)
    lose(tmp_path / "checkpoints")
    with pytest.raises(InputMissing) as refused:
        run(tmp_path, tiny())
    assert "step-00000002" in str(refused.value) and "--overwrite" in str(refused.value)


# ---- what is in the way ----------------------------------------------------------------------


def test_a_folder_in_the_place_of_a_result_keeps_the_result_on_the_screen(tmp_path: Path) -> None:
    run(tmp_path / "run", tiny())
    step = newest(tmp_path / "run").name
    for name in ("closed-form", "closed_form"):
        (tmp_path / "run" / "evaluation" / f"{step}-{name}.json").mkdir(parents=True)
    done = call("eval_linear.py", tmp_path / "run", "--protocol", "closed-form", cwd=tmp_path)
    assert done.returncode == 74 and "linear probe" in done.stdout, done.stderr
    assert done.stderr.count("\n") == 1 and f"{step}-closed" in done.stderr


@pytest.mark.parametrize("out", ["a\0b", "a\udcff", os.fsdecode(b"\xff")])
def test_an_out_that_is_no_text_is_a_mistake(out: str) -> None:
    with pytest.raises(ValueError) as refused:
        replace(tiny(), out=out)
    assert refused.value.code == 2 and "out=" in str(refused.value)  # type: ignore[attr-defined]
