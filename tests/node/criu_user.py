"""Lets CRIU capture containers of other users on a machine where root lacks CAP_SYS_RESOURCE.

CRIU reads the resource limits of every process that it dumps. For that, prlimit(2) wants the
capability, or a caller whose real user and group are the process's: so CRIU gets this user and
group for a dump, while the effective ids and all capabilities stay root's. CRIU itself is
unchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shim.kernel import procfs
from tests.node.node import Node

CAP_SYS_RESOURCE: Final = 24
CRIU: Final = "/usr/sbin/criu"
MOVED: Final = "/usr/sbin/criu.moved"
SCRIPT: Final = f"""\
#!/usr/bin/python3 -ISE
import os, sys
with open(f"/proc/{{os.getppid()}}/cmdline", "rb") as file:
    dumping = b"checkpoint" in file.read().split(b"\\0")
if dumping:
    os.setresgid(GID, 0, 0)
    os.setresuid(UID, 0, 0)
os.execv("{MOVED}", ["criu", *sys.argv[1:]])
"""


def has_sys_resource() -> bool:
    """Returns whether root of this machine has CAP_SYS_RESOURCE."""
    bounding = int(procfs.status("self")["CapBnd"], 16)
    return bool(bounding >> CAP_SYS_RESOURCE & 1)


@contextmanager
def dumping(node: Node, uid: int, gid: int) -> Iterator[None]:
    """Lets the node's CRIU dump processes of this user inside of the `with`."""
    if has_sys_resource():
        yield
        return
    node.run(["criu", "check"])  # keeps facts of the kernel; nft refuses a real user
    node.path(CRIU).rename(node.path(MOVED))
    try:
        node.write(CRIU, SCRIPT.replace("GID", str(gid)).replace("UID", str(uid)))
        node.path(CRIU).chmod(0o755)
        yield
    finally:
        node.path(MOVED).rename(node.path(CRIU))
