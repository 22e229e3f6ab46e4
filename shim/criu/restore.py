"""Runs `runc restore` in our own process tree: containerd's shim inherits the restored init. Lean.

We start runc before the snapshot is checked, and check the snapshot while runc starts: before it
calls CRIU, runc reads `descriptors.json` from the images. That file is a fifo, into which we write
when all is ready. Until then the directory has no image, and nothing of the snapshot runs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time

from shim.contract import faults
from shim.kernel import alarm, keyring, process, survivors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from shim.oci.call import Call

_DELETE_S = 10.0
_DIES_WITHIN_S = 5.0
_RUNC_ROOT = "/run/runc"
_LOOK_S = 0.001
_UMASK = 0o022
"""CRIU makes deleted files again with this umask: `shim.source.ghosts` relies on its value."""

DESCRIPTORS = "descriptors.json"
"""The pipes and files of the container's standard streams. Source: runc, checkpoint."""


def start(
    call: Call,
    runtime: Sequence[str],
    images: str,
    work: str,
    undo: contextlib.ExitStack,
    held: contextlib.ExitStack,
) -> process.Child:
    """Start to restore the container of `call`, with CRIU's work directory `work`; see `go_on`.

    images: a directory, which is made here and has no image yet. undo: gets the removal of the
    runtime's leftovers. held: gets the end of the runtime. Raises OSError.
    """
    os.mkdir(images, 0o700)
    os.mkfifo(f"{images}/{DESCRIPTORS}", 0o600)
    undo.callback(_take_away, call.container, runtime)
    undo.callback(_remove_mount_namespaces, f"{work}/restore.log", state_directory(call))
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
        os.umask(_UMASK)
        # `runc create` joins a new keyring, `runc restore` does not: CRIU's children would keep
        # containerd's keyring. Not in our own process: if we become `runc create` after all, it
        # could not join the keyring again.
        if "--no-new-keyring" not in call.options:
            keyring.join_session(f"_ses.{call.container}")

    faults.point("restore.criu.called", call.container)
    with alarm.held():
        child = process.Child(argv, os.environ, first=first)
        held.callback(child.end)
    return child


def go_on(
    child: process.Child,
    call: Call,
    images: str,
    descriptors: bytes,
    undo: contextlib.ExitStack,
    *,
    until: float,
) -> None:
    """Let the runtime go on, with all images in `images`.

    undo: gets the end of a running or half restored container.
    """
    undo.callback(_end_survivors, call.container)
    _hand_over(child, f"{images}/{DESCRIPTORS}", descriptors, until)


def finish(child: process.Child, call: Call, work: str, *, until: float) -> str:
    """Wait until the runtime has ended. Returns the cause, or empty when the container runs.

    Raises process.TooLate at the deadline.
    """
    status = child.wait(until)
    faults.point("restore.criu.ended", call.container)
    if not status:
        return ""
    from shim.criu.log import first_error  # late: only a failed restore pays for the import

    return first_error(work, "restore.log")


def _hand_over(child: process.Child, fifo: str, content: bytes, until: float) -> None:
    """Write into the fifo when the runtime has opened it. Returns early if the runtime ends."""
    while True:
        try:
            fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        else:
            os.set_blocking(fd, True)
            with contextlib.suppress(BrokenPipeError), os.fdopen(fd, "wb") as file:
                file.write(content)
            return
        if child.ends(time.monotonic() + _LOOK_S) or time.monotonic() > until:
            return


def state_directory(call: Call) -> str:
    """Returns the path of the runtime's state of this container. Source: runc(8), --root."""
    roots = [flag.partition("=")[2] for flag in call.root_flags if flag.startswith("--root=")]
    return f"{roots[0] if roots else _RUNC_ROOT}/{call.container}"


def _end_survivors(container: str) -> None:
    """Kill restored processes: they outlive CRIU when the deadline kills CRIU."""
    survivors.kill(container, until=time.monotonic() + _DIES_WITHIN_S)


def _remove_mount_namespaces(log: str, state: str) -> None:
    from shim.criu import mntns  # late: only a failed restore pays for the import

    mntns.remove(log, state)


def _take_away(container: str, runtime: Sequence[str]) -> None:
    """Kill and delete what `runc restore` left; mostly runc has cleaned up itself."""
    with contextlib.suppress(process.TooLate):
        until = time.monotonic() + _DELETE_S
        process.run([*runtime, "delete", "--force", container], until=until, quiet=True)
