"""rdm_fast.tools.sweep.queue, with a program in place of `rdm` that takes no time.

The program follows the `plan` in its run folder: it completes the run, fails, is killed, or waits
for a signal. It notes every start and end on the `board`.
"""

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rdm_fast.errors import Interrupted
from rdm_fast.tools.sweep import queue
from rdm_fast.tools.sweep.queue import Failure, next_command, run_all
from tests.tools.report.made import evaluate, make_run

PROGRAM = """
import json, os, pathlib, signal, sys, time
command, run = sys.argv[1], pathlib.Path([arg for arg in sys.argv[2:] if "/" in arg][0])
board = run.parent / "board"
with board.open("a") as file:
    seen = [os.environ.get(k, "") for k in ("RDM_LAUNCHED", "OMP_NUM_THREADS", "RANK")]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
    print("start", run.name, command, *seen, gpu, file=file, sep="|", flush=True)
plan = (run / "plan").read_text() if (run / "plan").exists() else "complete"
if plan == "fail":
    print("noise")
    print("error: the loss is not finite", file=sys.stderr)
    sys.exit(71)
if plan == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if plan == "wait":
    def stop(*_):
        board.open("a").write(f"stopped|{run.name}\\n")
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    board.open("a").write(f"waiting|{run.name}\\n")
    while True:
        time.sleep(0.01)
if plan != "nothing":
    if command == "train":
        status = json.loads((run / "status.json").read_text())
        status |= {"state": "finished", "checkpoint": "step-00000008"}
        (run / "status.json").write_text(json.dumps(status))
    else:
        (run / "evaluation").mkdir()
        (run / "evaluation" / "step-00000008-logistic.json").write_text("{}")
with board.open("a") as file:
    print("end", run.name, command, file=file, sep="|")
"""


@pytest.fixture(autouse=True)
def _program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "PROGRAM", PROGRAM)
    monkeypatch.setattr(queue, "POLL", 0.005)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def runs(tmp_path: Path, **plans: str) -> dict[str, Path]:
    """A new run folder for each name, with the plan given."""
    paths = {name: make_run(tmp_path / name, state="running") for name in plans}
    for name, plan in plans.items():
        (paths[name] / "plan").write_text(plan)
    return paths


def complete(paths: dict[str, Path], jobs: int = 1, gpus: Sequence[str] = ()) -> dict[str, Failure]:
    return run_all(paths, jobs=jobs, device="cpu", gpus=gpus, threads=3)


def board(tmp_path: Path) -> list[list[str]]:
    """The programs' notes, in order."""
    file = tmp_path / "board"
    return [text.split("|") for text in file.read_text().splitlines()] if file.exists() else []


def started(tmp_path: Path) -> list[list[str]]:
    """Run, command and environment of every start."""
    return [note[1:] for note in board(tmp_path) if note[0] == "start"]


def test_a_run_is_trained_then_evaluated_by_the_commands_of_a_user(tmp_path: Path) -> None:
    paths = runs(tmp_path, a="complete", b="complete")
    assert next_command(paths["a"], "cpu") == ["train", "--resume", str(paths["a"])]
    assert complete(paths) == {}
    assert next_command(paths["a"], "cpu") is None
    seen = [str(os.getpid()), "3", "", os.environ.get("CUDA_VISIBLE_DEVICES", "none")]
    assert started(tmp_path) == [[run, do, *seen] for run in "ab" for do in ("train", "eval")]


def test_only_missing_commands_are_started(tmp_path: Path) -> None:
    paths = runs(tmp_path, a="complete")
    paths["b"] = make_run(tmp_path / "b", checkpoint="step-00000008")
    paths["c"] = make_run(tmp_path / "c", checkpoint="step-00000008")
    evaluate(paths["c"])
    assert next_command(paths["b"], "cuda") == ["eval", str(paths["b"]), "--device", "cuda"]
    assert complete(paths) == {}
    starts = [start[:2] for start in started(tmp_path)]
    assert starts == [["a", "train"], ["a", "eval"], ["b", "eval"]]
    (tmp_path / "board").unlink()
    assert complete(paths) == {} and board(tmp_path) == []


def test_a_failed_run_is_named_with_its_reason_and_the_others_continue(tmp_path: Path) -> None:
    paths = runs(tmp_path, a="fail", b="die", c="nothing", d="complete")
    failed = complete(paths)
    assert failed["a"] == Failure(71, "the loss is not finite")
    assert failed["b"].code == 76 and "SIGKILL" in failed["b"].sentence
    assert failed["c"].code == 70
    assert {*failed} == {"a", "b", "c"} and next_command(paths["d"], "cpu") is None


def test_runs_at_a_time_are_limited_and_each_has_its_own_gpu(tmp_path: Path) -> None:
    paths = runs(tmp_path, **dict.fromkeys("abcdef", "complete"))
    assert complete(paths, jobs=2, gpus=("4", "7")) == {}
    busy: dict[str, str] = {}
    most = 0
    for kind, name, command, *seen in board(tmp_path):
        if kind == "start":
            assert seen[-1] not in busy.values() or name in busy
            busy[name] = seen[-1]
        elif command == "eval":
            del busy[name]
        most = max(most, len(busy))
    assert most == 2
    assert {start[-1] for start in started(tmp_path)} == {"4", "7"}


def test_a_signal_lets_runs_under_way_save_and_starts_no_other(tmp_path: Path) -> None:
    paths = runs(tmp_path, a="wait", b="wait", c="complete")
    before = signal.getsignal(signal.SIGTERM)

    def ask_to_stop() -> None:
        while sum(note[0] == "waiting" for note in board(tmp_path)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask_to_stop)
    thread.start()
    with pytest.raises(Interrupted):
        complete(paths, jobs=2)
    thread.join()
    kinds = [note[:2] for note in board(tmp_path)]
    assert sorted(kinds[-2:]) == [["stopped", "a"], ["stopped", "b"]]
    assert ["start", "c"] not in kinds
    assert signal.getsignal(signal.SIGTERM) == before
