"""rdm sweep as a whole: what it refuses, what it leaves, and what a kill -9 costs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rdm_fast.cli import commands as cli
from rdm_fast.errors import (
    CannotCreate,
    ConfigMismatch,
    DataError,
    NonFinite,
    Unavailable,
    UsageError,
    UserError,
)
from rdm_fast.run.folder import RunFolder, read_config, read_status
from rdm_fast.tools.report import style
from rdm_fast.tools.sweep import make
from rdm_fast.tools.sweep.make import make_sweep, visible_gpus
from rdm_fast.tools.sweep.queue import LAUNCHED, PROGRAM, Failure
from tests.forks import PATIENCE, environment
from tests.processes import alive, children, final_bytes
from tests.runs import run
from tests.tiny import command
from tests.tools.report.made import make_run

Sweep = Callable[..., None]


def words(out: Path, *more: str) -> list[str]:
    """The tiny run under two filters."""
    filters = [] if "--filter" in more else ["--filter", "online_s1", "control"]
    return [*command(), "--device", "cpu", "--out", str(out), *filters, *more]


@pytest.fixture
def failures() -> dict[str, Failure]:
    """Which runs fail in `sweep`; a test may add some."""
    return {}


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, failures: dict[str, Failure]) -> Sweep:
    """A sweep whose runs are complete at once, with metrics."""

    def run_all(runs: Mapping[str, Path], **_: Any) -> dict[str, Failure]:
        for path in runs.values():
            if not (path / "metrics.jsonl").exists():
                make_run(path, read_config(path))
        return failures

    monkeypatch.setattr(make, "run_all", run_all)
    monkeypatch.setattr(style, "DPI", 60)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return lambda out, *more: make_sweep(cli.COMMANDS["sweep"].parse(words(out, *more)))


# ---- what it leaves --------------------------------------------------------------------------


def test_a_sweep_leaves_a_run_folder_a_filter_a_table_and_a_figure(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path / "sweep")
    names = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert names == {"online_s1", "control", "sweep.json", "sweep.md", "sweep.png"}
    assert read_config(tmp_path / "sweep" / "control").filter.sigma == 0
    results = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["online_s1", "control"]
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert table in capsys.readouterr().out and "| online s^1 | positive |" in table


def test_the_same_command_takes_up_what_is_there_and_overwrite_starts_anew(
    sweep: Sweep, tmp_path: Path
) -> None:
    sweep(tmp_path)
    kept = tmp_path / "control" / "logs" / "mine"
    kept.touch()
    sweep(tmp_path)
    assert kept.exists()
    sweep(tmp_path, "--log.every", "1")  # decides no result
    assert kept.exists() and read_config(tmp_path / "control").log.every == 1
    sweep(tmp_path, "--overwrite", "--optim.epochs", "3")
    assert not kept.exists() and read_config(tmp_path / "control").optim.epochs == 3


def test_failed_runs_are_named_after_the_table_with_the_first_ones_code(
    sweep: Sweep, failures: dict[str, Failure], tmp_path: Path
) -> None:
    failures |= {"online_s1": Failure(71, "not finite"), "control": Failure(73, "in use")}
    with pytest.raises(NonFinite, match=r"2 run\(s\) failed: online_s1: not finite; control: in u"):
        sweep(tmp_path)
    assert "Not complete: online s^1: not finite; no filter: in use." in (
        tmp_path / "sweep.md"
    ).read_text().replace("\n", " ")


@pytest.mark.parametrize("code", [2, 65, 66, 69, 70, 71, 73, 74, 75, 76, 78, 1, 139])
def test_a_failures_code_is_passed_on_if_it_is_one_of_ours(code: int) -> None:
    with pytest.raises(UserError) as caught:
        make._raise({"a": Failure(code, "so")})
    assert caught.value.code == (code if code not in (1, 139) else 70)


# ---- what it refuses -------------------------------------------------------------------------


def test_other_settings_are_refused_before_any_run_is_touched(sweep: Sweep, tmp_path: Path) -> None:
    sweep(tmp_path)
    before = (tmp_path / "online_s1" / "config.yaml").read_bytes()
    with pytest.raises(ConfigMismatch, match=r"optim.epochs 2 -> 3.*--overwrite"):
        sweep(tmp_path, "--optim.epochs", "3")
    assert (tmp_path / "online_s1" / "config.yaml").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CannotCreate, match="holds files of something else and no sweep of ours"):
        sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(CannotCreate, match=r"cannot be written \(.*\): give a folder that can"):
        sweep(tmp_path / "thesis.tex")


def test_a_run_whose_folder_cannot_be_used_is_named_and_the_others_go_on(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(tmp_path)
    (tmp_path / "online_s1" / "metrics.jsonl").unlink()
    monkeypatch.setattr(make, "GRACE", 0.01)
    path = tmp_path / "control"
    with (
        RunFolder.open(str(path), read_config(path), overwrite=False, rank=0),
        pytest.raises(CannotCreate, match=r"1 run\(s\) failed: control: .* is in use by process"),
    ):
        sweep(tmp_path)
    assert (tmp_path / "online_s1" / "metrics.jsonl").exists()
    (path / "config.yaml").write_text("{")
    with pytest.raises(DataError, match=r"1 run\(s\) failed: control: .*config.yaml"):
        sweep(tmp_path)


def test_torchrun_and_a_missing_matplotlib_are_told_before_any_run(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UsageError, match="leave torchrun out"):
            sweep(tmp_path / "sweep", "--optim.global-batch", "336")
    monkeypatch.setattr(style.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Unavailable, match=r"rdm sweep draws with matplotlib"):
        sweep(tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_runs_use_the_gpus_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert visible_gpus("auto") == ["5", "7"] and visible_gpus("cpu") == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus("cuda") == ["0", "1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_gpus("auto") == []


# ---- for real --------------------------------------------------------------------------------


def test_a_killed_sweep_goes_on_and_ends_with_the_bits_of_an_undisturbed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the sweep alone: the run it had started saves, stops, and lets go."""
    out = tmp_path / "sweep"
    line = words(out, "--filter", "online_s1", "--optim.epochs", "5", "--log.every", "1")
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "sweep", *line], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics, deadline = out / "online_s1" / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (metrics.exists() and b'"step": 3' in metrics.read_bytes()):
        assert started.poll() is None and time.monotonic() < deadline
    (orphan,) = children(started.pid)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    while alive(orphan):
        assert time.monotonic() < deadline
    assert read_status(out / "online_s1")["state"] == "interrupted"

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", *line])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    log = (out / "online_s1" / "logs" / "sweep.log").read_text()
    assert "resumed from step" in log
    assert "| online s^1 | positive |" in printed.out

    config = cli.COMMANDS["sweep"].parse(line).runs["online_s1"]
    run(tmp_path / "undisturbed", config)
    assert final_bytes(out / "online_s1") == final_bytes(tmp_path / "undisturbed")


def test_a_process_whose_sweep_is_gone_before_it_starts_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(LAUNCHED, str(os.getpid()))  # our own id is not our parent's
    monkeypatch.setattr(cli, "_end_with_launcher", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *words(tmp_path / "run", "--filter")[:-3]])
    assert ended.value.code == 75 and not (tmp_path / "run").exists()
