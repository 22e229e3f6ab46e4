"""perf_event_open(2), for what a first event of a task costs. Lean.

The first one on a machine makes every processor look for events at each switch of tasks, and waits
until all do (kernel/events/core.c, account_event: synchronize_rcu), for 8 to 25 ms. A hardware
breakpoint that a debugger sets is such an event, and CRIU stops a restored process with one.
"""

from __future__ import annotations

import ctypes
import os
import struct

from shim.kernel.libc import syscall

_NR = {"x86_64": 298, "aarch64": 241}
_SOFTWARE, _DUMMY, _DISABLED = 1, 9, 1
_ATTRIBUTES = struct.pack("=IIQQQQQ64x", _SOFTWARE, 112, _DUMMY, 0, 0, 0, _DISABLED)
_CLOSE_ON_EXEC = 8


def hold() -> int:
    """A descriptor of an event of this task that counts nothing: while it is open there is no first
    one. Raises OSError where there is none to be had.
    """
    number = _NR.get(os.uname().machine)
    if number is None:
        raise OSError("perf_event_open is not known on this architecture")
    return syscall(number, ctypes.c_char_p(_ATTRIBUTES), 0, -1, -1, _CLOSE_ON_EXEC)
