"""The device files of GPUs in a restored container: CRIU brings those of the captured one. Lean.

A container's /dev is a tmpfs, whose content is process state for CRIU. Where the new pod was given
other GPUs, the files of the captured ones are taken away and its own are made, before the driver
opens them. The device cgroup says what a process may open, and it is the new pod's in any case.
"""

from __future__ import annotations

import contextlib
import os
import stat

from shim.gate.gpudevices import DEVICE
from shim.kernel import survivors
from shim.kernel.beneath import open_beneath
from shim.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from shim.oci.spec import Spec

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_MODE = 0o666


def provide(init: int, spec: Spec, container: str) -> None:
    """Have /dev of the container whose first process is `init` hold the GPUs of `spec`, and only
    those. Raises OSError.
    """
    wanted = {
        os.path.basename(str(device["path"])): device
        for device in spec.devices
        if _is_gpu(str(device.get("path")))
    }
    with contextlib.ExitStack() as held:
        root = held.enter_context(OwnedFd(os.open(f"/proc/{init}/root", _DIRECTORY | os.O_CLOEXEC)))
        if not survivors.is_member(init, container):  # its number may be another's by now
            raise ProcessLookupError(f"process {init} of the container has ended")
        dev = held.enter_context(open_beneath(root.fileno(), "dev", _DIRECTORY)).fileno()
        there = {name for name in os.listdir(dev) if _is_gpu(f"/dev/{name}")}
        for name in there:
            if name not in wanted or not _is(dev, name, wanted[name]):
                os.unlink(name, dir_fd=dev)
        for name, device in wanted.items():
            if not _is(dev, name, device):
                _make(dev, name, device)


def _is_gpu(path: str) -> bool:
    number = path.removeprefix(DEVICE)
    return number != path and number.isascii() and number.isdecimal()


def _number(device: Mapping[str, Any]) -> int:
    return os.makedev(int(device["major"]), int(device["minor"]))


def _is(dev: int, name: str, device: Mapping[str, Any]) -> bool:
    try:
        status = os.stat(name, dir_fd=dev, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == _number(device)


def _make(dev: int, name: str, device: Mapping[str, Any]) -> None:
    mode = device.get("fileMode")
    with _no_umask():
        kind = stat.S_IFCHR | (mode & 0o777 if isinstance(mode, int) else _MODE)
        os.mknod(name, kind, _number(device), dir_fd=dev)
    owner = int(device.get("uid") or 0), int(device.get("gid") or 0)
    os.chown(name, *owner, dir_fd=dev, follow_symlinks=False)


@contextlib.contextmanager
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)
