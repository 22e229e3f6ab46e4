"""Starts the guard that thaws the container if the daemon no longer can (hook/thaw.py)."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import TYPE_CHECKING

from shim.contract.paths import HOOK
from shim.contract.words import GUARD_DONE, GUARD_READY
from shim.node import tool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ENDS_WITHIN_S = 5.0


@contextlib.contextmanager
def guarded(container: str, freezer: str, until: float) -> Iterator[Callable[[], bool]]:
    """Have a guard in the `with`. Yields a function that dismisses the guard and says if it thawed.

    freezer: path of the cgroup. until: when the guard thaws in any case, on `time.monotonic`.
    Raises OSError if there can be no guard, and then nothing must be frozen.
    """
    within_s = max(0.0, until - time.monotonic())
    with subprocess.Popen(
        [HOOK, "thaw", container, freezer, f"{within_s:.3f}"],
        env=tool.ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:  # fmt: skip
        told, says = process.stdin, process.stdout
        if told is None or says is None:  # cannot be: both are pipes
            raise OSError(f"{HOOK} has no pipes")

        def dismiss() -> bool:
            with contextlib.suppress(BrokenPipeError):
                told.write(GUARD_DONE)
                told.close()
            try:
                return process.wait(_ENDS_WITHIN_S) != 0
            except subprocess.TimeoutExpired:
                process.kill()  # it may thaw the next window, or may have thawed this one
                return True

        try:
            if says.readline() != GUARD_READY:
                raise OSError(f"{HOOK} thaw did not start")
            yield dismiss
        finally:
            if process.poll() is None and not told.closed:
                dismiss()
