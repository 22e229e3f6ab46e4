"""quickthaw-hook: `prestart` or `poststop`, with the OCI state on stdin.

Source: OCI runtime-spec, runtime.md (state) and config.md (POSIX-platform hooks).
"""

from __future__ import annotations

import sys

from hook.state import read_state


def main() -> int:
    """Run the named hook. A failure fails the create that runs it, so say why on stderr."""
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    try:
        if name == "prestart":
            from hook.prestart import prestart

            prestart(read_state(sys.stdin.buffer))
        elif name == "poststop":
            from hook.poststop import poststop

            poststop(read_state(sys.stdin.buffer))
        else:
            sys.stderr.write("usage: quickthaw-hook prestart|poststop < state.json\n")
            return 2
    except Exception as error:  # noqa: BLE001 - the border: one line for the runtime's log
        sys.stderr.write(f"quickthaw-hook {name}: {type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
