"""Sets a deadline on this process itself, also where a system call does not return.

For programs with a single thread: SIGALRM interrupts the wait of the main thread. No program can
give up a wait that the kernel does not let be interrupted (a dead NFS server, mounted hard). Lean.

An alarm may ring between any two instructions: hold the alarm (`held`) around steps that belong
together, such as starting a program and storing its pid.
"""

from __future__ import annotations

import contextlib
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_SOONEST_S = 0.001
_ALARM = (signal.SIGALRM,)


class TooLate(Exception):
    """An operation did not end before its deadline and was given up."""


@contextlib.contextmanager
def raising(until: float) -> Iterator[None]:
    """Raise TooLate in the `with` at `until` (on `time.monotonic`). Not to be nested."""

    def ring(*_: object) -> None:
        raise TooLate("no return before the deadline")

    signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(_SOONEST_S, until - time.monotonic()))
        yield
    finally:
        cancel()


@contextlib.contextmanager
def sooner(until: float, last: float) -> Iterator[None]:
    """Within `raising`, which ends at `last`: ring at `until` already, if that is earlier."""
    at = min(until, last)
    signal.setitimer(signal.ITIMER_REAL, max(_SOONEST_S, at - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(_SOONEST_S, last - time.monotonic()))


def kill_us_after(seconds: float) -> None:
    """Kill this process by SIGALRM, as kill -9 would, unless `cancel` comes before."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def cancel() -> None:
    """Cancel the alarm. A timer outlives exec: call this before becoming another program."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delay an alarm that rings in the `with` until the end, or until a `heard` within."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALARM)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Let the alarm take effect at once, for the part of a `held` that waits."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ALARM)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ALARM)
