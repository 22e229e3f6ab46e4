"""Network namespaces by path: going in, coming back, a look without netlink. Lean."""

from __future__ import annotations

import contextlib
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


def enter(path: str) -> None:
    """Enter the namespace at `path` for good: for programs that do nothing else."""
    with OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as there:
        setns(there.fileno(), CLONE_NEWNET)


@contextlib.contextmanager
def entered(path: str) -> Iterator[None]:
    """Be in the namespace at `path` for a moment. Raises OSError.

    Only the calling thread is: a process with an event loop or other threads must not do this.
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
