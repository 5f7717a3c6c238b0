"""rdm_fast.tools.sweep.make: what a sweep writes, what it refuses, and what a kill -9 costs."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rdm_fast.cli import commands as cli
from rdm_fast.errors import (
    CannotCreate,
    ConfigMismatch,
    DataError,
    NonFinite,
    Unavailable,
    UserError,
)
from rdm_fast.run.folder import RunFolder, read_config, read_status
from rdm_fast.runtime.launcher import OF_A_RANK, PARENT
from rdm_fast.tools.report import style
from rdm_fast.tools.sweep import make, queue
from rdm_fast.tools.sweep.make import make_sweep, visible_gpus
from rdm_fast.tools.sweep.queue import Failure
from tests.forks import PATIENCE, call, start
from tests.processes import alive, children, final_bytes
from tests.runs import rdm, run
from tests.tiny import command
from tests.tools.report.made import make_run

Sweep = Callable[..., None]


def arguments(out: Path, *more: str) -> list[str]:
    """The tiny run with two filters."""
    filters = [] if "--filter" in more else ["--filter", "online_s1", "control"]
    return [*command(), "--device", "cpu", "--out", str(out), *filters, *more]


@pytest.fixture
def failures() -> dict[str, Failure]:
    """Runs that fail in `sweep`; a test may add some."""
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
    for name in OF_A_RANK:
        monkeypatch.delenv(name, raising=False)
    return lambda out, *more: make_sweep(cli.COMMANDS["sweep"].parse(arguments(out, *more)))


def refused(kind: type[UserError], sweep: Sweep, *args: Any) -> str:
    with pytest.raises(kind) as caught:
        sweep(*args)
    return str(caught.value)


# ---- what it writes --------------------------------------------------------------------------


def test_files_of_a_sweep(sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    sweep(out)
    names = {path.name for path in out.iterdir()}
    figures = {"sweep.png", "branches.png"}
    assert names == {"online_s1", "control", "sweep.json", "sweep.md", *figures}
    assert read_config(out / "control").filter.sigma == 0
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["online_s1", "control"]
    table = (out / "sweep.md").read_text()
    assert table in capsys.readouterr().out and "| online s^1 | positive |" in table


def test_a_sweep_over_methods_names_them(sweep: Sweep, tmp_path: Path) -> None:
    words = ["digits_methods", "--methods", "dino", "control", "--out", str(tmp_path)]
    make_sweep(cli.COMMANDS["sweep"].parse([*words, "--device", "cpu"]))
    table = (tmp_path / "sweep.md").read_text().splitlines()
    assert table[0].startswith("| method |")
    assert [line.split(" | ")[:2] for line in table[2:4]] == [
        ["| DINO", "positive"],
        ["| no predictor", "zero"],
    ]
    assert read_config(tmp_path / "dino").method == "dino"


def test_the_same_command_continues_and_overwrite_restarts(sweep: Sweep, tmp_path: Path) -> None:
    sweep(tmp_path)
    kept = tmp_path / "control" / "logs" / "mine"
    kept.touch()
    sweep(tmp_path)
    sweep(tmp_path, "--log.every", "1")  # decides no result
    assert kept.exists() and read_config(tmp_path / "control").log.every == 1
    sweep(tmp_path, "--overwrite", "--optim.epochs", "3")
    assert not kept.exists() and read_config(tmp_path / "control").optim.epochs == 3


def test_failed_runs_are_listed(sweep: Sweep, failures: dict[str, Failure], tmp_path: Path) -> None:
    failures |= {"online_s1": Failure(71, "not finite"), "control": Failure(73, "in use")}
    assert "online_s1: not finite; control: in use" in refused(NonFinite, sweep, tmp_path)
    table = (tmp_path / "sweep.md").read_text()
    assert "online s^1: not finite; no filter: in use" in table.replace("\n", " ")


@pytest.mark.parametrize("code", [2, 65, 66, 69, 70, 71, 73, 74, 75, 76, 78, 1, 139])
def test_a_failures_code_is_passed_on_if_it_is_one_of_rdm_fast(code: int) -> None:
    with pytest.raises(UserError) as caught:
        make._raise({"a": Failure(code, "so")})
    assert caught.value.code == (code if code not in (1, 139) else 70)


# ---- what it refuses -------------------------------------------------------------------------


def test_other_settings_are_refused_before_any_run_is_touched(sweep: Sweep, tmp_path: Path) -> None:
    sweep(tmp_path)
    before = (tmp_path / "online_s1" / "config.yaml").read_bytes()
    text = refused(ConfigMismatch, sweep, tmp_path, "--optim.epochs", "3")
    assert "optim.epochs 2 -> 3" in text and "--overwrite" in text
    assert (tmp_path / "online_s1" / "config.yaml").read_bytes() == before


def test_a_folder_or_file_of_something_else_is_left_alone(sweep: Sweep, tmp_path: Path) -> None:
    mine = tmp_path / "thesis.tex"
    mine.touch()
    for out in (tmp_path, mine):
        assert f"--out {out}" in refused(CannotCreate, sweep, out)
    assert [*tmp_path.iterdir()] == [mine]


def test_an_unusable_run(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(tmp_path)
    (tmp_path / "online_s1" / "metrics.jsonl").unlink()
    monkeypatch.setattr(make, "GRACE", 0.01)
    path = tmp_path / "control"
    with RunFolder.open(str(path), read_config(path), overwrite=False, rank=0):
        assert "control: " in refused(CannotCreate, sweep, tmp_path)
    assert (tmp_path / "online_s1" / "metrics.jsonl").exists()
    (path / "config.yaml").write_text("{")
    assert "config.yaml" in refused(DataError, sweep, tmp_path)


def test_matplotlib_required(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style.importlib.util, "find_spec", lambda _: None)
    assert "matplotlib" in refused(Unavailable, sweep, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_runs_use_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert visible_gpus("auto") == ["5", "7"] and visible_gpus("cpu") == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus("cuda") == ["0", "1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_gpus("auto") == []


# ---- real processes --------------------------------------------------------------------------


def forked(argv: list[str], env: dict[str, str], stdout: Any, **_: Any) -> Any:
    """In place of Popen: the same command from the fork server, which is not its launcher."""
    env = {name: value for name, value in env.items() if name != PARENT}
    return start("rdm", *argv[3:], out=Path(stdout.name), env=env)


def test_a_killed_sweep_continues_and_ends_with_the_bits_of_an_undisturbed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the sweep alone: the run that it had started saves, stops, and unlocks."""
    out = tmp_path / "sweep"
    args = arguments(out, "--filter", "online_s1", "--optim.epochs", "5", "--log.every", "1")
    started = start("rdm", "sweep", *args, out=tmp_path / "log")
    metrics, deadline = out / "online_s1" / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (metrics.exists() and b'"step": 3' in metrics.read_bytes()):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    (orphan,) = children(started.pid)
    started.kill()
    while alive(orphan):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert read_status(out / "online_s1")["state"] == "interrupted"

    for name in OF_A_RANK:
        monkeypatch.delenv(name, raising=False)
    popen = SimpleNamespace(Popen=forked, DEVNULL=None, STDOUT=None)
    monkeypatch.setattr(queue, "subprocess", popen)
    assert rdm("sweep", *args) == 0
    printed = capsys.readouterr()
    assert "resumed from step" in (out / "online_s1" / "logs" / "sweep.log").read_text()
    assert "| online s^1 | positive |" in printed.out

    run(tmp_path / "undisturbed", cli.COMMANDS["sweep"].parse(args).runs["online_s1"])
    assert final_bytes(out / "online_s1") == final_bytes(tmp_path / "undisturbed")


def test_a_process_without_its_sweep_ends(tmp_path: Path) -> None:
    """The id is not that of its parent."""
    words = [*command(), "--out", str(tmp_path / "run")]
    done = call("rdm", "train", *words, cwd=tmp_path, **{PARENT: str(os.getpid())})
    assert done.returncode == 75 and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
