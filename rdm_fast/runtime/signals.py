"""Signals: a process that is asked to stop saves what it has, or has nothing to save, and ends.

`catch` is the first thing that every command does. From then on a signal ends the process with
code 75 and one line, unless a `StopOnSignal` block is asked to stop in its own time. A thread does
this: Python runs a signal's handler in the main thread, which may be waiting in a collective.

A launcher, a terminal and the kernel may all pass on what was one request. So a signal counts as a
second one, which ends a `StopOnSignal` block at once, only if it comes `REPEAT` seconds after the
first, and not from the kernel because the launcher died.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from rdm_fast.errors import Interrupted, UserError
from rdm_fast.runtime.launcher import speaks
from rdm_fast.runtime.printing import print_error, print_line

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
SIGNALS = tuple(signal.Signals[name] for name in NAMES if name in signal.Signals.__members__)
REPEAT = 2.0  # seconds
PRINTING, WRITING = 5.0, 30.0
"""Seconds for the line and for status.json, which a dead terminal or a busy disk may hold up."""
POLL = 0.05
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _State:
    """What a signal does now; one for the process."""

    lock = threading.Lock()  # held for good once a signal is ending the process
    caught = False
    parent = 0
    since: float | None = None
    """When the first signal came."""
    stop: Callable[[], object] | None = None
    insist: Callable[[], object] | None = None
    code: int | None = None
    """The exit code with which the process is already ending by itself."""
    record: Callable[[UserError], object] | None = None
    say: Callable[[UserError], object] = staticmethod(print_error)


def catch() -> None:
    """Handle signals from now until the process ends; a SIGHUP that is ignored (nohup) stays so."""
    if _State.caught:
        return
    _install()
    _State.caught, _State.parent = True, os.getppid()
    stderr = sys.stderr  # which a library may be redirecting when a signal comes
    _State.say = lambda error: print_line(f"error: {error}", file=stderr)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked until now by `launch`
    atexit.register(_ignore)  # first registered, last called: no Python runs after it


def end_with_parent() -> None:
    """Ask Linux to send this process SIGTERM if its launcher dies."""
    import ctypes

    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def on_end(record: Callable[[UserError], object] | None) -> None:
    """Call `record` with the error before a signal ends the process; None for nothing."""
    _State.record = record


def ending(code: int) -> None:
    """The process is about to end by itself with this code: a first signal no longer matters."""
    with _State.lock:
        _State.code = code


def seconds_since_stop() -> float:
    """Since a signal asked a `StopOnSignal` block to stop; 0 if none has."""
    return 0.0 if _State.since is None else time.monotonic() - _State.since


class StopOnSignal:
    """Context in which the first signal calls `stop`, and a second, later one ends the process.

    Args:
        stop: called once or more, in any thread.
        insist: called for every later signal, instead of ending the process.
    """

    def __init__(
        self, stop: Callable[[], object], insist: Callable[[], object] | None = None
    ) -> None:
        self._stop, self._insist = stop, insist

    def __enter__(self) -> None:
        with _State.lock:
            _State.stop, _State.insist, _State.since = self._stop, self._insist, None
        self._undo = (lambda: None) if _State.caught else _install()

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        with _State.lock:
            _State.stop = _State.insist = None
            if _State.caught and isinstance(error, UserError):
                _State.code = error.code
        self._undo()


# ---- what a signal does ----------------------------------------------------------------------


def _received(number: int) -> None:
    """Decide about one signal, in the thread that listens."""
    held = _State.lock.acquire(timeout=1.0)  # the main thread may have paused while it held it
    now = time.monotonic()
    if _State.stop is None and _State.code is None:
        _end(number)
    elif _State.since is None:
        _State.since = now
        if _State.stop:
            _State.stop()
    elif now - _State.since >= REPEAT and not _of_dead_parent(number):
        if _State.insist is None:
            _end(number)
        _State.insist()
    if held:
        _State.lock.release()


def _of_dead_parent(number: int) -> bool:
    return number == signal.SIGTERM and _State.parent not in (0, os.getppid())


def _end(number: int) -> NoReturn:
    """End the process from any thread, without Python's way out: it may wait for other ranks."""
    if _State.code is not None:
        os._exit(_State.code)
    name = signal.Signals(number).name
    error = Interrupted(f"stopped by {name}, nothing to save yet: run the same command again")
    if _State.stop:
        error = Interrupted(
            f"stopped at once by a second {name}, without the steps since the last checkpoint: "
            "run the same command again"
        )

    works: list[tuple[Callable[[UserError], object], float]] = []
    if speaks():
        works.append((_State.say, PRINTING))
    if _State.record:
        works.append((_State.record, WRITING))
    threads = [
        (threading.Thread(target=work, args=[error], daemon=True), limit) for work, limit in works
    ]
    for thread, _ in threads:
        thread.start()
    for thread, limit in threads:
        for _ in range(int(limit / POLL)):  # not by the clock: an import may hold Python for long
            thread.join(POLL if thread.is_alive() else 0)
    os._exit(error.code)


# ---- how signals arrive ----------------------------------------------------------------------


def _install() -> Callable[[], None]:
    """Set handlers, and start the thread that listens; returns what undoes it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {n: handler for n, handler in before.items()
              if not (n.name == "SIGHUP" and handler == signal.SIG_IGN)}  # fmt: skip
    old = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    owner = os.getpid()

    def handle(number: int, _frame: FrameType | None) -> None:
        """In the main thread: nothing else starts while a signal ends the process."""
        if os.getpid() != owner:  # a forked child, such as a loader's worker: it ends with us
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif _State.stop:
            _State.stop()  # as the thread does, but surely before the program goes on
        elif _State.code is None:
            time.sleep(PRINTING + WRITING)

    threading.Thread(target=_listen, args=(reading,), daemon=True).start()
    for number in before:
        signal.signal(number, handle)

    def undo() -> None:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(writing)

    return undo


def _listen(reading: int) -> None:
    """Take signals, one byte each, until the pipe is closed."""
    while numbers := os.read(reading, 1):
        if numbers[0] in SIGNALS:
            _received(numbers[0])
    os.close(reading)


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
