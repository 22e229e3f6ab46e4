"""Fault points: places where a person who tests a node can make quickthaw fail.

`point(NAME)` does nothing unless a fault was armed for NAME: it checks whether a dictionary is
empty. Three programs arm faults: `quickthawd`, `quickthaw-runc` when it has a ticket, and
`quickthaw-hook`. All of them read PATH, a file that only root can have made, once at their start;
the daemon reads VARIABLE of its environment, too. Others set the environment of the other two
programs, which therefore ignore it. The content of the file and of the variable is

    {"faults": [{"point": NAME, "action": ACTION, "on": N, "container": BEGIN, "errno": NAME}]}

action: one of ACTIONS. on: only the Nth time that this process passes the point; every time when
the key is absent. container: only for containers whose id begins like this. errno: of the action
error, as `EACCES`; EIO when the key is absent. A malformed fault is reported and arms nothing.

Lean: the swap path imports this module.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import time

from shim.contract import jsontext
from shim.contract.paths import FAULTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

VARIABLE = "QUICKTHAW_FAULTS"
_MAX_BYTES = 64 * 1024
_PAUSE_S = 3600.0

ACTIONS = {
    "error": "an OSError, as of a call of the kernel that failed",
    "hang": "nothing more happens, until a deadline or a signal ends it",
    "kill": "the process kills itself with SIGKILL",
    "enospc": "an OSError with ENOSPC, as of a full file system",
}

POINTS = {
    # quickthaw-runc create
    "restore.ticket": "the ticket is there, and not yet read",
    "restore.check": "the container's directory is locked, the snapshot not yet looked at",
    "restore.rootfs.noted": "the journal knows of the root file system, which is untouched",
    "restore.rootfs.mounted": "the snapshot's diff is in the root file system",
    "restore.shm.noted": "the journal knows what /dev/shm is to get, and it has none of it",
    "restore.shm.built": "what /dev/shm is to get is complete, and has no name there yet",
    "restore.shm.filled": "/dev/shm has what the captured one had",
    "restore.network.read": "the pod's addresses are known",
    "restore.images.viewed": "CRIU's view of the images is made",
    "restore.told": "restored.json is written",
    "restore.memory.served": "the page server is started, CRIU is not",
    "restore.hashed": "all that is read from the snapshot is checked",
    "restore.criu.called": "the marker is there, the runtime is about to restore",
    "restore.criu.ended": "the restored process runs",
    "restore.gpu": "all memory is there, the CUDA driver is about to restore",
    "restore.gpu.unlocked": "the CUDA processes run on their devices",
    "restore.resumed": "the resume call was made",
    "restore.undo": "something failed, and nothing is undone yet",
    "restore.undone": "everything is undone",
    "restore.outcome": "the swap is over, nobody knows yet how it went",
    "restore.outcome.written": "how it went is written, the ticket not yet spent",
    "restore.cold": "the plain runtime is about to be executed instead",
    # the page server of a restored container
    "memory.started": "the page server listens, nobody has called it yet",
    "memory.shared": "CRIU has made shared memory, and waits until it is filled",
    "memory.told": "it has the descriptors of all processes, which do not run yet",
    "memory.filling": "the processes run, and memory is being filled",
    "memory.filled": "all is filled, the descriptors are still open",
    # quickthaw-hook
    "hook.prestart": "there is a plan for the network, and nothing of it is done",
    "hook.prestart.done": "the plan is carried out",
    "hook.poststop": "the container has ended, nothing of it is taken away",
    "hook.poststop.forgotten": "all is taken away but addresses in the pod's network",
    # quickthawd, containerd waits
    "daemon.create": "CreateContainer: the container's directories are not yet made",
    "daemon.create.prepared": "the directories are made, containerd has no answer yet",
    "daemon.decide": "PostCreateContainer: nothing is decided",
    "daemon.ticket": "the decision is a restore, the ticket is not yet written",
    "daemon.ticket.written": "the ticket is written, containerd has no answer yet",
    "daemon.started": "PostStartContainer: how the swap ended is not yet read",
    "daemon.outcome.taken": "how the swap ended is read and its file gone, nobody was told",
    "daemon.removed": "RemoveContainer: what is left of it is not yet taken away",
    # quickthawd, a capture
    "capture.ready": "the container is ready, nothing was done to it",
    "capture.network.read": "the network is known, quiesce was not called",
    "capture.quiesced": "quiesce was called",
    "capture.precopied": "the root file system was copied once, the container runs",
    "capture.memory.precopied": "the memory was copied once, the container runs",
    "capture.gpu.noted": "the journal knows of the CUDA processes, which are untouched",
    "capture.gpu.locked": "the CUDA driver has locked them",
    "capture.gpu.taken": "the memory of the way `direct` is away, nothing is checkpointed",
    "capture.gpu.checkpointed": "they are checkpointed, the container is not frozen",
    "capture.frozen": "the container is frozen",
    "capture.dumped": "CRIU's images are there, the container is frozen",
    "capture.memory.copied": "the memory is copied, the container is frozen",
    "capture.rootfs.copied": "the root file system is copied, the container is frozen",
    "capture.shm.copied": "/dev/shm is copied, the container is frozen",
    "capture.gpu.restored": "they run, the memory of the way `direct` is still away",
    "capture.thawed": "the container runs again, resume was not called",
    "capture.resumed": "resume was called",
    "capture.settled": "what CRIU and a page server read is apart, nothing is described",
    "capture.described": "addresses and sizes are known, nothing is published",
    # quickthawd, its store
    "store.staged": "the staging directory of a capture is made",
    "store.digested": "digests are taken, there is no manifest",
    "store.manifest.written": "the manifest is written, nothing is synced",
    "store.synced": "everything is on the disk, the snapshot does not exist yet",
    "store.renamed": "the snapshot exists, its directory entry is not synced",
    "store.published": "the snapshot exists for good, the index does not know it",
    "store.remove": "a snapshot is to be deleted, and is untouched",
    "store.removed": "it is out of sight in staging, and not synced",
    "store.removed.synced": "it is out of sight for good, its files are still there",
    "store.record.written": "quarantine or a count of failures is written, and not in place",
    "store.record.renamed": "it is in place, its directory entry is not synced",
}
"""Every point by name, with the state in which the program reaches it. The part before the first
dot is the phase. A test compares this table with the source."""

_armed: dict[str, list[_Fault]] = {}


class _Fault:
    __slots__ = ("action", "container", "number", "on", "seen")

    def __init__(self, fields: dict[str, Any]) -> None:
        """Raises ValueError for malformed fields."""
        self.action = str(fields.get("action"))
        name = str(fields.get("errno", "ENOSPC" if self.action == "enospc" else "EIO"))
        self.number = getattr(errno, name, 0)
        self.on, self.container = fields.get("on", 0), str(fields.get("container", ""))
        self.seen = 0
        if self.action not in ACTIONS:
            raise ValueError(f"no such action: {self.action}")
        if not isinstance(self.number, int) or not self.number:
            raise ValueError(f"no such errno: {name}")
        if not isinstance(self.on, int) or self.on < 0:
            raise ValueError(f"`on` is no count: {self.on}")


def point(name: str, container: str = "") -> None:
    """Raise, hang or die here if a fault is armed for `name`. name: a key of POINTS.

    container: the container that the work is for. Raises the OSError of an armed fault.
    """
    if _armed:
        _pass(name, container)


def arm(text: str | bytes) -> list[str]:
    """Arm the faults in `text` beside the armed faults. Returns a line for each malformed part."""
    try:
        wanted = jsontext.parse(text)["faults"]
        if not isinstance(wanted, list):
            raise TypeError("`faults` is no list")
    except (ValueError, KeyError, TypeError) as error:
        return [f"fault points: not understood: {type(error).__name__}: {error}"]
    wrong = []
    for fields in wanted:
        try:
            name = str(fields["point"])
            if name not in POINTS:
                raise ValueError(f"no such point: {name}")
            _armed.setdefault(name, []).append(_Fault(fields))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wrong.append(f"fault points: {fields!r:.200} arms nothing: {error}")
    return wrong


def arm_from_file(path: str = FAULTS) -> list[str]:
    """Arm the faults in a file, if there is such a file. Returns lines as `arm` does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"fault points: {path} cannot be opened: {error}"]
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid or status.st_mode & 0o077:
            return [f"fault points: {path} is not a file of root alone, and not looked at"]
        return arm(file.read(_MAX_BYTES))


def armed() -> list[str]:
    """Returns a line for each armed fault, for people who wonder why things fail."""
    return [
        f"fault point {name} is armed: {each.action}"
        for name, faults in _armed.items()
        for each in faults
    ]


def disarm() -> None:
    """Disarm all faults."""
    _armed.clear()


def _pass(name: str, container: str) -> None:
    for fault in _armed.get(name, ()):
        if fault.container and not container.startswith(fault.container):
            continue
        fault.seen += 1
        if fault.on in (0, fault.seen):
            _happen(name, fault)


def _happen(name: str, fault: _Fault) -> None:
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.action in ("kill", "hang"):
        _hang()
    raise OSError(fault.number, os.strerror(fault.number), f"fault point {name}")


def _hang() -> NoReturn:
    while True:
        time.sleep(_PAUSE_S)
