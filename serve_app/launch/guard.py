"""The guard of a server: the process that a user starts and signals, and that leaves nothing behind.

Knows nothing of Ray. The work is done by a child process, because Ray's C++ code replaces signal handlers, can be
busy for minutes without handling any, and starts processes that outlive it. The guard only waits, so it answers a
signal at any moment: it asks the child to stop, kills what is left after a limit, and adopts and ends every orphan.

If the guard itself is killed, the child notices and stops in the same way.
"""

from __future__ import annotations

import atexit
import ctypes
import enum
import mmap
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil

# Kubernetes kills 30 seconds after SIGTERM.
LIMIT_S = 25.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36
_TICK_S = 0.5


class Stop(enum.IntEnum):
    """The way in which the work stops when it is asked to."""

    AT_ONCE = 0  # nothing has to be handed back: kill the process
    IN_ORDER = 1  # interrupt the work, which then ends what it has begun
    UNDER_WAY = 2  # the work is stopping already


class _Shared:
    """A byte in shared memory that says how the child stops. The guard can read it whatever the child is doing."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    @property
    def stop(self) -> Stop:
        return Stop(self._byte[0])

    @stop.setter
    def stop(self, how: Stop) -> None:
        self._byte[0] = how


_shared = _Shared()
_guarding: int | None = None


def set_stop(how: Stop) -> None:
    """Set how the work in this process stops from now on. Without a guard it has no effect."""
    _shared.stop = how


def pid() -> int:
    """Return the process to signal in order to stop the work in this one: its guard, or itself if it has none."""
    return _guarding or os.getpid()


def fork() -> None:
    """Fork, and return in the child. The calling process becomes its guard, and exits with its status.

    A guard that was signalled exits with 128 plus the signal's number. It also stops, as on SIGHUP, when the process
    that started it has died, unless it was started to outlive that: by `nohup`, by `setsid` or as a background job.
    """
    global _guarding
    parent = os.getppid() if _depends_on_parent() else None
    alive, held = os.pipe()  # only the guard keeps `held`: when it dies, `alive` ends
    _adopt_orphans()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    child = os.fork()
    if child:
        os.close(alive)
        sys.exit(_Guard(child, parent).wait())
    os.close(held)
    _guarding = os.getppid()
    _obey(alive)


@contextmanager
def deadline(seconds: float, message: str) -> Iterator[None]:
    """End this process with a message if the block takes longer. It is for calls that nothing can interrupt.

    Has no effect without a guard, since only a guard ends the other processes.
    """

    def give_up() -> None:
        print(f"wan-serve: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    if _guarding is None:
        yield
        return
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Guard:
    """The guard's work: it waits for the child, and for a reason to stop it."""

    def __init__(self, child: int, parent: int | None) -> None:
        self._child = child
        self._parent = parent
        self._status: int | None = None  # of the child, as waitpid gives it
        self._signal: int | None = None
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup sets SIG_IGN
                signal.signal(number, self._stop)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _stop(self, number: int, frame: FrameType | None = None) -> None:
        self._signal = self._signal or number

    def wait(self) -> int:
        """Wait for the child, stop it if asked to, end what it left, and return the status to exit with."""
        while self._status is None and self._signal is None:
            self._tick()
            if self._parent is not None and os.getppid() != self._parent:
                self._stop(signal.SIGHUP)
        if self._status is None:
            self._end_child()
        _kill_descendants(reap=self._reap)
        if self._signal is not None:
            return 128 + self._signal
        status = os.waitstatus_to_exitcode(self._status or 0)
        if status < 0:
            print(f"wan-serve: the server was ended by {signal.Signals(-status).name}", file=sys.stderr)
            return 128 - status
        return status

    def _end_child(self) -> None:
        if _shared.stop != Stop.AT_ONCE:
            os.kill(self._child, signal.SIGINT)
            deadline = time.monotonic() + LIMIT_S
            while self._status is None and time.monotonic() < deadline:
                self._tick()
            if self._status is None:
                print(f"wan-serve: not ended after {LIMIT_S:.0f} s, killed what was left", file=sys.stderr)

    def _tick(self) -> None:
        if select.select([self._woken], [], [], _TICK_S)[0]:
            os.read(self._woken, 512)
        self._reap()

    def _reap(self) -> None:
        """Reap children that have ended, adopted ones included, and note the status of the work."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            if process == self._child:
                self._status = status


def _obey(alive: int) -> None:
    """Prepare a child for its guard: only SIGINT reaches it, and only if it is to end in order."""
    # A signal to the guard's process group, such as Ctrl-C or the one of `timeout`, must reach the guard alone.
    os.setpgid(0, 0)
    _adopt_orphans()  # should the guard be killed
    # Some supervisors signal every process. All but SIGINT stay blocked in all threads, since Ray's handler of SIGTERM,
    # which prints a backtrace and aborts, may be installed at any time. Ray's processes unblock them when they start.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS))
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _raise_again
    atexit.register(_kill_descendants)  # runs after Ray's own, which is registered later
    threading.Thread(target=_watch, args=(alive,), name="guard", daemon=True).start()


def _interrupt(number: int, frame: FrameType | None) -> None:
    how = _shared.stop
    if how == Stop.AT_ONCE:
        os._exit(128 + number)
    if how == Stop.IN_ORDER:
        _shared.stop = Stop.UNDER_WAY
        raise KeyboardInterrupt


def _raise_again(lost: Any) -> None:
    """Repeat an interruption that came where Python lets nothing be raised, such as in a finaliser."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        _shared.stop = Stop.IN_ORDER
        again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))  # this hook may raise nothing either
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(lost)


def _watch(alive: int) -> None:
    """Wait for the guard's death, and then end the work in its place."""
    os.read(alive, 1)
    if _shared.stop != Stop.AT_ONCE:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(LIMIT_S)
    _kill_descendants()
    os._exit(128 + signal.SIGKILL)


def _adopt_orphans() -> None:
    """Become the parent of every descendant whose parent dies. On systems other than Linux they may escape."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_descendants(reap: Any = lambda: None, timeout_s: float = 10) -> None:
    """Kill every process that descends from this one, and wait until they are gone."""
    me = psutil.Process()
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        reap()
        living = [one for one in me.children(recursive=True) if _alive(one)]
        if not living:
            return
        for one in living:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        time.sleep(0.05)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _depends_on_parent() -> bool:
    """Return False if this process was started so as to outlive its parent."""
    if os.getppid() <= 1 or os.getsid(0) == os.getpid():  # a child of init; started by setsid, or a daemon
        return False
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # started by nohup
        return False
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started with `&` in a script
        return False
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return True
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()  # they differ if it was started with `&` in a terminal
    finally:
        os.close(terminal)
