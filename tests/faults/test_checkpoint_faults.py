"""Checkpoints under kill -9, a full disk, and files made to run code when they are read."""

import errno
import io
import os
import pickle
import random
import resource
import shutil
import time
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
from tests.forks import Forked


def save_until_killed(folder: Path) -> None:
    path = checkpoint.newest(folder, print, sweep=True)
    step = checkpoint.load(path).step if path else 0
    print(step, flush=True)
    while True:
        step += 1
        tensor = torch.full((200_000,), float(step))
        checkpoint.save(folder, Snapshot(step, {"w": tensor}, {"w/m": tensor}, {}, {}), keep=2)
        print(step, flush=True)


def test_forty_kills_while_saving_never_leave_a_bad_newest_checkpoint(tmp_path: Path) -> None:
    draw, folder, log = random.Random(0), tmp_path / "checkpoints", tmp_path / "log"
    kills_inside_a_save = newest = 0
    for kill in range(40):
        log.write_text("")
        saver = Forked(save_until_killed, folder, out=log)
        saves = draw.randint(1, 3)
        while len(log.read_text().split()) < saves:
            time.sleep(0.001)
        while kill % 2 and not any(folder.glob(".tmp-*")):  # every second one waits for a save
            time.sleep(0.0005)
        saver.kill()
        saver.wait()
        # a warning of a damaged checkpoint is no number, and fails
        reported = max([newest, *map(int, log.read_text().split())])
        kills_inside_a_save += any(folder.glob(".tmp-*"))
        path, step = checkpoint.newest(folder, pytest.fail), 0
        if path is not None:
            found = checkpoint.load(path)
            step = found.step
            assert torch.equal(found.model["w"], torch.full((200_000,), float(step)))
        # a step for which save() has returned is never lost; one more may be complete
        assert reported <= step <= reported + 1
        newest = step
    assert newest >= 40 and kills_inside_a_save >= 10  # the kills hit saves
    checkpoint.newest(folder, pytest.fail, sweep=True)
    assert not any(folder.glob(".tmp-*"))


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
    with largest_file(64 * 1024), pytest.raises(OSError) as failed:
        checkpoint.save(tmp_path, snapshot(step, size=100_000), keep=2)
    assert "model.safetensors" in str(failed.value)
    assert content(tmp_path) == before and len(list(tmp_path.iterdir())) == 2
    path = checkpoint.save(tmp_path, snapshot(step, size=100_000), keep=2)  # there is space again
    assert checkpoint.load(path).step == step


def test_space_is_asked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type(shutil.disk_usage(tmp_path))(10**9, 10**9, 2**22)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError) as caught:
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

    with monkeypatch.context() as patch, pytest.raises(OSError) as failed:
        patch.setattr(Path, "rename", fail)
        checkpoint.save(tmp_path, snapshot(2), keep=2)
    assert failed.value.errno == errno.EIO
    newest = checkpoint.newest(tmp_path, pytest.fail)
    assert newest is not None and checkpoint.load(newest).step == 2
    assert not any(path.name.startswith(".tmp-") for path in tmp_path.iterdir())


# ---- files that would run code ---------------------------------------------------------------


def vouch(path: Path) -> None:
    """Give a changed checkpoint a manifest with the digests of its files."""
    entries = {name: checkpoint._entry(path / name) for name in FILES}
    (path / MANIFEST).write_text(checkpoint._manifest(entries))


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
    with pytest.raises(DataError):
        checkpoint.load(tmp_path / "foreign.pth")
    for file in (*FILES, MANIFEST):
        folder = tmp_path / file
        path = checkpoint.save(folder, snapshot(1), keep=2)
        (path / file).write_bytes(payload)
        with pytest.raises(DataError) as refused:
            checkpoint.load(path)
        assert file in str(refused.value)
        assert checkpoint.newest(folder, lambda text: None) is None
        if file != MANIFEST:  # even with a manifest that vouches for it
            vouch(path)
            checkpoint.verify(path)
            with pytest.raises(DataError):
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
    vouch(path)
    with pytest.raises(DataError) as refused:
        checkpoint.load(path)
    assert path.name in str(refused.value)
