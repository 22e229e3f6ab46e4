"""The gate of a capture with GPUs, on a page: what must not be checkpointed, because it could be a
checkpoint that succeeds and a restore that never does.

One row a reason: its code (stable: an error's, a column of `quickthaw explain`), what it looks at,
and what helps. All rows are applied, before the source is touched. Where a way knows what a process
has called, that counts (`Look.known`); else what can be seen from outside decides, and doubt
refuses. Pure; what is looked at is collected by `shim.gpu.look`. Sources: docs/gpu-facts.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

OLDEST_DRIVER = 570
"""The first major version whose libcuda has cuCheckpointProcessCheckpoint."""
_SPARE_BYTES = 64 << 20
_NCCL = {
    "NCCL_P2P_DISABLE": ("1",), "NCCL_CUMEM_ENABLE": ("0",), "NCCL_CUMEM_HOST_ENABLE": ("0",),
}  # fmt: skip
"""NCCL over shared memory of the host: proven to come back."""
_SOCKETS = {"NCCL_P2P_DISABLE": ("1",), "NCCL_SHM_DISABLE": ("1",)}
"""NCCL over sockets: proven, too."""
NCCL_REMEDY = "NCCL_P2P_DISABLE=1 NCCL_CUMEM_ENABLE=0 NCCL_CUMEM_HOST_ENABLE=0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One CUDA process. pid: the host's. gpus: on which it has a context, by UUID, with the bytes
    that it uses there. environment: at its start. address_room: bytes that its RLIMIT_AS leaves,
    None for no limit. known: what the way holds against it, see `shim.gpu.way`, None if the way
    does not know what it has called. moved: bytes that the way takes out of it.
    """

    pid: int
    gpus: Mapping[str, int]
    environment: Mapping[str, str]
    address_room: int | None = None
    known: Sequence[str] | None = None
    moved: int = 0

    @property
    def bytes(self) -> int:
        """On all GPUs together."""
        return sum(self.gpus.values())

    @property
    def staged(self) -> int:
        """Of these what the driver puts into memory of the process."""
        return max(0, self.bytes - self.moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """All that was seen of a container and its GPUs.

    driver: its version. gpus: the container's, as of `shim.kernel.nvml`; None if unreadable.
    processes: the CUDA processes. others: processes that have a GPU's device open and no context,
    in words. host_network: whether it is in the node's network. mps: signs of MPS. cgroup_room:
    bytes left in its memory cgroup, None for no limit. host_room: bytes that the node can still
    give.
    """

    driver: str
    gpus: Sequence[Mapping[str, object]] | None
    processes: Sequence[Process] = ()
    others: Sequence[str] = ()
    host_network: bool = False
    mps: Sequence[str] = ()
    cgroup_room: int | None = None
    host_room: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all processes on all GPUs: a snapshot has them."""
        return sum(each.bytes for each in self.processes)

    @property
    def staged(self) -> int:
        """Bytes that a checkpoint stages in memory of the processes."""
        return sum(each.staged for each in self.processes)


class Row:
    """One reason. by: why it refuses, empty when it does not. do: the remedy."""

    __slots__ = ("by", "code", "compares", "do")

    def __init__(self, code: str, compares: str, by: Callable[[Look], str], do: str) -> None:
        self.code, self.compares, self.by, self.do = code, compares, by, do

    def as_json(self, look: Look) -> dict[str, object]:
        """For programs; `why` is empty when the row has nothing against it."""
        why = self.by(look)
        return {
            "code": self.code, "compares": self.compares, "fits": not why, "why": why,
            "do": self.do if why else "",
        }  # fmt: skip


def findings(look: Look) -> list[dict[str, object]]:
    """Returns the finding of every row, in the order of the table."""
    return [row.as_json(look) for row in ROWS]


def unreadable(why: str) -> dict[str, object]:
    """The first row, where nothing could be looked at."""
    row = ROWS[0]
    return {"code": row.code, "compares": row.compares, "fits": False, "why": why, "do": row.do}


def _unreadable(look: Look) -> str:
    return "the GPUs of the node, or which of them are the container's" if look.gpus is None else ""


def _driver(look: Look) -> str:
    major = look.driver.partition(".")[0]
    if major.isdecimal() and int(major) >= OLDEST_DRIVER:
        return ""
    return f"the driver is {look.driver or 'unknown'}, {OLDEST_DRIVER} or later is needed"


def _mig(look: Look) -> str:
    return _named(look, "mig", "is split by MIG")


def _exclusive(look: Look) -> str:
    return _named(look, "exclusive", "is in an exclusive compute mode")


def _named(look: Look, field: str, says: str) -> str:
    found = [str(gpu.get("uuid")) for gpu in look.gpus or () if gpu.get(field)]
    return f"{', '.join(found)} {says}" if found else ""


def _mps(look: Look) -> str:
    return ", ".join(look.mps)


def _host_network(look: Look) -> str:
    return "the driver's socket would be there twice" if look.host_network else ""


def _others(look: Look) -> str:
    return ", ".join(look.others)


def _known(look: Look) -> str:
    return "; ".join(
        f"process {each.pid}: {why}" for each in look.processes for why in each.known or ()
    )


def _peers(look: Look) -> str:
    """Peer access needs contexts on two GPUs in one process."""
    found = [
        f"process {each.pid} uses {len(each.gpus)} GPUs"
        for each in look.processes
        if each.known is None and len(each.gpus) > 1
    ]
    return ", ".join(found)


def _sharing(look: Look) -> str:
    """Memory of one process in another: NCCL's transports, CUDA IPC."""
    if len(look.processes) < 2:
        return ""
    found = [
        str(each.pid)
        for each in look.processes
        if each.known is None and not _says(each, _NCCL) and not _says(each, _SOCKETS)
    ]
    if not found:
        return ""
    many = f"{len(look.processes)} CUDA processes may have memory of one another mapped"
    return f"{many}: {', '.join(found)} do not say otherwise"


def _says(process: Process, wanted: Mapping[str, Sequence[str]]) -> bool:
    return all(process.environment.get(name) in values for name, values in wanted.items())


def _room(look: Look) -> str:
    for room, where in ((look.cgroup_room, "the container's memory limit"),
                        (look.host_room, "the node's memory")):  # fmt: skip
        if room is not None and room < look.staged + _SPARE_BYTES:
            return f"{where} leaves {room} bytes, {look.staged} on the GPUs are to be staged"
    return ""


def _address_space(look: Look) -> str:
    found = [
        f"RLIMIT_AS of process {each.pid} leaves {each.address_room} bytes, {each.staged} are "
        "needed"
        for each in look.processes
        if each.address_room is not None and each.address_room < each.staged + _SPARE_BYTES
    ]
    return ", ".join(found)


ROWS: tuple[Row, ...] = (
    Row("gpu_unknown", "whether the GPUs can be read", _unreadable,
        "See the journal of quickthawd for the driver's word, and start it again."),
    Row("gpu_driver", "the driver's version", _driver, "Install driver 580 or later."),
    Row("gpu_mig", "MIG", _mig, "Use a GPU that is not split."),
    Row("gpu_exclusive", "compute mode", _exclusive, "Set it with `nvidia-smi -c DEFAULT`."),
    Row("gpu_mps", "MPS", _mps, "Run it without MPS: no CUDA_MPS_* variables, no MPS daemon."),
    Row("gpu_host_network", "whether it has a network of its own", _host_network,
        "Take hostNetwork out of the pod."),
    Row("gpu_devices_open", "processes that use a GPU without a context", _others,
        "Stop what only watches GPUs (NVML), or put it into a container of its own."),
    Row("gpu_calls", "what processes have called, where that is known", _known,
        f"For NCCL set {NCCL_REMEDY}; do not use peer access, managed memory or CUDA IPC."),
    Row("gpu_peers", "several GPUs in one process: peer access", _peers,
        "Use one process for each GPU with CUDA_VISIBLE_DEVICES, or the way `direct`, whose "
        "library sees whether peer access is on."),
    Row("gpu_sharing", "several CUDA processes: NCCL P2P and cuMem transports, CUDA IPC", _sharing,
        f"Set {NCCL_REMEDY} in the pod's environment (or NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1); "
        "do not share CUDA memory by IPC."),
    Row("gpu_host_memory", "room for what the driver stages", _room,
        "Raise the memory limit of the container by what it uses of its GPUs, or use the way "
        "`direct`."),
    Row("gpu_address_space", "RLIMIT_AS", _address_space, "Raise or remove the limit (ulimit -v)."),
)  # fmt: skip
"""All of them, in the order in which they are told."""
