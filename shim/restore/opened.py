"""Checks the files in volumes that CRIU has opened, before a restored process runs. Lean.

Those with a name were compared and are held (see `shim.gate.volumes`), but CRIU opens them by their
names, and whoever can write to the volume can rename another file there at that moment. So CRIU
runs a script of ours (`hook/quickthaw-opened`) when all descriptors are made and no process runs
yet; it asks here, through two fifos, and waits for the answer. Without a yes CRIU ends what it has
restored.
"""

from __future__ import annotations

import os
import select
import time

from shim.contract import jsontext
from shim.contract.errors import SnapshotDoesNotFit
from shim.contract.paths import CONTAINER_ANSWERED, CONTAINER_ASKED, CONTAINERS
from shim.gate import volumes
from shim.kernel import procfs, replace
from shim.kernel.fds import OwnedFd
from shim.kernel.lineage import tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping, Sequence

    from shim.contract.manifest import Manifest
    from shim.contract.ticket import Ticket
    from shim.gate.volumes import Identity, VolumeFile
    from shim.oci.spec import Spec

_LONGEST = 32


def watched(
    captured: Manifest, spec: Spec, ticket: Ticket, stack: contextlib.ExitStack
) -> Watch | None:
    """Hold the files in volumes that CRIU will open, until `stack` is left; None if there are none.

    The gate did the same, but /dev/shm has been filled since. CRIU's options must then have it ask.
    Raises SnapshotDoesNotFit, OSError.
    """
    fact = jsontext.parse(captured.facts["volume_files"])
    files, _ = volumes.parse(fact)
    container = ticket.container
    if made := volumes.made(fact):
        _check_company(ticket, made[0])
    if not files:
        return None
    wrong, held = volumes.hold(spec, files, stack)
    if wrong:
        raise _other_files(container, "; ".join(wrong))
    return Watch(f"{CONTAINERS}/{container}", files, held, stack, container)


def _check_company(ticket: Ticket, path: str) -> None:
    """CRIU makes deleted files as root, by their names: see `shim.source.ghosts`."""
    if ticket.others:
        error = SnapshotDoesNotFit(
            "a deleted file cannot be made again", about=ticket.container,
            why=f"CRIU makes {path} by its name, where the {ticket.others} other containers of the "
            "pod may put a link meanwhile",
            do="Start this container before the others, or have it close the file.",
        )  # fmt: skip
        error.codes = ["volume_files"]
        raise error


def _other_files(container: str, why: str) -> SnapshotDoesNotFit:
    error = SnapshotDoesNotFit(
        "files in volumes are not the captured ones", about=container, why=why,
        do="Who writes to the volume while the pod starts?",
    )  # fmt: skip
    error.codes = ["volume_files"]
    return error


class Watch:
    """Answers CRIU's script. files: as captured. held: device and inode of each, by path."""

    def __init__(
        self,
        directory: str,
        files: Sequence[VolumeFile],
        held: Mapping[str, Identity],
        stack: contextlib.ExitStack,
        container: str,
    ) -> None:
        """Make the fifos in `directory`. Raises OSError."""
        self._files, self._held, self._container = files, held, container
        self._was_asked, self._why_not, self._why_lost = False, "", ""
        for name in (CONTAINER_ASKED, CONTAINER_ANSWERED):
            replace.take_away(f"{directory}/{name}")
            os.mkfifo(f"{directory}/{name}", 0o600)
        # Read and write: no open blocks on the other side, and no end of file comes too early.
        self._asked, self._answered = (
            stack.enter_context(
                OwnedFd(os.open(f"{directory}/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            ).fileno()
            for name in (CONTAINER_ASKED, CONTAINER_ANSWERED)
        )

    def serve(self, pid: int, until: float) -> None:
        """Answer CRIU whenever it asks, until the runtime has ended or `until` on `time.monotonic`.

        CRIU 4.1 reads its options twice, and so asks twice. pid: of our child, the runtime. Raises
        OSError when the fifos fail.
        """
        poll = select.poll()
        with OwnedFd(os.pidfd_open(pid)) as ended:
            for fd in (self._asked, ended.fileno()):
                poll.register(fd, select.POLLIN)
            while (left := until - time.monotonic()) > 0:
                ready = {fd for fd, _ in poll.poll(left * 1000)}
                if self._asked not in ready:
                    return  # the caller reports how the runtime ended, or that it is late
                self._answer(int(os.read(self._asked, _LONGEST)))

    def _answer(self, root: int) -> None:
        self._was_asked = True
        try:
            self._why_not = self._why_not or self.difference(root)
        except OSError as error:  # the process ended, as when it is killed: then CRIU fails
            self._why_lost = f"a process could not be looked at: {error}"
        os.write(self._answered, b"no\n" if self._why_not or self._why_lost else b"yes\n")

    def judge(self, *, is_restored: bool) -> None:
        """Raises SnapshotDoesNotFit unless the answer was yes. is_restored: CRIU has not failed.

        If CRIU failed and a process had ended when CRIU asked, CRIU's error is the cause.
        """
        why = self._why_not
        if is_restored and not why:
            why = self._why_lost if self._was_asked else "CRIU has not run the script that asks"
        if why:
            raise _other_files(self._container, why)

    def difference(self, root: int) -> str:
        """Returns how an open file of `root`'s tree differs from the held file; or empty.

        Raises OSError when a process of the tree is not there.
        """
        pids = {procfs.numbers(pid)[-1]: pid for pid in tree(root)}
        for file in self._files:
            for number, link in file.at:
                if why := self._differs(file, pids.get(number), link):
                    return f"{link} of process {number}, {file.path}, {why}"
        return ""

    def _differs(self, file: VolumeFile, pid: int | None, link: str) -> str:
        if pid is None:
            raise ProcessLookupError(f"{file.path}: its process is not there")
        try:
            status = os.stat(f"/proc/{pid}/{_present(pid, link)}")
        except FileNotFoundError:
            return "is not open"
        except OSError as error:
            return f"cannot be looked at: {error.strerror}"
        if file.gone:
            return file.differs(status)
        if (status.st_dev, status.st_ino) != self._held.get(file.path):
            return "is another file than the one that was compared"
        return file.differs(status) if file.path in self._held else ""


def _present(pid: int, link: str) -> str:
    """Returns the mapping at the captured address: the kernel joins and splits mappings."""
    kind, _, name = link.partition("/")
    if kind != "map_files":
        return link
    start = int(name.split("-")[0], 16)
    for each in procfs.map_files(pid):
        first, last = (int(part, 16) for part in each.split("-"))
        if first <= start < last:
            return f"map_files/{each}"
    return link
