"""How the content of a container's device memory travels: one interface, several ways. Lean.

The order of the driver's calls, the journal and the undo are the engine's (`shim.gpu.engine`), the
same for every way. A way adds what happens to the memory itself, at the moments that the engine
names. Two sides:

capture: `begin` (while the source serves) -> `prepare` (no thread is inside of the driver, none
gets in) -> lock (what runs ends) -> unlock -> `evacuate` (take blocks away) -> lock -> checkpoint
-> `checkpointed` -> CRIU's dump -> driver restore -> unlock -> `give_back` (map the blocks again)
-> `resume` -> `finish`.

restore: `begin` (from the ticket on, beside everything else) -> CRIU -> all memory filled -> driver
restore -> unlock -> `give_back` -> `resume` -> `end`.

On any failure of a capture the engine unlocks or restores what the state of each process asks for,
and calls `give_back` and `resume` for whatever `prepare` was called for: both must be idempotent
and must leave a process that was never touched alone. A failed restore ends with `end` alone: the
processes are killed, and the loader must be gone with its device memory when `end` returns.

Every call has a deadline on `time.monotonic`, and raises a QuickthawError or OSError.
"""

from __future__ import annotations

TYPE_CHECKING = False


class ProcessReport:
    """The facts that a way has about a process.

    against: why it cannot be restored, in words with the remedy. moved: bytes of device memory that
    the way takes out of the process, so that nobody stages them.
    """

    __slots__ = ("against", "moved")

    def __init__(self, against: list[str], moved: int) -> None:
        self.against, self.moved = against, moved


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Protocol

    from shim.kernel.steps import Steps

    class Evacuation(Protocol):
        """The capture of one container: its CUDA processes by host pid, and where files go."""

        @property
        def splits(self) -> bool:
            """Whether `prepare` and `evacuate` do anything: without, the engine locks once."""

        def begin(self, gpus: Sequence[str], until: float) -> None:
            """Do all that can be done before anything stands still. Returns at once.

            gpus: UUIDs of the container's devices, in hexadecimal.
            """

        def prepare(self, pids: Sequence[int], until: float) -> None:
            """Let no thread of these processes into the driver any more, and wait until none is
            inside. None of them is locked. Once more with all when another process appeared.
            """

        def evacuate(self, until: float) -> None:
            """Take the blocks away; the processes are unlocked, the devices have nothing to do."""

        def checkpointed(self, until: float) -> None:
            """The driver has checkpointed all; saving to files may go on beside CRIU's dump."""

        def give_back(self, until: float) -> None:
            """Map the blocks again: the driver has restored and unlocked. Idempotent."""

        def resume(self, until: float) -> None:
            """Let the parked threads go. Idempotent."""

        def finish(self, until: float) -> Mapping[str, object]:
            """Wait until all payload files are whole; a plain JSON object about them."""

        def tell(self, steps: Steps) -> None:
            """Add what was done beside the engine's steps."""

    class Loading(Protocol):
        """The restore of one container: a loader that runs beside everything else."""

        def begin(self, until: float) -> None:
            """Start to bring the payload to the devices. Returns at once."""

        def give_back(self, pids: Sequence[int], until: float) -> None:
            """Map the blocks in these processes (host pids); waits until the payload is there."""

        def resume(self, until: float) -> None:
            """Let the parked threads go."""

        def tell(self, steps: Steps) -> None:
            """Add what was done beside the caller's steps."""

        def end(self) -> None:
            """No loader, and no device memory of one, is left. Idempotent; holds no deadline of
            the swap, and takes seconds at most.
            """

    class Way(Protocol):
        """One way. name: as `quickthaw explain` shows it and the manifest keeps it."""

        name: str

        def asked(self, pid: int) -> ProcessReport | None:
            """Returns the facts about this process; None if the way has not seen its calls.
            Changes nothing in the process.
            """

        def evacuation(
            self, container: str, payload_dirfd: int, lock: str
        ) -> AbstractContextManager[Evacuation]:
            """The capture's side. payload_dirfd: a directory of the snapshot for its files. lock:
            path of the file that whoever guards the source locks, see `shim.gpu.calls`.
            """

        def loading(
            self,
            container: str,
            payload_dirfd: int,
            about: Mapping[str, object],
            pairs: Sequence[tuple[bytes, bytes]],
        ) -> AbstractContextManager[Loading]:
            """The restore's side. about: as of `Evacuation.finish`. pairs: UUIDs, old to new."""
