"""Kernel calls to enter and leave namespaces. Standard library only.

Imported by `launch` and `enter`, which run as programs of their own.
"""

import ctypes
import os
import signal

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
ALL_NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
)
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SHARED = 1 << 20
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def unshare(flags: int) -> None:
    """Call unshare(2)."""
    _checked(libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, flags: int) -> None:
    """Call setns(2): `fd` is a namespace's file, or a pidfd for all that `flags` name."""
    _checked(libc.setns(ctypes.c_int(fd), ctypes.c_int(flags)), "setns")


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """Call mount(2)."""
    names = [os.fsencode(text) for text in (source, target, kind)]
    data = os.fsencode(options) if options else None
    _checked(libc.mount(*names, ctypes.c_ulong(flags), data), f"mount {kind or source} at {target}")


def pivot_root(new_root: str) -> None:
    """Make `new_root`, a mount point, the root of this mount namespace and drop the old root."""
    os.chdir(new_root)
    number = ctypes.c_long(SYS_PIVOT_ROOT[os.uname().machine])
    # The old root lies over the new root and is then taken off: no directory for it is needed.
    # Source: pivot_root(2), "pivot_root(".", ".")".
    _checked(libc.syscall(number, b".", b"."), f"pivot_root {new_root}")
    _checked(libc.umount2(b".", ctypes.c_int(MNT_DETACH)), "umount the old root")
    os.chdir("/")


def join_cgroups(paths: list[str]) -> None:
    """Move this process into the cgroups `paths`, a cgroup of each hierarchy."""
    for path in paths:
        with open(f"{path}/cgroup.procs", "w") as file:
            file.write("0")


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, or now if the parent has ended."""
    _checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)
