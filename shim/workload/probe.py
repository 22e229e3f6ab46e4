"""Calls a workload from inside its network namespace until it answers: a program of its own.

The daemon has threads and an event loop, and so cannot enter a namespace itself. Argument: a
JSON object with parent (the daemon's pid), netns (path), kind (`http` or `tcp`), method, port,
target, every_s (0: try once), within_s. Exits with 0 on success; otherwise prints the last reason
to stdout.
"""

from __future__ import annotations

import sys
import time

from shim.contract import jsontext
from shim.kernel import alarm, priority
from shim.workload import call

_ONE_CALL_S = 5.0
_LATE_S = 5.0


def main() -> int:
    """Try until a call succeeds or the time is over."""
    wanted = jsontext.parse(sys.argv[1])
    priority.be_a_helper_of(wanted["parent"])
    alarm.kill_us_after(wanted["within_s"] + _LATE_S)  # also where the daemon hangs
    end = time.monotonic() + wanted["within_s"]
    reason = "the time was over before the first try"
    while (now := time.monotonic()) < end:
        try:
            _once(wanted, min(end, now + _ONE_CALL_S) if wanted["every_s"] else end)
        except (call.CallFailed, OSError) as error:
            reason = str(error)
        else:
            return 0
        if not wanted["every_s"]:
            break
        time.sleep(wanted["every_s"])
    sys.stdout.write(f"{reason}\n")
    return 1


def _once(wanted: dict[str, object], until: float) -> None:
    netns, port = str(wanted["netns"]), int(str(wanted["port"]))
    if wanted["kind"] == "tcp":
        call.tcp(netns, port, until=until)
    else:
        call.http(netns, str(wanted["method"]), port, str(wanted["target"]), until=until)
