"""`--nproc N`: start N ranks on this machine, and exit with their code.

As in torchrun, torch's elastic agent does the work; but torchrun turns every exit code into 1.
Ranks meet through files in a private folder and talk over the loopback interface, so nothing
listens for other machines. SIGINT, SIGTERM and SIGUSR1 are passed on, and ranks have time to save.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import rdm_kernels
from rdm_fast.errors import Interrupted, RankLost, Unavailable
from rdm_fast.runtime.distributed import STORE

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CONSEQUENCES = {RankLost.code, Interrupted.code}
SAVING = "120"
"""Seconds that ranks have to end after a signal; TORCH_ELASTIC_SHUTDOWN_TIMEOUT overrides it."""


def ranks_on(nproc: str) -> int:
    """The number of ranks for `--nproc`: a number; gpu, one a GPU; auto, the same or else one.

    Raises:
        Unavailable: nproc=gpu without a GPU.
    """
    if nproc not in ("gpu", "auto"):
        return int(nproc)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if nproc == "gpu" and count == 0:
        raise Unavailable("--nproc gpu: there is no GPU; give a number of ranks, or --nproc auto")
    return max(count, 1)


def launch(command: Sequence[str], ranks: int, *, quiet: bool = True) -> tuple[int, str]:
    """Run a Python command as several ranks, until all have ended or one has failed.

    Args:
        command: the arguments of `python`, such as `["-m", "rdm_fast", "train"]`.
        ranks: number of processes; torchrun's variables number them.
        quiet: suppress the messages of torch's agent about a failure; ranks print their own.

    Returns:
        The exit code: 0 if all ranks had 0, 128 + n after signal n. And a sentence if a rank was
        killed and could not report it (the code is then RankLost's), else "".
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="rdm-ranks-") as folder, _settings(folder, quiet):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=Path(folder).name,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{folder}/rendezvous",
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=0,
            signals_to_handle=",".join(number.name for number in HANDLED),
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-u", *command)
        except ChildFailedError as error:
            return _ending({rank: f.exitcode for rank, f in sorted(error.failures.items())})
        except SignalException as error:
            return 128 + error.sigval, ""
    return 0, ""


def _ending(codes: dict[int, int]) -> tuple[int, str]:
    """The exit code and sentence for these codes by rank; -n stands for signal n.

    When a rank ends, the agent sends SIGTERM to the others. Those report a lost rank or an
    interruption, which are consequences, not the reason.
    """
    reasons = [code for code in codes.values() if code > 0 and code not in CONSEQUENCES]
    if reasons:
        return reasons[0], ""
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    by_others = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
    found = set(codes.values())
    if not by_others and found & CONSEQUENCES:
        return (RankLost.code if RankLost.code in found else Interrupted.code), ""
    rank, number = next(iter((by_others or killed).items()))
    return RankLost.code, (
        f"rank {rank} was ended by {_name(number)} from outside (SIGKILL often means that memory "
        "ran out): run the same command again to continue from the last checkpoint"
    )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _settings(folder: str, quiet: bool) -> Iterator[None]:
    """Context with the ranks' environment; restores the variables and signal handlers after it.

    The agent leaves its handlers behind, which would turn a later signal into an exception.
    """
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    code = [str(Path(__file__).parents[2]), str(Path(str(rdm_kernels.__file__)).parents[1])]
    given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    os.environ["PYTHONPATH"] = os.pathsep.join([*code, *given])  # ranks run this very code
    os.environ[STORE] = folder
    # the agent's own store would be an open port that outlives the launch
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVING)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    level = logging.root.manager.disable
    if quiet:
        logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
