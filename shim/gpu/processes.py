"""Which processes of a container use a GPU, seen from outside of it. Lean.

By the host's numbers, so that PID namespaces of the container's own hide nobody.
"""

from __future__ import annotations

import contextlib
import os

from shim.kernel import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_LIBRARY = b"/libcuda.so"
_DEVICES = ("/dev/nvidia", "/dev/dxg")


def candidates(pids: Iterable[int]) -> list[int]:
    """Those with the CUDA driver's library mapped: they may have a context, now or soon."""
    return [pid for pid in pids if _maps(pid, _LIBRARY)]


def with_library(pids: Iterable[int], name: bytes) -> list[int]:
    """Those with a library mapped whose path has `name`, as `/libnccl.so`."""
    return [pid for pid in pids if _maps(pid, name)]


def _maps(pid: int, name: bytes) -> bool:
    try:
        return procfs.has_mapped(pid, name)
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_devices(pid: int) -> list[str]:
    """The GPU device files that the process has open, each once."""
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in procfs.descriptors(pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                path = os.readlink(f"/proc/{pid}/fd/{entry}")
                if path.startswith(_DEVICES):
                    found.add(path)
    return sorted(found)


def environment(pid: int) -> dict[str, str]:
    """Returns the environment that the process was started with; empty when it is gone."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: value for name, mark, value in (each.partition("=") for each in entries) if mark}


def exists(pid: int, started: int) -> bool:
    """Whether this very process is there, and not another that has got its number."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return procfs.start_ticks(pid) == started
    return False


def numbers_within(init: int, pids: Iterable[int]) -> list[int]:
    """The numbers that these have in the PID namespace of `init`. Raises OSError."""
    depth = len(procfs.numbers(init)) - 1
    return [procfs.numbers(pid)[depth] for pid in pids]


def numbered_within(init: int, pids: Iterable[int], wanted: Iterable[int]) -> list[int]:
    """The reverse: of `pids` those with the `wanted` numbers, in that order.

    Raises ProcessLookupError when one is not there.
    """
    depth = len(procfs.numbers(init)) - 1
    found: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            has = procfs.numbers(pid)
            if len(has) > depth:
                found[has[depth]] = pid
    missing = [number for number in wanted if number not in found]
    if missing:
        raise ProcessLookupError(f"no process {missing} in the container")
    return [found[number] for number in wanted]
