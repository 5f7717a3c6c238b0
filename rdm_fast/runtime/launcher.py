"""What a launcher says in the environment: this process's rank, how many ranks, where they meet.

`launched` alone reads the variables of torchrun and srun. Nothing here takes time to import: every
command asks before it does anything else.
"""

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from rdm_fast.errors import UsageError

if TYPE_CHECKING:
    from rdm_fast.config import OptimConfig

STORE = "RDM_FAST_STORE"
"""Environment variable of `--nproc`: the file through which ranks meet, instead of at a port."""
PARENT = "RDM_LAUNCHED"
"""Environment variable: process id of a launcher of this project, with which its processes end."""
NUMBERS = {
    "RANK": (0, 10**6), "WORLD_SIZE": (1, 10**6), "LOCAL_RANK": (0, 10**6),
    "LOCAL_WORLD_SIZE": (1, 10**6), "MASTER_PORT": (1, 65535), "SLURM_PROCID": (0, 10**6),
    "SLURM_LOCALID": (0, 10**6), "SLURM_NTASKS": (1, 10**6), "SLURM_STEP_NUM_TASKS": (1, 10**6),
}  # fmt: skip
"""The bounds of each number that a launcher sets."""
OF_A_RANK = ("MASTER_ADDR", STORE, PARENT, *NUMBERS)
"""Variables that a process which is no rank must not get from a rank, or from a SLURM task."""
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
LOOPBACK = "127.0.0.1"
MOST_RANKS = 1024
"""On one machine."""


class Launched(NamedTuple):
    """The place of this process among those of its launcher; the default is no launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    """Its number on this machine; None if the launcher does not say."""
    address: str = ""
    """Where rank 0 listens, with `port`; "" if ranks meet through `store`."""
    port: int = 0
    store: str = ""
    launcher: str = ""


def launched(environment: Mapping[str, str] | None = None) -> Launched:
    """What the environment says.

    A SLURM job that runs its script or shell, without srun, is one process whatever its tasks.

    Raises:
        UsageError: a variable is missing or has an impossible value; it is named.
    """
    given = os.environ if environment is None else environment
    if "RANK" in given or "WORLD_SIZE" in given:
        return _by_torchrun(given)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        _number(given, name)
    if _is_srun_task(given):
        return _by_srun(given)
    for name in MPI:
        _require(
            given.get(name, "1") == "1",
            f"{name}={given.get(name)}: mpirun started several processes, which do not know each "
            "other here; start them with torchrun, srun or --nproc (docs/scaling.md)",
        )
    return Launched()


def ranks_here() -> int:
    """The number of ranks on this machine, if the launcher says it; else 1.

    Raises:
        UsageError: it is no number.
    """
    return _number(os.environ, "LOCAL_WORLD_SIZE") or 1


def _by_torchrun(given: Mapping[str, str]) -> Launched:
    rank, world = _number(given, "RANK"), _number(given, "WORLD_SIZE")
    local, of_local = _number(given, "LOCAL_RANK"), _number(given, "LOCAL_WORLD_SIZE")
    port = _number(given, "MASTER_PORT")
    if world == 1 and rank is None:
        return Launched()
    for name, value, other in (("RANK", rank, "WORLD_SIZE"), ("WORLD_SIZE", world, "RANK")):
        _require(
            value is not None,
            f"{name} is not set but {other}={given.get(other)} is: start with torchrun or --nproc, "
            f"or unset {other}",
        )
    assert rank is not None and world is not None
    _require_below("RANK", rank, "WORLD_SIZE", world)
    _require_below("LOCAL_RANK", local, "LOCAL_WORLD_SIZE", of_local or world)
    if of_local is not None:
        _require_below("LOCAL_WORLD_SIZE", of_local - 1, "WORLD_SIZE", world)
    store, address = given.get(STORE, ""), given.get("MASTER_ADDR", "")
    if world > 1 and not store:
        for name, here in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
            _require(
                bool(here),
                f"{name} is not set, so {world} ranks cannot meet: give the "
                + ("address of rank 0" if name == "MASTER_ADDR" else "number of a free port there"),
            )
    return Launched(rank, world, local, address, port or 0, store, "torchrun")


def _is_srun_task(given: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script has numbers too, but is no step."""
    step = "SLURM_STEP_ID" in given or "SLURM_STEP_NUM_TASKS" in given
    return "SLURM_PROCID" in given and (step or given.get("ENVIRONMENT") != "BATCH")


def _by_srun(given: Mapping[str, str]) -> Launched:
    in_step = _number(given, "SLURM_STEP_NUM_TASKS")
    tasks = in_step or _number(given, "SLURM_NTASKS") or 1
    if tasks == 1:
        return Launched()
    rank = _number(given, "SLURM_PROCID") or 0
    _require_below("SLURM_PROCID", rank, "SLURM_NTASKS", tasks)
    port = _number(given, "MASTER_PORT")
    if port is None:  # the same for all tasks of a step, and another for the next step
        job, step = (_digits(given.get(f"SLURM_{name}_ID", "")) for name in ("JOB", "STEP"))
        port = 15000 + (7 * job + step) % 10000
    address = given.get("MASTER_ADDR") or _first_host(given)
    return Launched(rank, tasks, _number(given, "SLURM_LOCALID"), address, port, "", "srun")


def _digits(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _first_host(given: Mapping[str, str]) -> str:
    """The host of rank 0: the first of the step's, written like `a,b` or `node[007-009,12]`."""
    if (given.get("SLURM_STEP_NUM_NODES") or given.get("SLURM_NNODES")) == "1":
        return LOOPBACK
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if match := re.match(r"(?:\[[^\]]*\]|[^,\[])+", given.get(name, "")):
            return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match[0])
    return given.get("SLURM_LAUNCH_NODE_IPADDR") or LOOPBACK


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _number(given: Mapping[str, str], name: str) -> int | None:
    """The number in a variable; None if it is not set."""
    if (text := given.get(name)) is None:
        return None
    low, high = NUMBERS[name]
    _require(
        text.isascii() and text.isdigit() and len(text) < 9 and low <= int(text) <= high,
        f"environment variable {name}={text} is not a number from {low} to {high}: correct or "
        "unset it",
    )
    return int(text)


def _require_below(name: str, value: int | None, bound: str, limit: int) -> None:
    _require(
        value is None or value < limit,
        f"environment variable {name}={value} does not fit {bound}={limit}: ranks are numbered "
        "from 0",
    )


def speaks() -> bool:
    """Whether this process prints why it ends: rank zero, for all; any, if ranks are unknown."""
    try:
        return launched().rank == 0
    except UsageError:
        return True


# ---- what options must agree with ------------------------------------------------------------


def check_nproc(nproc: str) -> None:
    """Validate --nproc.

    Raises:
        UsageError: it is not a number of ranks, gpu or auto; or this process is itself a rank.
    """
    _require(
        nproc in ("gpu", "auto")
        or (nproc.isascii() and nproc.isdigit() and 0 < int(nproc[:9]) <= MOST_RANKS),
        f"nproc={nproc} is not a number of ranks: give 1 to {MOST_RANKS}, gpu, or auto",
    )
    here = launched()
    _require(
        nproc == "1" or not here.launcher,
        f"nproc={nproc} starts ranks, but {here.launcher} already has: leave out --nproc, or start "
        "without the launcher",
    )


def check_ranks(optim: "OptimConfig", nproc: str) -> None:
    """Check that the global batch divides over the ranks, running or about to start.

    The number behind `gpu` and `auto` is known only once torch is imported, so they pass.

    Raises:
        UsageError: it does not divide.
    """
    if (here := launched()).launcher:
        optim.local_batch(here.world_size)
    elif nproc not in ("gpu", "auto"):
        optim.local_batch(int(nproc))


def require_one_process(command: str, instead: str) -> None:
    """Refuse a command that several ranks would all run.

    Raises:
        UsageError: this process is one of several ranks.
    """
    if (here := launched()).world_size > 1:
        raise UsageError(f"{command}: leave out {here.launcher}, {instead}")
