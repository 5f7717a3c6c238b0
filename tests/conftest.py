"""Fixtures shared by every test: seeds, poisoned memory, no bugs, and where real images lie."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from unittest import mock

import hypothesis
import pytest
import torch

from rdm_fast.cli import commands
from rdm_fast.errors import UserError
from tests import forks

# Without a GPU the Triton kernels still run, in Triton's interpreter (numpy, slow, exact). The
# variable is read when triton is imported, so it is set before any test module is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Small tensors: threads cost more than they give, and vary the rounding. The variable is for
# processes that a test starts.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# nohup ignores SIGHUP for every process that it starts, and so would the runs that tests stop.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A shared machine may pause any example, so the time of one says nothing.
hypothesis.settings.register_profile("rdm", deadline=None, print_blob=True)
hypothesis.settings.load_profile("rdm")


LONG = {"training", "faults", "e2e"}
"""Folders whose files run first: two files run at a time, and none should be left alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in LONG)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_bug(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test in which a command ends with code 70, here or forked, unless it is marked so."""
    forks.ended_with_a_bug.clear()
    end = commands._exit_with

    def watched(error: UserError) -> NoReturn:
        if error.code == forks.BUG:
            forks.ended_with_a_bug.append(str(error))
        end(error)

    with mock.patch.object(commands, "_exit_with", watched):
        yield
    on_purpose = request.node.get_closest_marker("bug") is not None
    assert bool(forks.ended_with_a_bug) == on_purpose, forks.ended_with_a_bug


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new_empty with NaN, so that a kernel which forgets to write an element fails."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        out = new_empty(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(scope="session")
def cifar10_npz() -> Path:
    """CIFAR-10 as JPEG bytes in one packed .npz file; the test is skipped where there is none."""
    beside = Path(__file__).parents[1] / "../shared/data/cifar10_jpeg.npz"
    path = Path(os.environ.get("RDM_CIFAR10_NPZ", beside))
    if not path.is_file():
        pytest.skip(f"needs CIFAR-10 as JPEG, not at {path}: set RDM_CIFAR10_NPZ to its .npz file")
    return path.resolve()
