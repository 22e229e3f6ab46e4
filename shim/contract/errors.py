"""The error tree. Every class says in which state its failure leaves the pod.

    QuickthawError
    |-- SwapFailed (15-29)          the container starts cold
    |   |-- MemoryNotServed 16
    |   |-- MemoryLost 17           the container was killed
    |   |-- SwapKilled 18           the container was killed
    |   |-- NoTurn 19
    |   |-- TicketUnreadable 20
    |   |-- CriuRestoreFailed 21
    |   |-- RootfsNotMountable 22
    |   |-- ShmNotFilled 23
    |   |-- SnapshotNotWhole 24
    |   |-- SnapshotDoesNotFit 25
    |   |-- SwapTooLate 26
    |   |-- NetworkNotReady 27
    |   |-- ResumeFailed 28
    |   `-- GpuNotRestored 15
    |-- CaptureFailed (30-39, 70-76) the source goes on serving
    |   |-- NotCapturable 30
    |   |-- CriuDumpFailed 31
    |   |-- RootfsNotCopied 32
    |   |-- ShmNotCopied 33
    |   |-- NotFrozen 34
    |   |-- NeverReady 35
    |   |-- QuiesceFailed 36
    |   |-- NotPublished 37
    |   |-- ContainerBusy 38
    |   |-- NoRoom 70
    |   |-- SnapshotTooBig 71
    |   |-- MemoryNotCopied 72
    |   |-- SourceHarmed 73
    |   |-- GpuNotCapturable 74
    |   |-- GpuNotCheckpointed 75
    |   `-- GpuLost 76             the container was killed
    |-- RequestRefused (40-49)      nothing was changed: a person's request to the daemon
    |   |-- NoSuchSnapshot 40
    |   |-- SnapshotInUse 41
    |   |-- NoSuchPod 42
    |   |-- BadRequest 43
    |   |-- KeyRefused 44
    |   |-- NoSuchKey 45
    |   |-- NotQuarantined 46
    |   `-- NotRemoved 47
    |-- BadAnnotation 50            the container starts cold
    |-- BadManifest 51              the container starts cold
    |-- BadConfig 52                the daemon does not start; containers start cold
    `-- DaemonAway 60               nothing was changed

Lean: the swap path imports this module.
"""

from __future__ import annotations

import errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import ClassVar


class Effect:
    """The state of the pod after a failure. Every error class names exactly one."""

    COLD_START = "the container starts cold"
    KILLED = "the container was killed; kubelet restarts it cold"
    REFUSED_START = "the container does not start: its pod asked for no cold start"
    STILL_SERVING = "no snapshot was made; the source goes on serving"
    NOTHING_PUBLISHED = "no snapshot was made"
    HALF_REMOVED = "it is still there, or what is left of it goes when quickthawd starts again"
    NOTHING = "nothing was changed"


class Blame:
    """Whose fault a failed swap is, as far as the snapshot's quarantine is concerned."""

    CONTENT = "content"
    """The snapshot is not as the capture made it: every restore from it fails."""
    RESTORE = "restore"
    """Perhaps nobody can restore the snapshot: the failure counts when it happens in several pods.

    Never for a failure that a pod or its author can cause: two pods would take a snapshot from all.
    """
    OTHER = "other"
    """The node, the pod or the daemon: a retry may succeed, and nothing is counted."""


_NODE_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN,
    errno.EINTR, errno.EROFS,
}  # fmt: skip
"""The node lacks a resource, which says nothing about the files that were being read."""


class QuickthawError(Exception):
    """A failure with everything that its reader needs.

    what: the step that failed. about: the subject: the id of a container, a path, a key. why: the
    cause, in the words of the program that refused. do: what the reader can do about the failure.
    """

    effect: str = Effect.NOTHING
    exit_code: ClassVar[int] = 1
    blame: str = Blame.OTHER

    def __init__(self, what: str, *, about: str, why: str, do: str) -> None:
        super().__init__(what, about, why, do)
        self.what, self.about, self.why, self.do = what, about, why, do

    def __str__(self) -> str:
        """Returns one line, with the effect as it stands: a caller may set another effect."""
        return f"{self.what} [{self.about}]: {self.why}; {self.effect}. {self.do}"


class SwapFailed(QuickthawError):
    """A step of a swap failed before the deadline."""

    effect = Effect.COLD_START
    exit_code = 29
    blame = Blame.RESTORE


class SwapKilled(SwapFailed):
    """`quickthaw-runc` was killed in its swap, or stopped until long after the deadline."""

    effect = Effect.KILLED
    exit_code = 18
    blame = Blame.OTHER  # somebody deleted the pod meanwhile, or the node ran out of memory


class MemoryNotServed(SwapFailed):
    """The page server could not start, or ended before CRIU did."""

    exit_code = 16
    blame = Blame.OTHER


class MemoryLost(SwapFailed):
    """A page server could not fill in the missing memory of a restored container."""

    effect = Effect.KILLED
    exit_code = 17
    blame = Blame.OTHER


class NoTurn(SwapFailed):
    """The restore queue did not advance within restore_wait_s."""

    exit_code = 19
    blame = Blame.OTHER


class TicketUnreadable(SwapFailed):
    """The ticket is damaged, of a newer schema, or not root's alone."""

    exit_code = 20
    blame = Blame.OTHER


class CriuRestoreFailed(SwapFailed):
    """`runc restore` ended non-zero. `why` is the first Error line of restore.log."""

    exit_code = 21


class RootfsNotMountable(SwapFailed):
    """The overlay with the snapshot's diff could not be mounted."""

    exit_code = 22


class ShmNotFilled(SwapFailed):
    """/dev/shm could not be given its captured content."""

    exit_code = 23
    blame = Blame.OTHER  # /dev/shm is the pod's, and another container may have used it


class SnapshotNotWhole(SwapFailed):
    """The snapshot differs from its manifest or listings: see `shim.integrity.check`."""

    exit_code = 24
    blame = Blame.CONTENT


class SnapshotDoesNotFit(SwapFailed):
    """The new container's spec differs from the captured spec in something that grants power.

    codes: of the checks of the gate that refused.
    """

    exit_code = 25
    blame = Blame.OTHER
    codes: Sequence[str] = ()


class SwapTooLate(SwapFailed):
    """The deadline of the whole swap passed."""

    exit_code = 26


class NetworkNotReady(SwapFailed):
    """The network of the restored process could not be set up in the pod's network namespace."""

    exit_code = 27
    blame = Blame.OTHER  # the namespace is the pod's


class ResumeFailed(SwapFailed):
    """The resume call into the restored workload failed."""

    exit_code = 28
    blame = Blame.OTHER  # the pod's author chooses the call


class GpuNotRestored(SwapFailed):
    """The CUDA driver did not restore a process, or not in time. `why` has its own word."""

    exit_code = 15


class CaptureFailed(QuickthawError):
    """A step of a capture failed. The source was put back as it was."""

    effect = Effect.STILL_SERVING
    exit_code = 39


class NotCapturable(CaptureFailed):
    """The container has something that a snapshot cannot hold (a terminal, a running exec)."""

    exit_code = 30


class CriuDumpFailed(CaptureFailed):
    """`runc checkpoint` ended non-zero. `why` is the first Error line of dump.log."""

    exit_code = 31


class RootfsNotCopied(CaptureFailed):
    """The upperdir could not be copied."""

    exit_code = 32


class ShmNotCopied(CaptureFailed):
    """/dev/shm could not be copied."""

    exit_code = 33


class MemoryNotCopied(CaptureFailed):
    """The content of private memory could not be copied, or not every page that CRIU lists."""

    exit_code = 72


class GpuNotCapturable(CaptureFailed):
    """A checkpoint of the container's GPUs could succeed, and a restore never.

    codes: of the rows of `shim.gpu.support` that refused.
    """

    exit_code = 74
    codes: Sequence[str] = ()


class GpuNotCheckpointed(CaptureFailed):
    """The CUDA driver did not lock or checkpoint a process; all run again."""

    exit_code = 75


class GpuLost(CaptureFailed):
    """The CUDA driver did not give a process back: the container was killed."""

    effect = Effect.KILLED
    exit_code = 76


class NotFrozen(CaptureFailed):
    """The container's cgroup did not freeze in time."""

    exit_code = 34


class NeverReady(CaptureFailed):
    """The readiness condition was not met while the container ran."""

    exit_code = 35


class QuiesceFailed(CaptureFailed):
    """The quiesce call into the workload failed."""

    exit_code = 36


class NotPublished(CaptureFailed):
    """The finished snapshot could not be made durable and published."""

    exit_code = 37


class ContainerBusy(CaptureFailed):
    """A process of `exec` (a probe, a person) is in the container, and will soon end."""

    exit_code = 38


class NoRoom(CaptureFailed):
    """The snapshot would take more of the store or of the disk than the configuration allows."""

    exit_code = 70


class SnapshotTooBig(CaptureFailed):
    """The snapshot would be larger than the configuration allows."""

    exit_code = 71


class SourceHarmed(CaptureFailed):
    """While the source was captured, some of its processes were killed, or all of them ended."""

    effect = Effect.NOTHING_PUBLISHED
    exit_code = 73


def too_big(container: str, why: Exception) -> SnapshotTooBig:
    """Returns the error for more files, or longer names, than `shim.contract.limits` allows."""
    return SnapshotTooBig(
        "no snapshot of so many files", about=container, why=str(why),
        do="Keep such files in a volume, or remove them before the container is ready.",
    )  # fmt: skip


class RequestRefused(QuickthawError):
    """The daemon cannot do a request from the control socket."""

    exit_code = 49


class NoSuchSnapshot(RequestRefused):
    """No snapshot has this id, prefix or name."""

    exit_code = 40


class SnapshotInUse(RequestRefused):
    """Running containers have the snapshot's diff in their root file system."""

    exit_code = 41


class NoSuchPod(RequestRefused):
    """No running container is of this pod."""

    exit_code = 42


class BadRequest(RequestRefused):
    """The request is malformed."""

    exit_code = 43


class KeyRefused(RequestRefused):
    """A key, or the key directory, is damaged, of another kind, or not root's alone."""

    exit_code = 44


class NoSuchKey(RequestRefused):
    """No key of this node has this id, or several begin like it."""

    exit_code = 45


class NotRemoved(RequestRefused):
    """A snapshot could not be deleted, or not all of it."""

    effect = Effect.HALF_REMOVED
    exit_code = 47


class NotQuarantined(RequestRefused):
    """The snapshot that is to be released is not in quarantine."""

    exit_code = 46


class BadAnnotation(QuickthawError):
    """A `quickthaw.io/` annotation has a value that its row does not allow."""

    effect = Effect.COLD_START
    exit_code = 50


class BadManifest(QuickthawError):
    """A manifest is damaged or of a newer schema."""

    effect = Effect.COLD_START
    exit_code = 51
    blame = Blame.CONTENT


class BadConfig(QuickthawError):
    """A file of the configuration is not readable. The daemon does not start; pods start cold."""

    # packaging/systemd/quickthawd.service knows the number: systemd does not try again.
    exit_code = 52


class DaemonAway(QuickthawError):
    """Nothing answers on the control socket."""

    exit_code = 60


def blame_of(error: QuickthawError) -> str:
    """Returns a word of Blame for a swap that failed with `error`.

    The blame of the error's class; OTHER if an OSError that caused it says that the node lacks
    something.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NODE_ERRNOS:
            return Blame.OTHER
        cause = cause.__cause__
    return error.blame
