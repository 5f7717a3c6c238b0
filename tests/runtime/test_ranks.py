"""tests.ranks and tests.forks: the helpers under every test that needs several processes."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.forks import PRELOADED, Forked, call
from tests.ranks import RankDied, run_ranks


def _sum_of_ranks(offset: torch.Tensor) -> dict[str, object]:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "total": total}


def _rank_one_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one has had enough")
    dist.barrier()


def _rank_one_is_killed() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGABRT)
    dist.barrier()


def _sleep() -> None:
    print("asleep", flush=True)
    time.sleep(60)


def _loaded_modules_and_threads() -> list[bool]:
    return [all(name in sys.modules for name in PRELOADED), torch.get_num_threads() == 1]


def test_ranks_reduce_together_and_return_in_order(tmp_path: Path) -> None:
    for _ in range(2):  # twice in one folder: the first leaves nothing that confuses the second
        results = run_ranks(2, _sum_of_ranks, torch.tensor(10.0), tmp_path=tmp_path)
        assert results == [{"rank": rank, "total": torch.tensor(21.0)} for rank in range(2)]


def test_ranks_start_with_everything_imported_and_one_thread(tmp_path: Path) -> None:
    assert run_ranks(1, _loaded_modules_and_threads, tmp_path=tmp_path) == [[True, True]]


def test_an_error_of_one_rank_is_raised_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessRaisedException) as raised:
        run_ranks(2, _rank_one_fails, tmp_path=tmp_path)
    assert "rank one has had enough" in str(raised.value)


def test_a_rank_that_dies_of_a_signal_raises_rank_died_with_its_stack(tmp_path: Path) -> None:
    with pytest.raises(RankDied) as raised:
        run_ranks(2, _rank_one_is_killed, tmp_path=tmp_path)
    for part in ("process 1 ", "SIGABRT", " in _rank_one_is_killed"):
        assert part in str(raised.value)


def test_ranks_that_hang_are_stopped(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        run_ranks(1, _sleep, tmp_path=tmp_path, timeout=0.5)


def test_a_called_command_has_its_own_folder_output_and_exit_code(tmp_path: Path) -> None:
    done = call("train.py", "--print-config", cwd=tmp_path)
    assert done.returncode == 0 and "method: simsiam" in done.stdout and done.stderr == ""
    done = call("rdm", "eval", "nothing/here", cwd=tmp_path)
    assert done.returncode == 66 and done.stdout == "" and "nothing/here" in done.stderr


def test_a_forked_process_ends_by_the_signal_it_gets(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = Forked(_sleep, out=out)
    while not out.exists() or "asleep" not in out.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == process.returncode == -signal.SIGTERM
