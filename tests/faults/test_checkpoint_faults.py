"""Checkpoints under kill -9, a full disk, and files made to run code when they are read."""

import errno
import io
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as safetensors_bytes

from rdm_fast.errors import DataError
from rdm_fast.run import checkpoint
from rdm_fast.run.checkpoint import FILES, MANIFEST, Snapshot

ROOT = Path(__file__).parents[2]

# One process imports torch once and forks each victim, so that a kill costs a fork, not a start.
SAVER = """
import os, sys, time
from pathlib import Path
import torch
from rdm_fast.run.checkpoint import Snapshot, save
from rdm_fast.run import checkpoint

folder = Path(sys.argv[1])

def save_forever():
    path = checkpoint.newest(folder, print, sweep=True)
    step = checkpoint.load(path).step if path else 0
    while True:
        step += 1
        tensor = torch.full((200_000,), float(step))
        save(folder, Snapshot(step, {"w": tensor}, {"w/m": tensor}, {}, {}), keep=2)
        os.write(1, f"{step}\\n".encode())

for line in sys.stdin:
    if os.fork() == 0:
        save_forever()
    time.sleep(float(line))
    victim = int(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[0])
    os.kill(victim, 9)
    os.waitpid(victim, 0)
    os.write(1, b"killed\\n")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds its child through /proc")
def test_forty_kills_while_saving_never_leave_a_bad_newest_checkpoint(tmp_path: Path) -> None:
    draw = random.Random(0)
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert saver.stdin is not None and saver.stdout is not None
    kills_inside_a_save = newest = 0
    try:
        for _ in range(40):
            saver.stdin.write(f"{draw.uniform(0.02, 0.25)}\n")
            reported = newest
            while (line := saver.stdout.readline().strip()) != "killed":
                reported = int(line)  # a warning of a damaged checkpoint is no number, and fails
            kills_inside_a_save += any(p.name.startswith(".tmp-") for p in tmp_path.iterdir())

            warnings: list[str] = []
            path = checkpoint.newest(tmp_path, warnings.append)
            assert warnings == []
            step = 0
            if path is not None:
                found = checkpoint.load(path)
                step = found.step
                assert torch.equal(found.model["w"], torch.full((200_000,), float(step)))
            # what save() returned for is never lost; one more may be there, not yet reported
            assert reported <= step <= reported + 1
            newest = step
    finally:
        saver.stdin.close()
        saver.wait(timeout=20)
        saver.stdout.close()
    assert newest > 40 and kills_inside_a_save >= 10  # the test did hit what it is about
    checkpoint.newest(tmp_path, warnings.append, sweep=True)
    assert not any(path.name.startswith(".tmp-") for path in tmp_path.iterdir())


# ---- a full disk -----------------------------------------------------------------------------


def snapshot(step: int, size: int = 10) -> Snapshot:
    return Snapshot(step, {"w": torch.full((size,), float(step))}, {}, {}, {})


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing past this many bytes of a file fails, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("step", [2, 3], ids=["the same step", "a new step"])
def test_a_save_that_runs_out_of_space_leaves_everything_as_it_was(
    tmp_path: Path, step: int
) -> None:
    for earlier in (1, 2):
        checkpoint.save(tmp_path, snapshot(earlier), keep=2)
    before = content(tmp_path)
    with largest_file(64 * 1024), pytest.raises(OSError, match=r"model\.safetensors"):
        checkpoint.save(tmp_path, snapshot(step, size=100_000), keep=2)
    assert content(tmp_path) == before and len(list(tmp_path.iterdir())) == 2
    path = checkpoint.save(tmp_path, snapshot(step, size=100_000), keep=2)  # there is space again
    assert checkpoint.load(path).step == step


def test_space_is_asked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type(shutil.disk_usage(tmp_path))(10**9, 10**9, 2**22)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"needs 4\.8 MiB and 4\.0 MiB are free") as caught:
        checkpoint.save(tmp_path, snapshot(1, size=2**20), keep=2)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".tmp-", "step-"])
def test_a_failure_in_any_rename_leaves_a_sound_checkpoint_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step), keep=2)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.startswith(name):
            raise OSError(errno.EIO, "I/O error")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="I/O error"):
        patch.setattr(Path, "rename", fail)
        checkpoint.save(tmp_path, snapshot(2), keep=2)
    warnings: list[str] = []
    newest = checkpoint.newest(tmp_path, warnings.append)
    assert newest is not None and checkpoint.load(newest).step == 2 and warnings == []
    assert not any(path.name.startswith(".tmp-") for path in tmp_path.iterdir())


# ---- files that would run code ---------------------------------------------------------------


class Runs:
    """Unpickling this calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def torch_file(payload: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(payload, stream, **options)
    return stream.getvalue()


def payloads(marker: Path) -> dict[str, bytes]:
    """Six files which, if unpickled, make the marker file."""
    shell = Runs(os.system, f"touch {marker}")
    expression = Runs(eval, f"open({str(marker)!r}, 'w').close()")
    nested = Runs(torch.storage._load_from_bytes, torch_file({"w": shell}))
    deflated = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(torch_file(shell))) as source,
        zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry.filename))
    return {
        "pickle": pickle.dumps(shell),
        "torch": torch_file({"model": shell}),
        "legacy": torch_file({"model": shell}, _use_new_zipfile_serialization=False),
        "eval": torch_file({"model": expression}),
        "nested": torch_file({"model": nested}),
        "deflated": deflated.getvalue(),
    }


def test_the_payloads_do_run_when_they_are_unpickled(tmp_path: Path) -> None:
    for name, payload in payloads(tmp_path / "ran").items():
        if name == "pickle":
            pickle.loads(payload)
        else:
            torch.load(io.BytesIO(payload), weights_only=False)
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize("name", ["pickle", "torch", "legacy", "eval", "nested", "deflated"])
def test_no_payload_ever_runs(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    payload = payloads(marker)[name]
    (tmp_path / "foreign.pth").write_bytes(payload)
    with pytest.raises(DataError, match=r"foreign\.pth is a file"):
        checkpoint.load(tmp_path / "foreign.pth")
    for file in (*FILES, MANIFEST):
        folder = tmp_path / file
        path = checkpoint.save(folder, snapshot(1), keep=2)
        (path / file).write_bytes(payload)
        with pytest.raises(DataError, match=file):
            checkpoint.load(path)
        assert checkpoint.newest(folder, lambda text: None) is None
        if file != MANIFEST:  # even with a manifest that vouches for it
            entries = {n: checkpoint._entry(path / n) for n in FILES}
            (path / MANIFEST).write_text(checkpoint._manifest(entries))
            checkpoint.verify(path)
            with pytest.raises(DataError, match="content"):
                checkpoint.load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "forged"),
    [
        ("state.json", b"[]"),
        ("state.json", b"{}"),
        ("state.json", b"[" * 100_000),
        ("state.json", b"\xff"),
        ("model.safetensors", b""),
        ("model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", safetensors_bytes({"w": torch.ones(9)})[:-1]),
        ("optim.safetensors", safetensors_bytes({"w": torch.ones(9)}) + b"more"),
    ],
)
def test_forged_content_with_a_true_digest_is_a_data_error(
    tmp_path: Path, file: str, forged: bytes
) -> None:
    path = checkpoint.save(tmp_path, snapshot(1), keep=2)
    (path / file).write_bytes(forged)
    entries = {name: checkpoint._entry(path / name) for name in FILES}
    (path / MANIFEST).write_text(checkpoint._manifest(entries))
    with pytest.raises(DataError, match="step-00000001"):
        checkpoint.load(path)
