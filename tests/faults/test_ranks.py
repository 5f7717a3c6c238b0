"""A rank that dies or hangs ends the others with 76 and its name, or they all start again exactly.

RDM_FAULT_KILLS is the number of kills of the campaign; RDM_FAULT_SEED draws them.
"""

import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rdm_fast.cli import commands as cli
from rdm_fast.errors import RankLost
from rdm_fast.run.folder import read_status
from rdm_fast.runtime import distributed, launch
from rdm_fast.runtime.launcher import PARENT, STORE
from tests.forks import PATIENCE, Forked, environment, start
from tests.processes import FLAGS, Run, alive, final_bytes
from tests.ranks import run_ranks
from tests.runs import metrics
from tests.tiny import command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="suspends and finds processes")

EPOCHS = 4  # of four steps: a signal at the fifth may come late on a busy machine


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    folder = tmp_path_factory.mktemp("undisturbed")

    def of(world: int) -> Path:
        if not (folder / str(world)).exists():
            Run(folder / str(world), EPOCHS, world).finish()
        return folder / str(world)

    return of


def assert_same_end(out: Path, undisturbed: Path) -> None:
    assert read_status(out)["state"] == "finished"
    assert metrics(out) == metrics(undisturbed)
    found, expected = final_bytes(out), final_bytes(undisturbed)
    assert [name for name in expected if found.get(name) != expected[name]] == []


# ---- under --nproc, whose ranks are forked ---------------------------------------------------


class Launcher:
    """`train.py --nproc` in this process, while a function of another thread disturbs its ranks."""

    def __init__(self, out: Path, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.world, self.log = out, world, out.with_name("log")
        self.ranks: list[Forked] = []
        monkeypatch.setattr(launch.subprocess, "Popen", self._fork)

    def _fork(self, words: list[str], env: dict[str, str], process_group: int) -> Forked:
        """In place of Popen: from the fork server, which is not the launcher."""
        assert words[3:6] == ["-m", "rdm_fast", "train"] and process_group == 0
        env = {name: value for name, value in env.items() if name != PARENT}
        self.ranks.append(start("rdm", *words[5:], out=self.log, env=environment() | env))
        return self.ranks[-1]

    def run(self, disturb: Callable[["Launcher"], object], *flags: str) -> int:
        """The exit code."""
        words = command(f"--optim.epochs {EPOCHS} --out {self.out} {FLAGS}")
        thread = threading.Thread(target=disturb, args=[self])
        thread.start()
        try:
            with pytest.raises(SystemExit) as ended:
                cli.train([*words, "--nproc", str(self.world), *flags])
        finally:
            thread.join()
            for process in self.ranks:
                process.kill()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    def signal_at(self, step: int, rank: int, number: int) -> None:
        """Send a signal to a rank of the present start, once this step is logged."""
        deadline, before = time.monotonic() + PATIENCE, len(self.ranks)
        while self._last_step() < step or len(self.ranks) < max(before, self.world):
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
        self.ranks[len(self.ranks) - self.world + rank].send_signal(number)

    def _last_step(self) -> int:
        lines = metrics(self.out) if (self.out / "metrics.jsonl").exists() else []
        return max((int(line.get("step", 0)) for line in lines), default=0)


def test_a_suspended_rank_is_lost_by_name_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = Launcher(tmp_path / "run", 2, monkeypatch)
    code = launcher.run(lambda it: it.signal_at(3, 1, signal.SIGSTOP), "--parallel.timeout", "3")
    text = launcher.log.read_text()
    assert code == 76, text
    assert not alive(launcher.ranks[1].pid)
    status = read_status(tmp_path / "run")
    assert (status["state"], status["code"]) == ("failed", 76)
    assert "rank 0 lost rank 1 in " in status["message"] and "all_" in status["message"]
    assert text.count("error:") == 1 and "--parallel.timeout" in text
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_starts_all_again_and_the_end_is_that_of_an_undisturbed_run(
    number: int, undisturbed: Callable[[int], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    launcher = Launcher(tmp_path / "run", 2, monkeypatch)
    code = launcher.run(
        lambda it: it.signal_at(5, 0, number), "--max-restarts", "1", "--overwrite",
        "--parallel.timeout", "5",
    )  # fmt: skip
    assert code == 0, launcher.log.read_text()
    assert len(launcher.ranks) == 4
    assert re.search("resumed from step ([4-9]|1[0-4])$", launcher.log.read_text(), re.MULTILINE)
    assert_same_end(tmp_path / "run", undisturbed(2))


@pytest.mark.slow
def test_random_kills_of_random_ranks(
    undisturbed: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to three in one run of four ranks."""
    seed = int(os.environ.get("RDM_FAULT_SEED", "0"))
    draw, count = random.Random(seed), int(os.environ.get("RDM_FAULT_KILLS", "2"))
    kills = runs = 0
    while kills < count:
        times, runs = min(draw.randrange(1, 4), count - kills), runs + 1
        kills += times
        steps = sorted(draw.sample(range(1, 4 * EPOCHS - 1), times))

        def kill(it: Launcher, steps: list[int] = steps) -> None:
            for number, step in enumerate(steps, start=1):
                while len(it.ranks) < number * it.world:
                    time.sleep(0.01)
                it.signal_at(step, draw.randrange(it.world), signal.SIGKILL)

        launcher = Launcher(tmp_path / f"{runs}" / "run", 4, monkeypatch)
        launcher.out.parent.mkdir()
        code = launcher.run(kill, "--max-restarts", "3")
        assert code == 0, launcher.log.read_text()
        assert len(launcher.ranks) == 4 * (1 + times)
        assert_same_end(launcher.out, undisturbed(4))
        print(f"seed {seed}: killed at steps {steps}, {kills} kills in {runs} runs")


# ---- the real launcher -----------------------------------------------------------------------


@pytest.mark.slow
def test_four_real_ranks_lose_one_then_their_launcher_and_go_on(
    undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = Run(out, EPOCHS, 4, "nproc")
    try:
        run.wait_for_step(3)
        os.kill(run.ranks[2], signal.SIGKILL)
        assert run.wait() == [76]
        assert read_status(out)["code"] == 76
        run.kill()
        run = Run(out, EPOCHS, 4, "nproc")
        run.wait_for_step(6)
        run.processes[0].kill()
        run.wait_for_ranks()
        assert read_status(out)["code"] == 75
    finally:
        run.kill()
    Run(out, EPOCHS, 4, "nproc").finish()
    assert_same_end(out, undisturbed(4))


# ---- which errors are those of a lost rank ---------------------------------------------------


def test_a_rank_that_never_comes_is_lost(tmp_path: Path) -> None:
    words = command(f"--out {tmp_path / 'run'} --parallel.timeout 2")
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", STORE: str(tmp_path / "store")}
    process = start("train.py", *words, out=tmp_path / "log", env=environment() | variables)
    assert process.wait() == 76, (tmp_path / "log").read_text()
    assert read_status(tmp_path / "run")["code"] == 76


def test_evaluation_loses_a_rank_that_never_comes(tmp_path: Path) -> None:
    Run(tmp_path / "run", 1).finish()
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", STORE: str(tmp_path / "store")}
    process = start("rdm", "eval", tmp_path / "run", "--timeout", "2", out=tmp_path / "log",
                    env=environment() | variables)  # fmt: skip
    assert process.wait() == 76
    assert (tmp_path / "log").read_text().count("error:") == 1


def _loses(collective: str, folder: Path) -> str:
    """What rank 0 says of rank 1, which does not take part."""
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    store = dist.FileStore(str(folder / collective), 2)
    wait = timedelta(seconds=2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    said = folder / f"{collective}-said"
    if rank == 1:
        while not said.exists():
            time.sleep(0.01)
        return ""
    try:
        with distributed.raise_rank_lost():
            if collective == "all_gather_into_tensor":
                dist.all_gather_into_tensor(torch.zeros(2), torch.zeros(1))
            elif collective == "all_reduce":
                dist.all_reduce(torch.zeros(1))
            else:
                model(torch.ones(1, 2)).sum().backward()
    except RankLost as error:
        return str(error)
    finally:
        said.touch()
    return "nothing"


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather_into_tensor", "gradients"])
def test_a_lost_rank_is_named_with_the_collective(collective: str, tmp_path: Path) -> None:
    said, _ = run_ranks(2, _loses, collective, tmp_path, tmp_path=tmp_path)
    assert "lost rank 1 in " in said and collective in said


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL communicator was aborted on rank 1."),
        dist.DistNetworkError("The client socket has timed out"),
        dist.DistStoreError("wait timeout after 3000ms"),
    ],
)
def test_torchs_own_classes_are_known_by_type(error: RuntimeError) -> None:
    with pytest.raises(RankLost), distributed.raise_rank_lost():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("gloo"), ValueError("nccl timed out")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    """The words alone make no collective."""
    with pytest.raises(type(error)) as caught, distributed.raise_rank_lost():
        raise error
    assert caught.value is error
