"""The commands' entry points; `python -m rdm_fast` is the same as `rdm`.

Signals are caught before anything is imported that takes time, and OpenMP is set up before torch
loads it.
"""

import os
import sys
from importlib.util import find_spec
from typing import NoReturn

from rdm_fast.errors import Interrupted, Unavailable, UsageError, UserError
from rdm_fast.runtime import signals
from rdm_fast.runtime.launcher import PARENT, launched
from rdm_fast.runtime.printing import guard_streams, print_error

SPINS = "1000"
"""How often a thread of OpenMP looks for work before it sleeps. By default it looks for
milliseconds, on a core that another process could use."""


def main() -> NoReturn:
    """`rdm COMMAND ...`."""
    _enter("main")


def train() -> NoReturn:
    """`rdm train` as a script."""
    _enter("train")


def evaluate() -> NoReturn:
    """`rdm eval` as a script."""
    _enter("evaluate")


def _enter(command: str) -> NoReturn:
    guard_streams()  # before a pipe takes the number of a stream that is closed
    signals.catch()
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
    try:
        ranked = bool(launched().launcher)
    except UsageError as error:
        _refuse(error)
    parent = os.environ.get(PARENT)
    if ranked or parent:
        signals.end_with_parent()
    if parent and parent != str(os.getppid()):  # it died before we asked for the signal
        _refuse(Interrupted("the launcher has ended: run the same command again"))
    if find_spec("rdm_kernels") is None:
        _refuse(Unavailable("rdm-fast is not installed: run `pip install -e .` here"))
    from rdm_fast.cli import commands

    getattr(commands, command)()
    raise AssertionError("a command ends by SystemExit")


def _refuse(error: UserError) -> NoReturn:
    print_error(error)
    sys.exit(error.code)


if __name__ == "__main__":
    main()
