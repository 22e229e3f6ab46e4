"""`runc restore` in our own process tree, so that containerd's shim inherits the restored init."""

from __future__ import annotations

import contextlib
import time

from shim.contract import faults
from shim.criu import mntns
from shim.criu.log import first_error
from shim.kernel import keyring, process, survivors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from shim.front.argv import Call

_DELETE_S = 10.0
_DIES_WITHIN_S = 5.0
_RUNC_ROOT = "/run/runc"


def restore(
    call: Call,
    runtime: Sequence[str],
    images: str,
    work: str,
    undo: contextlib.ExitStack,
    *,
    until: float,
) -> str:
    """Restore the container of `call` from `images`, with CRIU's work directory `work`.

    Returns the empty string when the container runs, else why not. On `undo` goes what takes
    a running or half restored container away. Raises process.TooLate at the deadline.
    """
    undo.callback(_take_away, call.container, runtime)
    undo.callback(mntns.remove, f"{work}/restore.log", state_directory(call))
    undo.callback(_end_survivors, call.container)
    flags = ["--console-socket", "--pid-file", "--no-pivot"]
    options = [f"{flag}={call.options[flag]}" if call.options[flag] else flag
               for flag in flags if flag in call.options]  # fmt: skip
    argv = [
        *runtime, f"--log={work}/runc.log", "--log-format=json",
        "restore", "--detach", "--no-subreaper", "--lazy-pages",
        f"--bundle={call.option('--bundle', '-b')}",
        f"--image-path={images}", f"--work-path={work}", *options, call.container,
    ]  # fmt: skip

    def first() -> None:
        # `runc create` does so, `runc restore` does not: CRIU's children would keep containerd's.
        # Not in our own process: `runc create` in its place could not join what it has already.
        if "--no-new-keyring" not in call.options:
            keyring.join_session(f"_ses.{call.container}")

    faults.point("restore.criu.called", call.container)
    status = process.run(argv, until=until, first=first)
    faults.point("restore.criu.ended", call.container)
    return first_error(work, "restore.log") if status else ""


def state_directory(call: Call) -> str:
    """Where the runtime keeps the state of this container. Source: runc(8), --root."""
    roots = [flag.partition("=")[2] for flag in call.root_flags if flag.startswith("--root=")]
    return f"{roots[0] if roots else _RUNC_ROOT}/{call.container}"


def _end_survivors(container: str) -> None:
    """What CRIU has restored outlives CRIU when that is killed at the deadline."""
    survivors.kill(container, until=time.monotonic() + _DIES_WITHIN_S)


def _take_away(container: str, runtime: Sequence[str]) -> None:
    """Kill and forget what `runc restore` left; it mostly has cleaned up itself."""
    with contextlib.suppress(process.TooLate):
        until = time.monotonic() + _DELETE_S
        process.run([*runtime, "delete", "--force", container], until=until, quiet=True)
