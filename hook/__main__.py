"""quickthaw-hook: `prestart ID` or `poststop ID` with the OCI state on stdin, `record FD PARENT`,
`thaw ID FREEZER SECONDS` or `undo ID NETNS`.

The id is for the shell part of the hook (hook/quickthaw-hook); the state has it, too.

Source: OCI runtime-spec, runtime.md (state) and config.md (POSIX-platform hooks).
"""

from __future__ import annotations

import sys

from hook.state import read_state
from shim.contract import faults
from shim.kernel import alarm

_AT_MOST_S = 10.0
"""A runtime that was killed itself does not end its hooks: they end by themselves."""


def main() -> int:
    """Run the named hook. A failure fails the create that runs it, so say why on stderr."""
    name, *operands = sys.argv[1:] or [""]
    faults.arm_from_file()
    try:
        if name == "record" and len(operands) == 2:
            from hook.record import record

            alarm.kill_us_after(_AT_MOST_S)
            record(int(operands[0]), int(operands[1]))
        elif name == "thaw" and len(operands) == 3:
            from hook.thaw import thaw

            return thaw(operands[0], operands[1], float(operands[2]))
        elif name == "undo" and len(operands) == 2:
            from hook.poststop import undo

            alarm.kill_us_after(_AT_MOST_S)
            undo(*operands)
        elif name == "prestart":
            from hook.prestart import prestart

            alarm.kill_us_after(_AT_MOST_S)
            prestart(read_state(sys.stdin.buffer))
        elif name == "poststop":
            from hook.poststop import poststop

            alarm.kill_us_after(_AT_MOST_S)
            poststop(read_state(sys.stdin.buffer))
        else:
            sys.stderr.write(
                "usage: quickthaw-hook prestart|poststop ID < state.json, record FD PARENT, "
                "thaw ID FREEZER SECONDS, "
                "or undo ID NETNS\n"
            )
            return 2
    except Exception as error:  # noqa: BLE001 - the border: one line for the runtime's log
        sys.stderr.write(f"quickthaw-hook {name}: {type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
