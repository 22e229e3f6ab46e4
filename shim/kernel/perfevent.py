"""Holds a perf event open, so that no later event of a task is the machine's first. Lean.

The first perf event of a machine makes every processor look for events at each context switch, and
waits until all processors do (kernel/events/core.c, account_event: synchronize_rcu), for 8 to 25
ms. A hardware breakpoint of a debugger is such an event, and CRIU stops a restored process with a
breakpoint. Source: perf_event_open(2).
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
    """Returns a descriptor of an event of this task that counts nothing. Raises OSError.

    While the descriptor is open, no other perf event is the machine's first.
    """
    number = _NR.get(os.uname().machine)
    if number is None:
        raise OSError("perf_event_open is not known on this architecture")
    return syscall(number, ctypes.c_char_p(_ATTRIBUTES), 0, -1, -1, _CLOSE_ON_EXEC)
