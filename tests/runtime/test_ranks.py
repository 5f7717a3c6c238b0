"""tests.ranks: the helper that every test on several ranks stands on."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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
    time.sleep(60)


def test_ranks_reduce_together_and_return_in_order(tmp_path: Path) -> None:
    for _ in range(2):  # twice in one folder: nothing is left that would confuse the second
        results = run_ranks(2, _sum_of_ranks, torch.tensor(10.0), tmp_path=tmp_path)
        assert results == [{"rank": rank, "total": torch.tensor(21.0)} for rank in range(2)]


def test_an_error_of_one_rank_is_raised_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessRaisedException, match="rank one has had enough"):
        run_ranks(2, _rank_one_fails, tmp_path=tmp_path)


def test_a_rank_that_dies_of_a_signal_is_told_with_its_stack(tmp_path: Path) -> None:
    with pytest.raises(RankDied, match=r"(?s)process 1 .*SIGABRT.* in _rank_one_is_killed"):
        run_ranks(2, _rank_one_is_killed, tmp_path=tmp_path)


def test_ranks_that_hang_are_stopped(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="_sleep on 1 ranks took over 5 s"):
        run_ranks(1, _sleep, tmp_path=tmp_path, timeout=5)
