"""One process writes to a run folder, on any file system; the lock of a lost one is taken over."""

import fcntl
import json
import os
import socket
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rdm_fast.data.images import tables
from rdm_fast.errors import CannotCreate
from rdm_fast.run.folder import LOCK, RunFolder, read_status
from rdm_fast.runtime import lock
from rdm_fast.runtime.lock import STALE, Holder, Lock
from tests.tiny import tiny

ME = Holder.me()


def write(path: Path, holder: Holder, age: float = 0.0) -> None:
    path.write_text(json.dumps(asdict(holder)))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))


def open_run(out: Path) -> RunFolder:
    return RunFolder.open(str(out), tiny(), overwrite=False, rank=0)


@pytest.mark.parametrize(
    ("holder", "age", "taken"),
    [
        (replace(ME, pid=2**22 + 1), 0, True),  # above the largest process id
        (replace(ME, started="1"), 0, True),  # the number is another process's now
        (ME, 10 * STALE, False),  # it lives, however long it has been silent
        (replace(ME, started="", machine=""), 0, False),  # by an earlier version
        (replace(ME, host="other"), STALE / 2, False),
        (replace(ME, host="other"), 2 * STALE, True),
        (replace(ME, machine="a container of this name", pid=2**22 + 1), STALE / 2, False),
        (replace(ME, machine="a container of this name"), 2 * STALE, True),
        (Holder(), 0, True),
    ],
)
def test_who_holds_a_lock(holder: Holder, age: float, taken: bool, tmp_path: Path) -> None:
    warned: list[str] = []
    found = Lock(tmp_path / "lock", warned.append)
    write(tmp_path / "lock", holder, age)
    left = found.acquire()
    assert (left is None) == taken == found.is_held()
    assert len(warned) == (taken and holder.pid > 0)
    if left:
        assert left == holder
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    found.release()
    assert (tmp_path / "lock").exists() != taken


@pytest.mark.parametrize(
    "content", ["", "x", "[]", "[" * 10_000, '{"pid": -1}', '{"pid": true}', '{"pid": 1e300}', "\0"]
)
def test_a_lock_that_no_process_wrote_is_taken(content: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(content)
    assert Lock(tmp_path / "lock").acquire() is None


def test_one_of_many_takes_a_stale_lock_over(tmp_path: Path) -> None:
    write(tmp_path / "lock", replace(ME, pid=2**22 + 1))
    locks = [Lock(tmp_path / "lock") for _ in range(8)]
    holders: list[Holder | None] = []
    takers = [
        threading.Thread(target=lambda one=one: holders.append(one.acquire())) for one in locks
    ]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    assert holders.count(None) == sum(one.is_held() for one in locks) == 1


def test_a_claim_whose_process_was_killed_is_no_obstacle(tmp_path: Path) -> None:
    write(tmp_path / "lock", replace(ME, pid=2**22 + 1))
    write(tmp_path / "lock.claim", ME, age=60)
    assert Lock(tmp_path / "lock").acquire() is None


def test_the_holder_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    held = Lock(tmp_path / "lock")
    assert held.acquire() is None
    os.utime(held.path, (1, 1))
    while held.path.stat().st_mtime == 1:
        pass  # ends with the next touch
    held.release()


def test_a_refusal_names_the_holder_and_the_way_out(tmp_path: Path) -> None:
    with open_run(tmp_path), pytest.raises(CannotCreate) as refused:
        open_run(tmp_path)
    for named in (f"process {os.getpid()}", socket.gethostname(), str(tmp_path / LOCK)):
        assert named in str(refused.value)


def test_a_run_needs_no_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with open_run(tmp_path) as folder:
        assert folder.is_new


def test_a_lock_of_the_index_never_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process that has stopped, or in a folder that belongs to somebody else."""
    monkeypatch.setattr(tables.tempfile, "gettempdir", lambda: str(tmp_path))
    private = tmp_path / f"rdm-fast-{os.getuid()}"
    with tables.folder_lock(tmp_path):
        (file,) = private.iterdir()
        assert private.stat().st_mode & 0o777 == 0o700
    assert not any(private.iterdir())
    write(file, ME, age=2 * tables.STUCK)
    with tables.folder_lock(tmp_path):
        pass
    file.unlink()
    private.chmod(0o777)
    with tables.folder_lock(tmp_path):
        assert not any(private.iterdir())
    private.rmdir()
    private.symlink_to(tmp_path / "elsewhere")
    with tables.folder_lock(tmp_path):
        assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_another_run_has_taken_meanwhile_is_left_to_it(tmp_path: Path) -> None:
    first = open_run(tmp_path)
    (tmp_path / LOCK).unlink()
    with open_run(tmp_path), pytest.raises(CannotCreate):
        first.restore(tiny())
    assert not first.restore(tiny())  # the folder is whole: only its lock was gone
    assert first._lock is not None and first._lock.is_held()
    first.close()
    assert read_status(tmp_path)["state"] == "running"
