"""launch and --nproc: ranks that end in every way, and the code that comes of it."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from rdm_fast.cli import commands as cli
from rdm_fast.config import Config
from rdm_fast.errors import RankLost, Unavailable, UserError
from rdm_fast.run.folder import RunFolder, read_status
from rdm_fast.runtime import launch
from rdm_fast.runtime.launcher import OF_A_RANK, PARENT, STORE
from rdm_fast.training import session
from tests.processes import alive

RANK = """
import os, signal, sys, time
rank = int(os.environ['RANK'])
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
"""


@pytest.fixture(autouse=True)
def _no_rank_and_no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "FAILING", 0.3)
    for name in OF_A_RANK:
        monkeypatch.delenv(name, raising=False)


def run(program: str, **settings: int) -> tuple[int, str]:
    """Two ranks of a program that needs no torch: the code, and the error that no rank printed."""
    code, error = launch.launch(["-c", RANK + program], 2, **settings)  # type: ignore[arg-type]
    assert error is None or error.code == code
    return code, str(error or "")


# ---- how ranks end ---------------------------------------------------------------------------


def test_ranks_know_who_they_are_and_where_to_meet_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    names = ["WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", STORE, PARENT]
    program = (
        "import rdm_fast, rdm_kernels\n"
        f"values = [os.environ[name] for name in {names}]\n"
        f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join([*values, rdm_fast.__file__]))"
    )
    assert run(program) == (0, "")
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert [words[:3] for words in found] == [["2", "0", "1"], ["2", "1", "1"]]
    assert found[0][3] == found[1][3] and not Path(found[0][3]).exists()
    assert found[0][4] == found[1][4] == str(os.getpid())
    assert {words[5] for words in found} == {sys.modules["rdm_fast"].__file__}
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_exit_code_of_the_rank_that_failed_comes_through() -> None:
    assert run("if rank == 1: sys.exit(71)\ntime.sleep(60)") == (71, "")


def test_a_killed_rank_is_a_lost_rank() -> None:
    code, lost = run("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert code == 76
    assert lost.startswith("rank 1 was ended by SIGKILL") and "run the same command again" in lost


def test_a_signal_is_passed_on_and_ranks_have_time_to_save(tmp_path: Path) -> None:
    """Even one that comes before a rank can handle it."""
    program = (
        "def save(number, frame):\n"
        "    time.sleep(0.5)\n"
        f"    open(f'{tmp_path}/{{rank}}-saved', 'w').write(str(number))\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
        "time.sleep(60)"
    )
    command = ["-c", RANK.replace("UNBLOCK", "BLOCK") + program]
    with pytest.MonkeyPatch.context() as patched:
        before = launch._Ranks.start
        patched.setattr(
            launch._Ranks, "start",
            lambda self, *args: (before(self, *args), os.kill(os.getpid(), signal.SIGUSR1)),
        )  # fmt: skip
        assert launch.launch(command, 2) == (75, None)
    saved = {(tmp_path / f"{rank}-saved").read_text() for rank in range(2)}
    assert saved == {str(int(signal.SIGTERM))}


def test_a_rank_that_hangs_is_ended_even_if_it_is_suspended() -> None:
    """Another rank has lost it; a suspended process answers no signal but SIGKILL."""
    hang = "if rank == 1: sys.exit(76)\n"
    assert run(hang + "os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)")[0] == 76
    code, lost = run(hang + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)")
    assert code == 76 and lost.startswith("rank 0 hung")


def test_a_rank_that_got_a_signal_of_its_own_stops_the_others(tmp_path: Path) -> None:
    program = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"open(f'{tmp_path}/{{rank}}', 'w')\n"
        f"while not os.path.exists(f'{tmp_path}/{{1 - rank}}'): time.sleep(0.01)\n"
        "if rank == 1: sys.exit(75)\n"
        "time.sleep(60)"
    )
    assert run(program, restarts=3) == (75, "")


def test_data_workers_end_with_their_rank(tmp_path: Path) -> None:
    pid = f"open('{tmp_path}/pid', 'w').write(str(os.getpid()))"
    program = (
        f"if rank == 1 and os.fork() == 0:\n    {pid}\n    time.sleep(60)\n"
        f"while not os.path.exists('{tmp_path}/pid'): time.sleep(0.01)\n"
        "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)"
    )
    assert run(program)[0] == 76
    worker, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 30
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- restarts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "restarts", "starts", "code"),
    [
        ("os.kill(os.getpid(), 9)", 0, 1, 76),
        ("os.kill(os.getpid(), 9)", 2, 3, 76),
        ("os.kill(os.getpid(), 9) if start < 2 else None", 2, 3, 0),
        ("sys.exit(76 if start < 1 else 0)", 2, 2, 0),
        *((f"sys.exit({code})", 2, 1, code) for code in (2, 65, 66, 69, 70, 71, 73, 74, 75, 78)),
    ],
)
def test_only_a_lost_rank_starts_them_all_again(
    ending: str, restarts: int, starts: int, code: int, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    program = (
        f"start = len([n for n in os.listdir('{tmp_path}') if n[0] == str(rank)])\n"
        f"open(f'{tmp_path}/{{rank}}-{{start}}', 'w').write(os.environ['{STORE}'])\n"
        f"if rank == 1: {ending}"
    )
    assert run(program, restarts=restarts)[0] == code
    meetings = [path.read_text() for path in tmp_path.glob("1-*")]
    assert len(meetings) == starts == len(set(meetings))
    assert capfd.readouterr().err.count("warning: ") == starts - 1


@pytest.mark.parametrize(
    ("codes", "stopped", "code"),
    [
        ({0: 0, 1: 0}, True, 0),
        ({0: 65, 1: 65}, False, 65),
        ({0: 76, 1: 70}, False, 70),  # rank 0 lost rank 1, which reported its reason
        ({0: -15, 1: 71}, False, 71),
        ({0: 76, 1: -9}, False, 76),
        ({0: 75, 1: -9}, False, 76),
        ({0: 75, 1: -9}, True, 75),
        ({0: 75, 1: 76}, True, 75),  # rank 0 was not yet training, rank 1 was
        ({0: 76}, False, 76),
        ({0: 76, 1: -15}, False, 76),
        ({0: -15, 1: 76}, False, 76),
        ({0: 75, 1: 75}, False, 75),
        ({2: -11}, False, 76),
        ({0: -15, 1: -15}, True, 75),
        ({0: -15, 1: 70}, True, 70),
    ],
)
def test_the_code_is_that_of_the_rank_at_fault(
    codes: dict[int, int], stopped: bool, code: int
) -> None:
    """-SIGTERM stands for a rank that had to be killed since another had ended."""
    found, error = launch._ending(codes, stopped=stopped)
    assert found == code
    silent = not set(codes.values()) - {-9, -11, -15}
    killed = [f"rank {rank} was" for rank, value in codes.items() if value in (-9, -11)]
    if killed and not stopped:
        assert str(error).startswith(killed[0])
    else:
        assert bool(error) == (silent or codes == {0: -15, 1: 76})


# ---- what the command makes of it ------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    with RunFolder.open(str(tmp_path / "run"), Config(), overwrite=False, rank=0) as folder:
        return folder.path


def train(out: Path, ending: tuple[int, UserError | None], monkeypatch: pytest.MonkeyPatch) -> int:
    """The code of `train.py --nproc 2` when its ranks end so, which get the other words."""
    given: list[object] = []

    def started(
        command: object, ranks: int, *, restarts: int, again: object
    ) -> tuple[int, UserError | None]:
        given.extend([command, ranks, restarts, again])
        return ending

    monkeypatch.setattr(launch, "launch", started)
    with pytest.raises(SystemExit) as caught:
        words = ["--epochs", "20", "--out", str(out)]
        cli.train(["--nproc", "2", "--max-restarts=3", "--overwrite", *words])
    rank = ["-m", "rdm_fast", "train"]
    assert given == [[*rank, "--overwrite", *words], 2, 3, [*rank, *words]]
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
        ("interrupted", 75, 75),
        ("failed", 76, 76),
    ],
)
def test_a_run_ends_as_its_ranks_do(
    state: str, ending: int, code: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status(out, state)
    assert train(out, (ending, None), monkeypatch) == code
    assert read_status(out)["state"] == state


def test_the_launcher_reports_a_lost_rank_if_no_rank_has(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status(out, "running")
    assert train(out, (76, RankLost("rank 0 was ended by SIGKILL")), monkeypatch) == 76
    assert capsys.readouterr().err == "error: rank 0 was ended by SIGKILL\n"
    found = read_status(out)
    assert (found["state"], found["code"], found["step"]) == ("failed", 76, 5)
    assert found["checkpoint"] == "step-00000004"


def test_the_launcher_does_not_repeat_what_a_rank_has_reported(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status(out, "failed")
    assert train(out, (76, RankLost("rank 1 was ended by SIGKILL")), monkeypatch) == 76
    assert capsys.readouterr().err == ""


def test_evaluation_ends_as_its_ranks_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    endings = iter([(65, None), (76, RankLost("rank 1 was ended by SIGKILL"))])
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
