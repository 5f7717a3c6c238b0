"""Runs that are killed: the same command again ends with the very bytes of an undisturbed run.

RDM_KILLS sets the number of kills at each number of ranks, for a longer campaign.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rdm_fast import __main__ as entries
from rdm_fast.errors import RankLost
from rdm_fast.run.folder import read_status
from rdm_fast.training import session
from rdm_fast.training.trainer import Trainer
from tests.forks import PATIENCE, Forked
from tests.processes import Run, final_bytes
from tests.runs import metrics
from tests.tiny import command

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="finds ranks through /proc"
)

EPOCHS = {1: 4, 2: 3, 4: 5}  # of four steps
KILLS = {1: 2, 4: 2}
Start = Callable[..., Run]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the run; whatever a failed test leaves running is killed."""
    started: list[Run] = []

    def start(out: Path, world: int, launcher: str = "", flags: str = "") -> Run:
        started.append(Run(out, EPOCHS[world], world, launcher, flags))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for run in started:
        run.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    folder = tmp_path_factory.mktemp("undisturbed")

    def of(world: int) -> Path:
        path = folder / str(world)
        if not path.exists():
            Run(path, EPOCHS[world], world).finish()
        return path

    return of


def assert_same_end(out: Path, undisturbed: Path) -> None:
    assert metrics(out) == metrics(undisturbed)
    found, expected = final_bytes(out), final_bytes(undisturbed)
    assert [name for name in expected if found.get(name) != expected[name]] == []


def state_and_code(out: Path) -> tuple[str, int]:
    status = read_status(out)
    return status["state"], status["code"]


def kill_at_random(run: Run, draw: random.Random, *, saving: bool) -> str:
    """kill -9 of every process at a random moment of the run, and what it was doing then.

    Saves are short, so some moments are sought: when the next save has begun.
    """
    run.wait_for_step(draw.randrange(1, run.steps - 8))
    deadline = time.monotonic() + 10
    while saving and not half_done(run.out) and time.monotonic() < deadline:
        time.sleep(0.0002)
    time.sleep(draw.uniform(0.0, 0.004 if saving else 0.05))
    run.kill()
    assert read_status(run.out)["state"] == "running"
    return "in a save" if half_done(run.out) else "between saves"


def half_done(out: Path) -> bool:
    return any((out / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    world: int, start: Start, undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    draw = random.Random(world)
    for kill in range(int(os.environ.get("RDM_KILLS", KILLS[world]))):
        out = tmp_path / str(kill)
        run = start(out, world)
        moment = kill_at_random(run, draw, saving=kill % 2 == 1)
        print(f"{world} rank(s), kill {kill + 1}: after step {run.last_step()}, {moment}")
        start(out, world).finish()
        assert_same_end(out, undisturbed(world))
        assert not half_done(out)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "flags",
    [
        "--model.backbone timm/test_vit --model.patch-size 4",
        pytest.param(
            "--model.backbone timm/vit_tiny_patch16_224 --model.patch-size 4 --augment.size 16 "
            "--optim.global-batch 336 --model.frozen-patch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--model.backbone timm/test_efficientnet --augment.size 32", marks=pytest.mark.slow
        ),
    ],
)
def test_a_killed_run_of_a_timm_model_ends_with_the_same_bytes(
    flags: str, world: int, start: Start, tmp_path: Path
) -> None:
    start(tmp_path / "whole", world, flags=flags).finish()
    run = start(tmp_path / "killed", world, flags=flags)
    run.wait_for_step(5)
    run.kill()
    start(tmp_path / "killed", world, flags=flags).finish()
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    "world", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            "--method dino --prototypes.teacher-temp 0.07 --prototypes.teacher-temp-epochs 2.5",
            id="dino",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--method swav --prototypes.centring sinkhorn --prototypes.queue 1008 "
            "--prototypes.queue-epoch 1",
            id="swav",
        ),
    ],
)
def test_runs_of_dino_and_swav_killed_in_their_first_epochs_end_with_the_same_bytes(
    flags: str, world: int, start: Start, tmp_path: Path
) -> None:
    """While prototypes are frozen and after, while the queue fills and after it is used."""
    flags += " --predictor none --prototypes.count 20"
    start(tmp_path / "whole", world, flags=flags).finish()
    for step in (1, 4, 6) if world == 1 else (1, 3, 4, 6, 10):
        run = start(tmp_path / "killed", world, flags=flags)
        run.wait_for_step(step)
        run.kill()
    start(tmp_path / "killed", world, flags=flags).finish()
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_a_lost_rank_a_lost_launcher_and_a_signal_one_after_the_other_change_nothing(
    start: Start, undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = start(out, 2)
    run.wait_for_step(2)
    os.kill(run.ranks[1], signal.SIGKILL)
    assert run.wait() == [76, -signal.SIGKILL]
    assert state_and_code(out) == ("failed", 76)

    run = start(out, 2, "nproc")
    run.wait_for_step(5)
    run.processes[0].kill()
    run.wait_for_ranks()
    assert state_and_code(out) == ("interrupted", 75)  # the kernel tells them, more than once
    reached = read_status(out)["step"]
    assert reached >= 5

    run = start(out, 2)
    run.wait_for_step(reached + 1)  # before that, only a launcher would end the other rank
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.wait() == [75, 75]
    assert state_and_code(out) == ("interrupted", 75)
    status = read_status(out)
    assert status["step"] > reached and (out / "checkpoints" / status["checkpoint"]).is_dir()

    start(out, 2).finish()
    assert_same_end(out, undisturbed(2))


def terminated_while_leaving(words: list[str]) -> None:
    """A run that gets SIGTERM while it leaves the process group after an error."""

    def fit(_: Trainer) -> None:
        raise RankLost("rank 0 lost another rank")

    Trainer.fit = fit  # type: ignore[method-assign]
    report = session._report_rank_lost
    session._report_rank_lost = (  # type: ignore[assignment]
        lambda *args: (os.kill(os.getpid(), signal.SIGTERM), report(*args))
    )
    sys.argv = ["train.py", *words]
    entries.train()


def test_a_launcher_that_ends_a_failing_rank_does_not_keep_it_from_recording_its_error(
    tmp_path: Path,
) -> None:
    words = command(f"--out {tmp_path / 'run'}")
    process = Forked(terminated_while_leaving, words, out=tmp_path / "log")
    assert process.wait() == 76, (tmp_path / "log").read_text()
    assert state_and_code(tmp_path / "run") == ("failed", 76)


def test_ranks_that_are_still_starting_end_with_their_launcher(
    start: Start, tmp_path: Path
) -> None:
    run = start(tmp_path / "run", 2, "torchrun")
    deadline = time.monotonic() + PATIENCE
    while len(run.ranks) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1.0)  # they are importing torch
    run.processes[0].kill()
    run.wait_for_ranks()
