"""`quickthaw`: runs the command line for people. Verbs by name, errors to exit statuses."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Final

from shim import version
from shim.cli import capture, explain, keys, ls, output, quarantine, rm, show, status, verify
from shim.contract.errors import QuickthawError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shim.cli.output import Output

_VERBS: Final = {
    "ls": ls,
    "show": show,
    "capture": capture,
    "explain": explain,
    "rm": rm,
    "verify": verify,
    "quarantine": quarantine,
    "status": status,
    "keys": keys,
}
_EPILOG = """\
exit status: 0 done; 1 failed; 2 wrong usage; 30-39, 70-72, 74, 75 the capture failed, the source
goes on; 73 processes of the source were killed during its capture, or it has ended: there is no
snapshot; 76 the GPU did not give the source back, and the container was killed; 24, 51 a snapshot
is not whole; 40 no such snapshot; 41 the snapshot is in use; 42 no such pod; 43 malformed request;
44 a key is refused; 45 no such key; 46 the snapshot is not in quarantine; 47 the snapshot was not
(wholly) removed; 49 the daemon refused; 52 the configuration is not readable; 60 quickthawd is
away.

examples:
  quickthaw ls
  quickthaw show 3f2a91c0
  quickthaw capture inference-0 -n models
  quickthaw status --json
"""
INTERRUPTED = 130
"""As a shell reports a program that SIGINT ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit status. arguments: by default the arguments of the process."""
    asked = parser().parse_args(arguments)
    out = output.to_streams(as_json=asked.json)
    try:
        code = _run(asked, out)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _run(asked: argparse.Namespace, out: Output) -> int:
    try:
        code: int = asked.run(asked, out)
    except QuickthawError as error:
        out.error(error)
        return error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        out.note(f"{error.filename or asked.verb}: {error.strerror or error}")
        return 1
    return code


def parser() -> argparse.ArgumentParser:
    """Returns the parser with all verbs and their arguments."""
    found = argparse.ArgumentParser(
        prog="quickthaw",
        description="Shows and manages the snapshots of warm containers on this node.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"quickthaw {version.VERSION}")
    verbs = found.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in _VERBS.items():
        verb = verbs.add_parser(
            name, help=module.HELP, description=module.HELP, epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        verb.add_argument("--json", action="store_true", help="print JSON")
        module.arguments(verb)
        verb.set_defaults(run=module.run)
    return found


if __name__ == "__main__":
    sys.exit(main())
