"""A restore's part that the CUDA driver does. Lean; imported for snapshots with GPUs alone.

The helpers start beside CRIU, and the loader of the way with them. When all memory is filled, the
driver restores all processes side by side, with the map from captured to new devices. A failure
has no way back: the processes are stuck, the swap kills them, and the container starts cold.
"""

from __future__ import annotations

import contextlib
import os

from shim.contract import faults
from shim.contract.errors import Blame, GpuNotRestored
from shim.gpu import devicenodes, payload, processes, ways
from shim.gpu.helper import NO_ANSWER, OUT_OF_MEMORY, Team
from shim.kernel import alarm, process, survivors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shim.gpu.payload import GpuPayload
    from shim.gpu.way import Loading
    from shim.kernel.steps import Steps
    from shim.oci.spec import Spec

_ENVIRONMENT = {"LANG": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def _spawn(argv: Sequence[str], fd: int) -> process.Child:
    """A helper that ends with us. It gets nothing of the pod's: neither streams nor variables."""
    return process.Child(argv, _ENVIRONMENT, quiet=True, first=lambda: os.set_inheritable(fd, True))


class Restoring:
    """One restore. Use it as a context manager.

    pairs: UUIDs (`GPU-…`), captured to new. payload_dirfd: of the snapshot's files of memory.
    digests: of those of device memory that nothing else vouches for.
    """

    def __init__(
        self,
        container: str,
        found: GpuPayload,
        pairs: Sequence[Sequence[str]],
        until: float,
        payload_dirfd: int,
        digests: Mapping[str, Sequence[str]],
    ) -> None:
        self._container, self._found, self._until = container, found, until
        self._payload_dirfd, self._digests = payload_dirfd, digests
        self._pairs = [(payload.octets(old), payload.octets(new)) for old, new in pairs]
        self._held = contextlib.ExitStack()
        self._loading: Loading | None = None
        self._team = Team(_spawn)

    def __enter__(self) -> Restoring:
        with contextlib.ExitStack() as held:
            held.enter_context(self._team)
            pairs = [(bytes.fromhex(old), bytes.fromhex(new)) for old, new in self._pairs]
            way = ways.named(self._found.way, _spawn, self._container, self._digests)
            self._loading = held.enter_context(
                way.loading(self._container, self._payload_dirfd, self._found.about, pairs)
            )
            held.callback(self._loading.end)
            with alarm.held():  # a helper that is forgotten would never be killed
                self._team.prepare(len(self._found.processes))
            self._loading.begin(self._until)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with alarm.held():
            self._held.close()

    def finish(self, init: int, spec: Spec, steps: Steps) -> None:
        """Have all processes run on their GPUs: their memory is there. init: the container's first
        process. spec: its OCI spec. steps: filled. Raises GpuNotRestored, OSError.
        """
        if self._loading is None:
            raise RuntimeError("Restoring is a context manager")
        members = survivors.members(self._container)
        pids = processes.numbered_within(init, members, self._found.processes)
        devicenodes.provide(init, spec, self._container)
        faults.point("restore.gpu", self._container)
        with steps.timed("gpu_driver_restore"):
            self._all("restore", pids, pairs=self._pairs)
            self._all("unlock", pids)
        faults.point("restore.gpu.unlocked", self._container)
        with steps.timed("gpu_give"):
            self._loading.give_back(pids, self._until)
            self._loading.resume(self._until)
        self._loading.tell(steps)

    def _all(self, do: str, pids: Iterable[int], **more: object) -> None:
        for pid, answer in self._team.call(do, pids, self._until, **more).items():
            if not answer.is_success:
                error = GpuNotRestored(
                    "the GPU was not restored", about=self._container,
                    why=f"{do} of process {pid}: {answer.name}",
                    do="Is the device full, or exclusive? See nvidia-smi and the kernel's log.",
                )  # fmt: skip
                if answer.code in (OUT_OF_MEMORY, NO_ANSWER):
                    error.blame = Blame.OTHER  # the device is full, or the driver hangs
                raise error
