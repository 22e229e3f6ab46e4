"""Runs as many restores at once as the node allows, in the order of their arrival: a queue. Lean.

Works without the daemon, which may be away. Each restore holds a lock on a file of its own while it
waits and runs; the file's name is its number. A restore may run when the number of locked files
with lower numbers is below the limit. So nobody overtakes, nobody starves, and a killed restore
makes room at once: the kernel drops its lock. A file that nobody locks is dead, and the next
arrival removes it. A lock on the directory, held for less than a millisecond, guards giving out
numbers and removing files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time

from shim.contract.errors import NoTurn
from shim.contract.paths import TURNS
from shim.kernel import alarm
from shim.kernel.replace import take_away

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_ARRIVE_S = 0.001
_LOOK_S, _LOOK_AT_MOST_S = 0.005, 0.1
"""The pause between two looks: short for the next in the queue, longer further back."""


@contextlib.contextmanager
def taken(
    most: int, *, until: float, container: str = "", directory: str = TURNS
) -> Iterator[None]:
    """Run the `with` as one of at most `most` restores, after all restores that came earlier.

    until: the deadline of the wait, on `time.monotonic`. Raises NoTurn at that time, OSError.
    """
    with contextlib.ExitStack() as place:
        number = _arrive(directory, until, place, container)
        while ahead := _too_many_ahead(directory, number, most):
            if time.monotonic() >= until:
                raise _no_turn(container, f"{ahead} earlier restores are running or waiting")
            time.sleep(min(_LOOK_S * ahead, _LOOK_AT_MOST_S, max(0, until - time.monotonic())))
        yield


def _no_turn(container: str, why: str) -> NoTurn:
    return NoTurn(
        "restore queue timed out", about=container, why=why,
        do="Raise max_restores_at_once or restore_wait_s in the configuration if the node can "
        "do more.",
    )  # fmt: skip


def _arrive(directory: str, until: float, place: contextlib.ExitStack, container: str) -> int:
    """Take the next number. Leaving `place` gives the number back."""
    os.makedirs(directory, 0o700, exist_ok=True)
    with _order(directory, until, container):
        numbers = _numbers(directory)
        _remove_dead(directory, numbers)
        number = max(numbers, default=0) + 1
        scratch = f"{directory}/.new"  # ours while we hold the lock on the directory
        with alarm.held():  # a deadline in between would leave the file, or its descriptor
            fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            place.callback(os.close, fd)
            # Locked before the rename: nobody ever sees the name without a lock.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(scratch, f"{directory}/{number}")
            place.callback(take_away, f"{directory}/{number}")
    return number


@contextlib.contextmanager
def _order(directory: str, until: float, container: str) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    why = "another restore holds the queue, and does not go on"
                    raise _no_turn(container, why) from error
                time.sleep(_ARRIVE_S)
        yield
    finally:
        os.close(fd)


def sweep(*, until: float) -> None:
    """Remove the files of killed restores. Raises NoTurn at `until`, OSError."""
    with contextlib.suppress(FileNotFoundError), _order(TURNS, until, "-"):
        _remove_dead(TURNS, _numbers(TURNS))


def _remove_dead(directory: str, numbers: Iterable[int]) -> None:
    for number in numbers:
        if not _is_locked(f"{directory}/{number}"):
            os.unlink(f"{directory}/{number}")


def _too_many_ahead(directory: str, own: int, most: int) -> int:
    """Returns how many restores must still end before number `own` may run."""
    ahead = [number for number in _numbers(directory) if number < own]
    if len(ahead) < most:
        return 0
    living = sum(_is_locked(f"{directory}/{number}") for number in ahead)
    return max(0, living - most + 1)


def _numbers(directory: str) -> list[int]:
    return sorted(int(name) for name in os.listdir(directory) if name.isdecimal())


def _is_locked(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
