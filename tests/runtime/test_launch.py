"""launch and --nproc: ranks that end in every way, and the code that comes of it."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from rdm_fast.cli import commands as cli
from rdm_fast.config import Config
from rdm_fast.errors import Unavailable
from rdm_fast.run.folder import RunFolder, read_status
from rdm_fast.runtime import launch
from rdm_fast.runtime.distributed import STORE
from rdm_fast.training import session

RANK = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def run(program: str) -> tuple[int, str]:
    """Two ranks of a program that needs no torch."""
    return launch.launch(["-c", RANK + program], 2)


# ---- how ranks end ---------------------------------------------------------------------------


def test_ranks_know_who_they_are_and_where_to_meet_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    names = ["WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", STORE]
    program = (
        "import rdm_fast, rdm_kernels\n"
        f"values = [os.environ[name] for name in {names}]\n"
        f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join([*values, rdm_fast.__file__]))"
    )
    assert run(program) == (0, "")
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert [words[:3] for words in found] == [["2", "0", "1"], ["2", "1", "1"]]
    assert found[0][3] == found[1][3] and not Path(found[0][3]).exists()
    assert {words[4] for words in found} == {sys.modules["rdm_fast"].__file__}
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_exit_code_of_the_rank_that_failed_comes_through() -> None:
    assert run("if rank == 1: sys.exit(71)\ntime.sleep(60)") == (71, "")


def test_a_killed_rank_is_a_lost_rank() -> None:
    code, lost = run("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert code == 76
    assert lost.startswith("rank 1 was ended by SIGKILL") and "run the same command again" in lost


def test_a_signal_is_passed_on_and_ranks_have_time_to_save(tmp_path: Path) -> None:
    program = (
        "def save(number, frame):\n"
        "    time.sleep(0.5)\n"
        f"    open(f'{tmp_path}/{{rank}}-saved', 'w').write(str(number))\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, save)\n"
        f"open(f'{tmp_path}/{{rank}}-up', 'w')\n"
        "time.sleep(60)"
    )

    def send() -> None:
        while not all((tmp_path / f"{rank}-up").exists() for rank in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=send)
    thread.start()
    assert run(program) == (128 + signal.SIGUSR1, "")
    thread.join()
    saved = {(tmp_path / f"{rank}-saved").read_text() for rank in range(2)}
    assert saved == {str(int(signal.SIGUSR1))}


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({0: 65, 1: 65}, 65),
        ({0: 76, 1: 70}, 70),  # rank 0 lost rank 1, which reported its reason
        ({0: 75, 1: 70}, 70),  # rank 0 was ended by the agent, and saved
        ({0: -15, 1: 71}, 71),
        ({0: 76, 1: -9}, 76),
        ({0: 75, 1: -9}, 76),
        ({0: 76}, 76),
        ({0: 76, 1: -15}, 76),
        ({0: 75, 1: 75}, 75),
        ({0: 75, 1: -15}, 75),
        ({2: -11}, 76),
        ({0: -15, 1: -15}, 76),
    ],
)
def test_the_code_is_that_of_the_rank_at_fault(codes: dict[int, int], code: int) -> None:
    found, lost = launch._ending(codes)
    assert found == code
    killed = [f"rank {rank} was" for rank, value in codes.items() if value not in (-15, *range(99))]
    assert lost.startswith(killed[0]) if killed else bool(lost) == (set(codes.values()) == {-15})


# ---- what the command makes of it ------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    with RunFolder.open(str(tmp_path / "run"), Config(), overwrite=False, rank=0) as folder:
        return folder.path


def train(out: Path, ending: tuple[int, str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The code of `train.py --nproc 2` when its ranks end so, which get the other words."""
    given: list[object] = []

    def started(command: object, ranks: int, *, quiet: bool) -> tuple[int, str]:
        given.extend([command, ranks, quiet])
        return ending

    monkeypatch.setattr(launch, "launch", started)
    with pytest.raises(SystemExit) as caught:
        cli.train(["--nproc", "2", "--epochs", "20", "--out", str(out)])
    words = ["--epochs", "20", "--out", str(out)]
    assert given == [["-m", "rdm_fast", "train", *words], 2, True]
    assert isinstance(caught.value.code, int)
    return caught.value.code


def status(out: Path, state: str) -> None:
    folder = RunFolder.open(str(out), Config(), overwrite=False, rank=1)
    folder.write_status(state, step=5, checkpoint="step-00000004")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "ending", "code"),
    [
        ("finished", 0, 0),
        ("failed", 71, 71),
        ("interrupted", 128 + signal.SIGINT, 75),
        ("running", 128 + signal.SIGINT, 130),  # before anything was saved
        ("interrupted", 75, 75),
        ("failed", 76, 76),
    ],
)
def test_a_run_ends_as_its_ranks_do(
    state: str, ending: int, code: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status(out, state)
    assert train(out, (ending, ""), monkeypatch) == code
    assert read_status(out)["state"] == state


def test_the_launcher_reports_a_lost_rank_if_no_rank_has(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status(out, "running")
    assert train(out, (76, "rank 0 was ended by SIGKILL"), monkeypatch) == 76
    assert capsys.readouterr().err == "error: rank 0 was ended by SIGKILL\n"
    found = read_status(out)
    assert (found["state"], found["code"], found["step"]) == ("failed", 76, 5)
    assert found["checkpoint"] == "step-00000004"


def test_the_launcher_does_not_repeat_what_a_rank_has_reported(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status(out, "failed")
    assert train(out, (76, "rank 1 was ended by SIGKILL"), monkeypatch) == 76
    assert capsys.readouterr().err == ""


def test_evaluation_ends_as_its_ranks_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    endings = iter([(65, ""), (76, "rank 1 was ended by SIGKILL")])
    monkeypatch.setattr(launch, "launch", lambda *_, **__: next(endings))
    for code in (65, 76):
        with pytest.raises(SystemExit) as caught:
            cli.evaluate(["--nproc=2", "runs/a"])
        assert caught.value.code == code
    assert capsys.readouterr().err == "error: rank 1 was ended by SIGKILL\n"


# ---- how many --------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "auto"), [(0, 1), (1, 1), (8, 8)])
def test_auto_is_a_rank_for_each_gpu_and_one_without(
    gpus: int, auto: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert launch.ranks_on("auto") == auto
    assert launch.ranks_on("3") == 3
    if gpus:
        assert launch.ranks_on("gpu") == gpus
    else:
        with pytest.raises(Unavailable):
            launch.ranks_on("gpu")


def test_auto_says_what_it_is_and_one_rank_needs_no_launcher(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(launch, "launch", None)
    monkeypatch.setattr(session, "_train_in", lambda *_, **__: None)
    with pytest.raises(SystemExit) as caught:
        cli.train(["--nproc", "auto", "--out", str(out.with_name("other"))])
    assert caught.value.code == 0
    assert capsys.readouterr().out == "--nproc auto: 1 rank(s)\n"
