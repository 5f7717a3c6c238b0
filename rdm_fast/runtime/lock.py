"""A lock that needs no help of the file system: a file that names its holder.

Network file systems often lack flock, and keep the locks of a lost machine. This lock is a file
that only one process can create, with host, process and its start; its holder touches it again and
again. It is stale once its holder has ended on this machine, or has not touched it for STALE
seconds on another; then the next process takes it over.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rdm_fast.runtime import atomic_files

HEARTBEAT = 15.0  # seconds between two touches
STALE = 300.0
POLL = 0.05
WRITING = 1.0  # seconds in which a lock may be empty, while its holder writes its name
CLAIM = ".claim"
"""Suffix of the file of a process that is taking a lock over."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as its file says; "" and 0 stand for what it does not say."""

    host: str = ""
    pid: int = 0
    started: str = ""
    """When the process started, in ticks since the boot: process ids are used again."""
    machine: str = ""
    """Boot and process-id space: the same host name, as of containers, is not the same machine."""
    token: str = ""
    """Of this lock alone."""

    @classmethod
    def me(cls) -> "Holder":
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _started(pid), _machine(), secrets.token_hex(8))

    @classmethod
    def parse(cls, content: bytes) -> "Holder":
        """Of a lock's content, which anyone may have written."""
        try:
            found: Any = json.loads(content)
            texts = {name: str(found.get(name, "")) for name in ("host", "started", "machine")}
            pid = found.get("pid")
            usable = type(pid) is int and 0 < pid < 2**31
            return cls(**texts, pid=pid if usable else 0, token=str(found.get("token", "")))
        except (ValueError, AttributeError, RecursionError):
            return cls()

    def __str__(self) -> str:
        return f"process {self.pid or '?'} on host {self.host or '?'}"

    def has_ended(self) -> bool | None:
        """Whether the process has ended; None if that cannot be seen from here."""
        if not self.pid:
            return True  # no process wrote this
        if self.host != socket.gethostname() or (self.machine or _machine()) != _machine():
            return None
        started = _started(self.pid)
        if started:
            return self.started not in ("", started)
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's
            return False
        return os.path.exists("/proc/self/stat")  # a zombie


def _started(pid: int) -> str:
    """The start of a living process, as Linux says; "" of others, and elsewhere."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
    return ""


def _machine() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


class Lock:
    """A lock on what a path stands for, until `release` or the end of this process."""

    def __init__(self, path: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        """`warn` is called with a sentence when the lock of a lost process is taken over."""
        self.path, self._warn = path, warn
        self._mine = b""
        self._released = threading.Event()

    def acquire(self, patience: float = 0.0, stuck: float = float("inf")) -> Holder | None:
        """Take the lock; returns who has it, if that is another process.

        Args:
            patience: seconds to wait for the other process.
            stuck: give up on a process that has not touched its lock for this many seconds.

        Raises:
            OSError: the lock cannot be written.
        """
        self._mine = json.dumps(asdict(Holder.me())).encode()
        deadline, empty_until = time.monotonic() + patience, time.monotonic() + WRITING
        while True:
            with suppress(FileExistsError):
                atomic_files.create(self.path, self._mine)
                break
            try:
                content, touched = atomic_files.read(self.path), self.path.lstat().st_mtime
            except FileNotFoundError:
                continue
            holder = Holder.parse(content)
            if content or time.monotonic() > empty_until:
                ended, silent = holder.has_ended(), self._now() - touched
                if ended or (ended is None and silent > STALE):
                    if self._take_over(content):
                        if holder.pid:
                            self._warn(
                                f"{self.path.name}: {holder} is gone: its lock is taken over"
                            )
                        break
                elif time.monotonic() > deadline or silent > stuck:
                    return holder
            time.sleep(POLL)
        self._released.clear()
        threading.Thread(target=self._touch, args=(os.getpid(),), daemon=True).start()
        return None

    def _now(self) -> float:
        """The clock of the file system, which may be another machine's."""
        probe = atomic_files.temporary(self.path.parent)
        atomic_files.create(probe)
        try:
            return probe.lstat().st_mtime
        finally:
            probe.unlink()

    def _take_over(self, stale: bytes) -> bool:
        """Replace a stale lock, unless another process does it."""
        claim = self.path.with_name(self.path.name + CLAIM)
        try:
            atomic_files.create(claim)
        except FileExistsError:
            with suppress(FileNotFoundError):
                if self._now() - claim.lstat().st_mtime > 10 * WRITING:  # it was killed meanwhile
                    claim.unlink()
            return False
        try:
            with suppress(FileNotFoundError):
                if atomic_files.read(self.path) == stale:
                    atomic_files.replace(self.path, self._mine)
                    return True
            return False
        finally:
            claim.unlink(missing_ok=True)

    def _touch(self, pid: int) -> None:
        while not self._released.wait(HEARTBEAT) and os.getpid() == pid:
            with suppress(OSError):
                os.utime(self.path, follow_symlinks=False)

    def is_held(self) -> bool:
        """Whether the lock is still this process's: somebody may have deleted the file."""
        try:
            return atomic_files.read(self.path) == self._mine
        except OSError:
            return False

    def release(self) -> None:
        """Give the lock up, if it is still this process's."""
        self._released.set()
        if self.is_held():
            with suppress(OSError):
                self.path.unlink()
