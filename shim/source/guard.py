"""Starts the guard that thaws the container if the daemon no longer can (hook/thaw.py)."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import IO, TYPE_CHECKING

from shim.contract.paths import HOOK
from shim.contract.words import GUARD_DONE, GUARD_READY, GUARD_WITHIN
from shim.node import tool

if TYPE_CHECKING:
    from collections.abc import Iterator

_ENDS_WITHIN_S = 5.0


class FreezeGuard:
    """A guard that runs."""

    def __init__(self, process: subprocess.Popen[bytes], told: IO[bytes]) -> None:
        self._process, self._told = process, told

    def limit(self, until: float) -> None:
        """Give it another time, on `time.monotonic`. Raises OSError when it has ended: then nothing
        must be frozen.
        """
        self._told.write(GUARD_WITHIN + b"%.3f\n" % max(0.0, until - time.monotonic()))
        if self._process.poll() is not None:
            raise OSError("the guard that thaws has ended: was quickthawd stopped?")

    def dismiss(self) -> bool:
        """The window is over. Returns whether the guard had to thaw."""
        with contextlib.suppress(BrokenPipeError):
            self._told.write(GUARD_DONE)
            self._told.close()
        try:
            return self._process.wait(_ENDS_WITHIN_S) != 0
        except subprocess.TimeoutExpired:
            self._process.kill()  # it may thaw the next window, or may have thawed this one
            return True

    @property
    def is_there(self) -> bool:
        """Whether it was not dismissed."""
        return self._process.poll() is None and not self._told.closed


@contextlib.contextmanager
def guarded(container: str, freezer: str, until: float) -> Iterator[FreezeGuard]:
    """Have a guard in the `with`.

    freezer: path of the cgroup. until: when the guard thaws in any case, on `time.monotonic`.
    Raises OSError if there can be no guard, and then nothing must be frozen.
    """
    within_s = max(0.0, until - time.monotonic())
    with subprocess.Popen(
        [HOOK, "thaw", container, freezer, f"{within_s:.3f}"],
        env=tool.ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True, bufsize=0,
    ) as process:  # fmt: skip
        told, says = process.stdin, process.stdout
        if told is None or says is None:  # cannot be: both are pipes
            raise OSError(f"{HOOK} has no pipes")
        guard = FreezeGuard(process, told)
        try:
            if says.readline() != GUARD_READY:
                raise OSError(f"{HOOK} thaw did not start")
            yield guard
        finally:
            if guard.is_there:
                guard.dismiss()
