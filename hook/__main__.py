"""quickthaw-hook: `prestart ID` or `poststop ID` with the OCI state on stdin, `record PID` or
`thaw ID FREEZER SECONDS`.

The id is for the shell part of the hook (hook/quickthaw-hook); the state has it, too.

Source: OCI runtime-spec, runtime.md (state) and config.md (POSIX-platform hooks).
"""

from __future__ import annotations

import sys

from hook.state import read_state
from shim.contract import faults


def main() -> int:
    """Run the named hook. A failure fails the create that runs it, so say why on stderr."""
    name, *operands = sys.argv[1:] or [""]
    faults.arm_from_file()
    try:
        if name == "record" and len(operands) == 1:
            from hook.record import record

            record(int(operands[0]))
        elif name == "thaw" and len(operands) == 3:
            from hook.thaw import thaw

            return thaw(operands[0], operands[1], float(operands[2]))
        elif name == "prestart":
            from hook.prestart import prestart

            prestart(read_state(sys.stdin.buffer))
        elif name == "poststop":
            from hook.poststop import poststop

            poststop(read_state(sys.stdin.buffer))
        else:
            sys.stderr.write(
                "usage: quickthaw-hook prestart|poststop ID < state.json, record PID, "
                "or thaw ID FREEZER SECONDS\n"
            )
            return 2
    except Exception as error:  # noqa: BLE001 - the border: one line for the runtime's log
        sys.stderr.write(f"quickthaw-hook {name}: {type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
