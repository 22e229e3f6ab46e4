"""Answers two socket options that old CRIU asks every socket for, on a kernel that refuses them.

Since Linux 6.16 getsockopt(SO_PASSCRED) and (SO_PASSSEC) fail with EOPNOTSUPP on sockets that are
not AF_UNIX or AF_NETLINK, and CRIU before 4.2 then fails the dump of every TCP socket. For the time
of a dump, a BPF program on the container's cgroup turns this refusal into "off", the answer of
older kernels. A restore does not ask for an option that was off.

We use no seccomp filter around CRIU: under a filter the kernel refuses PTRACE_SECCOMP_GET_FILTER,
and CRIU could dump no container that has a seccomp profile. T2.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

from shim.kernel import libc, procfs
from shim.kernel.fds import OwnedFd
from shim.kernel.mounts import read_mounts

if TYPE_CHECKING:
    from collections.abc import Iterator

_NR_BPF: Final = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _LINK_CREATE = 5, 28
_TYPE_CGROUP_SOCKOPT, _ATTACH_GETSOCKOPT = 25, 21
_SO_PASSSEC = 34

# Fields of the program's context. Source: linux/bpf.h, struct bpf_sockopt.
_LEVEL, _OPTNAME, _RETVAL = 24, 28, 36


def _instruction(code: int, registers: int, offset: int = 0, immediate: int = 0) -> bytes:
    """Returns a BPF instruction. registers: the destination, plus 16 times the source.

    Source: the kernel's BPF ISA.
    """
    return struct.pack("<BBhi", code, registers, offset, immediate)


_R0, _R2, _R2_FROM_R1, _R1 = 0, 2, 0x12, 1
_LOAD_WORD, _STORE_WORD, _SET, _EXIT = 0x61, 0x62, 0xB7, 0x95
_IF_EQUAL, _IF_DIFFERENT, _IF_DIFFERENT_32 = 0x15, 0x55, 0x56

_PROGRAM: Final = (
    _instruction(_LOAD_WORD, _R2_FROM_R1, _LEVEL),
    _instruction(_IF_DIFFERENT, _R2, 6, socket.SOL_SOCKET),
    _instruction(_LOAD_WORD, _R2_FROM_R1, _OPTNAME),
    _instruction(_IF_EQUAL, _R2, 1, socket.SO_PASSCRED),
    _instruction(_IF_DIFFERENT, _R2, 3, _SO_PASSSEC),
    _instruction(_LOAD_WORD, _R2_FROM_R1, _RETVAL),
    _instruction(_IF_DIFFERENT_32, _R2, 1, -errno.EOPNOTSUPP),
    # Success; the kernel then copies its zeroed buffer to the caller.
    _instruction(_STORE_WORD, _R1, _RETVAL, 0),
    _instruction(_SET, _R0, 0, 1),
    _instruction(_EXIT, _R0),
)


def kernel_refuses() -> bool:
    """Whether this kernel refuses SO_PASSCRED on a TCP socket. Raises OSError for other errors."""
    with socket.socket() as probe:
        try:
            probe.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return True
            raise
    return False


@contextlib.contextmanager
def answered(pid: int) -> Iterator[str]:
    """Within the `with`, sockets of the cgroup of `pid` answer as they did before Linux 6.16.

    Does nothing where the kernel does not refuse. Yields the empty string, or the reason why the
    program cannot be attached: no exception, because only old CRIU with such a socket needs the
    program. The kernel detaches the program with our last descriptor of it, so a kill leaves
    nothing.
    """
    with contextlib.ExitStack() as held:
        why = ""
        try:
            if kernel_refuses():
                held.enter_context(attach(unified_cgroup(pid)))
        except (OSError, ValueError) as error:
            why = f"getsockopt(SO_PASSCRED) cannot be answered for CRIU before 4.2: {error}"
        yield why


def attach(cgroup: str) -> OwnedFd:
    """Attach the program to the sockets made in `cgroup` (a directory of cgroup v2) and beneath.

    Ends when the descriptor is closed. Raises OSError; ValueError on an unknown architecture.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with OwnedFd(os.open(cgroup, flags)) as target, OwnedFd(_load()) as program:
        attributes = (program.fileno(), target.fileno(), _ATTACH_GETSOCKOPT, 0)
        return OwnedFd(_bpf(_LINK_CREATE, struct.pack("=IIII", *attributes), "link to cgroup"))


def unified_cgroup(pid: int) -> str:
    """Returns the cgroup v2 directory of `pid`. Raises OSError; ValueError when none is mounted."""
    path = next((path for controllers, path in procfs.cgroups(pid) if not controllers), None)
    for mount in read_mounts():
        root = "" if mount.root == "/" else mount.root
        inside = path is not None and (path == root or path.startswith(f"{root}/"))
        if path is not None and inside and mount.fstype == "cgroup2":
            directory = mount.target + path[len(root) :]
            if os.path.exists(f"{directory}/cgroup.procs"):
                return directory
    raise ValueError(f"no cgroup v2 is mounted for process {pid}")


def _load() -> int:
    code = b"".join(_PROGRAM)
    text, name = ctypes.create_string_buffer(code, len(code)), b"quickthaw"
    # The program calls no helper of the kernel, so any license will do.
    license_text = ctypes.create_string_buffer(b"Apache-2.0")
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        _TYPE_CGROUP_SOCKOPT, len(_PROGRAM), ctypes.addressof(text),
        ctypes.addressof(license_text), 0, 0, 0, 0, 0, name, 0, _ATTACH_GETSOCKOPT,
    )  # fmt: skip
    return _bpf(_PROG_LOAD, attributes, "load")


def _bpf(command: int, attributes: bytes, about: str) -> int:
    machine = os.uname().machine
    if machine not in _NR_BPF:
        raise ValueError(f"bpf(2) has no known number on {machine}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    return libc.syscall(_NR_BPF[machine], command, buffer, len(attributes), about=f"bpf {about}")
