"""Out of memory is one line that says what to lower, with code 69, and what was saved is kept."""

import errno
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from rdm_fast.cli import commands
from rdm_fast.errors import OutOfMemory, explained, is_out_of_memory
from rdm_fast.run import checkpoint
from rdm_fast.run.folder import RunFolder, read_status
from rdm_fast.training.session import record_failure
from tests.forks import Forked
from tests.runs import in_step, newest, run
from tests.tiny import command, tiny

ROOM = 1 << 30  # bytes above what a process has when it starts


def array_too_large() -> None:
    np.empty(1 << 50, np.uint8)


def tensor_too_large() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def size_overflows() -> None:
    torch.empty(1 << 40, 1 << 40)


def bytes_too_many() -> None:
    bytearray(1 << 60)


@pytest.mark.parametrize(
    "cause", [array_too_large, tensor_too_large, size_overflows, bytes_too_many]
)
def test_what_libraries_raise_without_memory_is_recognized(cause: object) -> None:
    with pytest.raises(Exception) as caught:
        cause()  # type: ignore[operator]
    error = explained(caught.value, "", "--batch")
    assert isinstance(error, OutOfMemory) and error.code == 69 and "lower --batch" in str(error)


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    for error in (OSError(errno.ENOSPC, "not enough memory"), RuntimeError("x"), ValueError("x")):
        assert not is_out_of_memory(error)
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")
    assert "2.50 GiB" in str(explained(cuda, "", "x"))


def limited(*words: str) -> None:
    """A command in a process that can get ROOM more memory."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    commands.main([*words])


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["train", *command("--model.projector-hidden 65536 --out run")], "projector-hidden"),
        (["train", *command("--augment.size 4096 --out run")], "--augment.size"),
        (["preview", "digits_byol", "--augment.size", "16384"], "--augment.size"),
    ],
    ids=["a wide model", "large views", "a preview"],
)
def test_a_command_without_memory_ends_with_one_line(
    words: list[str], flag: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = Forked(limited, *words, out=tmp_path / "out", err=log, cwd=tmp_path)
    assert process.wait() == 69, log.read_text()
    errors = [line for line in log.read_text().splitlines() if not line.startswith("warning:")]
    assert len(errors) == 1 and flag in errors[0]
    if words[0] == "train":
        status = read_status(tmp_path / "run")
        assert (status["state"], status["code"]) == ("failed", 69)


def test_what_was_saved_is_kept(tmp_path: Path) -> None:
    config, path = tiny(), tmp_path / "run"

    def ask(_: object) -> None:
        torch.empty(1 << 50, dtype=torch.uint8)

    with (
        pytest.raises(OutOfMemory) as error,
        RunFolder.open(str(path), config, overwrite=False, rank=0) as folder,
        record_failure(folder),
    ):
        folder.close()  # `run` opens it again
        run(path, config, lambda trainer: in_step(trainer, 4, ask))
    assert str(1 << 50) in str(error.value)
    assert newest(path).name == "step-00000002" and checkpoint.load(newest(path)).step == 2
    status = json.loads((path / "status.json").read_text())
    assert (status["state"], status["code"], status["step"]) == ("failed", 69, 2)
