"""The ways by name. Each is imported when it is used: a container without GPUs pays for none."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shim.gpu.helper import Spawn
    from shim.gpu.way import Way

DRIVER, DIRECT = "driver", "direct"


def named(
    name: str, spawn: Spawn, container: str, digests: Mapping[str, Sequence[str]] | None = None
) -> Way:
    """Raises ValueError for a way that this quickthaw does not know.

    spawn: how programs are started. digests: for a restore, of the chunks of the payload's files
    that nothing else vouches for.
    """
    if name == DRIVER:
        from shim.gpu.driverway import DriverWay

        return DriverWay()
    if name == DIRECT:
        from shim.gpu.direct.way import DirectWay

        return DirectWay(spawn, container, digests or {})
    raise ValueError(f"no such way to carry device memory: {name!r:.40}; upgrade quickthaw")


def of(pids: Iterable[int]) -> str:
    """The way for a container with these CUDA processes, by the host's numbers: `direct` when one
    of them has memory that our library can move. The driver carries the memory of the others in
    each way.
    """
    from shim.gpu.direct.session import has_library

    return DIRECT if any(map(has_library, pids)) else DRIVER


def lost(container: str, pids: Iterable[int], until: float) -> list[str]:
    """Returns in words which of these running processes lack device memory that a way had taken
    away, and that nobody has any more; empty for none.
    """
    with_library = [pid for pid in pids if of([pid]) == DIRECT]
    if not with_library:
        return []
    from shim.gpu.direct.way import away

    return away(container, with_library, until)
