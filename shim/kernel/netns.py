"""Enters network namespaces by path, for good or for a moment. Lean."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct

from shim.kernel.fds import OwnedFd
from shim.kernel.namespaces import CLONE_NEWNET, setns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_SIOCGIFFLAGS, _IFF_UP = 0x8913, 1


def identity(path: str) -> list[int]:
    """Returns device and inode, which identify the namespace at `path` among all others."""
    found = os.stat(path)
    return [found.st_dev, found.st_ino]


def enter(path: str, known: list[int] | None = None) -> None:
    """Enter the namespace at `path` for good: for programs that do nothing else.

    known: the expected `identity`, if the path has a pid that may belong to another process by now.
    Raises OSError; ESTALE when the namespace is another.
    """
    with OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as there:
        if known is not None and identity(f"/proc/self/fd/{there.fileno()}") != known:
            raise OSError(errno.ESTALE, "another network namespace has this path by now", path)
        setns(there.fileno(), CLONE_NEWNET)


@contextlib.contextmanager
def entered(path: str) -> Iterator[None]:
    """Be in the namespace at `path` for a moment. Raises OSError.

    Only the calling thread enters: a process with an event loop or other threads must not do this.
    """
    with OwnedFd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as here:
        enter(path)
        try:
            yield
        finally:
            setns(here.fileno(), CLONE_NEWNET)


def loopback_is_up(path: str) -> bool:
    """Whether `lo` is up in the namespace at `path`. Source: netdevice(7), SIOCGIFFLAGS."""
    with entered(path), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0))
    return bool(struct.unpack("16sH14x", answer)[1] & _IFF_UP)
