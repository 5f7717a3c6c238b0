"""`--nproc N`: this process starts N ranks on this machine, and ends with their exit code.

torch's elastic agent does the work, as in torchrun, which turns every exit code into 1. Ranks meet
through files in a private folder and talk over the loopback interface, so nothing listens for
other machines. SIGINT, SIGTERM and SIGUSR1 are passed on, and ranks are given time to save.
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
"""Seconds that ranks have to end after a signal, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says."""


def ranks_on(nproc: str) -> int:
    """How many ranks `--nproc` asks for: a number, one a GPU, or (auto) that and one without any.

    Raises:
        Unavailable: nproc=gpu, and there is none.
    """
    if nproc not in ("gpu", "auto"):
        return int(nproc)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if nproc == "gpu" and count == 0:
        raise Unavailable("--nproc gpu finds no GPU here: give a number of ranks, or --nproc auto")
    return max(count, 1)


def launch(command: Sequence[str], ranks: int, *, quiet: bool = True) -> tuple[int, str]:
    """Run a Python command as several ranks, until all have ended or one has failed.

    Args:
        command: what follows `python`, such as `["-m", "rdm_fast", "train"]`.
        ranks: number of processes; torchrun's variables tell each which one it is.
        quiet: leave out what torch's agent says of a failure; the ranks tell it themselves.

    Returns:
        The exit code, 0 if all ranks had 0, 128 + n after signal n; and "", or in a sentence
        which rank was lost without having told why (the code is then RankLost's).
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
    """What ended the ranks; -n is signal n. The agent ends by SIGTERM those that outlive another.

    Such a rank may find that it lost the other, or save and say that it was interrupted: neither
    is the reason, if there is one.
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
        "ran out): run the same command again to go on from the last checkpoint"
    )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _settings(folder: str, quiet: bool) -> Iterator[None]:
    """The environment that ranks inherit; what was there before comes back.

    The agent's handlers stay behind it, and would turn a later signal into an exception.
    """
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    code = [str(Path(__file__).parents[2]), str(Path(str(rdm_kernels.__file__)).parents[1])]
    given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    os.environ["PYTHONPATH"] = os.pathsep.join([*code, *given])  # ranks run this very code
    os.environ[STORE] = folder
    # the agent's own store would be a port open to all, and remembers what has ended
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
