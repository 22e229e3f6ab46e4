"""Program: make a test node's namespaces and mounts, then become the parent of the node's init.

`node` calls this program with a JSON argument (see `Plan`). The program and the init die with the
caller: the init is process 1 of a pid namespace, so that the kernel then kills everything in the
node, and the mount and network namespaces go with their last process. Writes the init's pid to
standard output; the init adds "up".
"""

import json
import os
import socket
import sys
from typing import TypedDict

# Runs by its path and isolated: nothing else names the directory of its neighbours.
sys.path.insert(0, os.path.abspath(f"{__file__}/../../.."))
from tests.node import kernel

NODES = ("null", "zero", "full", "random", "urandom", "tty", "kmsg", "fuse", "userfaultfd")


class Hierarchy(TypedDict):
    """A cgroup hierarchy to mount in the node."""

    version: int
    options: str
    mount_point: str


class Plan(TypedDict):
    """The caller's wishes. All paths are the host's."""

    parent_pid: int
    cgroups: list[str]
    homes: list[str]
    """The cgroups of processes after the cgroup namespace exists, whose root `cgroups` becomes."""
    hierarchies: list[Hierarchy]
    lower: str
    upper: str
    work: str
    merged: str
    binds: dict[str, str]
    """Directories that must not be on the node's overlay, by their path in the node."""
    hostname: str


def mount_root(plan: Plan) -> None:
    """Make the overlay over the base, and everything below it except the cgroups."""
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    root = plan["merged"]
    layers = f"lowerdir={plan['lower']},upperdir={plan['upper']},workdir={plan['work']}"
    kernel.mount("overlay", root, "overlay", options=layers)
    for inside, outside in plan["binds"].items():
        os.makedirs(root + inside, exist_ok=True)
        kernel.mount(outside, root + inside, "", kernel.MS_BIND)
    for kind, inside, flags, options in (
        ("proc", "/proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, ""),
        ("sysfs", "/sys", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, ""),
        ("tmpfs", "/run", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755"),
        ("tmpfs", "/dev", kernel.MS_NOSUID, "mode=755"),
    ):
        kernel.mount(kind, root + inside, kind, flags, options)
    make_dev(root + "/dev")


def make_dev(dev: str) -> None:
    """Make device nodes as the host has them, /dev/pts, /dev/shm and /dev/mqueue of the
    node's own.
    """
    for name in NODES:
        if os.path.exists(f"/dev/{name}"):
            like = os.stat(f"/dev/{name}")
            os.mknod(f"{dev}/{name}", like.st_mode, like.st_rdev)
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(f"{dev}/{name}")
    quiet = kernel.MS_NOSUID | kernel.MS_NOEXEC
    kernel.mount(
        "devpts", f"{dev}/pts", "devpts", quiet, "newinstance,ptmxmode=0666,mode=620,gid=5"
    )
    kernel.mount("shm", f"{dev}/shm", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777")
    kernel.mount("mqueue", f"{dev}/mqueue", "mqueue", quiet | kernel.MS_NODEV)
    os.symlink("pts/ptmx", f"{dev}/ptmx")
    os.symlink("/proc/self/fd", f"{dev}/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{dev}/{name}")


def mount_cgroups(plan: Plan) -> None:
    """Mount every hierarchy at the host's place; each mount shows only the node's part."""
    root = plan["merged"]
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    if all(each["mount_point"] != "/sys/fs/cgroup" for each in plan["hierarchies"]):
        kernel.mount("tmpfs", root + "/sys/fs/cgroup", "tmpfs", flags, "mode=755")
    for each in plan["hierarchies"]:
        at = root + each["mount_point"]
        os.makedirs(at, exist_ok=True)
        kind = "cgroup" if each["version"] == 1 else "cgroup2"
        kernel.mount(kind, at, kind, flags, each["options"])
        for alias in each["options"].split(",") if "," in each["options"] else ():
            if not alias.startswith(("none", "name=")):
                os.symlink(os.path.basename(at), f"{root}/sys/fs/cgroup/{alias}")


def become_init(plan: Plan) -> None:
    """Mount in the new namespaces, change root, run the init."""
    with open(os.path.dirname(os.path.abspath(__file__)) + "/init.py") as file:
        program = file.read()
    usual_mask = os.umask(0)
    mount_root(plan)
    os.umask(usual_mask)
    mount_cgroups(plan)
    socket.sethostname(plan["hostname"])
    os.makedirs(plan["merged"] + "/run/lock", exist_ok=True)
    kernel.pivot_root(plan["merged"])
    # systemd makes / shared, and CRI's mount propagation is defined over that.
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_SHARED)
    os.execv("/usr/bin/python3", ["node-init", "-ISE", "-c", program])


def main() -> int:
    """Returns when the node is gone."""
    plan: Plan = json.loads(sys.argv[1])
    kernel.die_with_parent(plan["parent_pid"])
    kernel.join_cgroups(plan["cgroups"])
    kernel.unshare(kernel.ALL_NAMESPACES)
    for path in plan["homes"]:
        os.makedirs(path, exist_ok=True)
    kernel.join_cgroups(plan["homes"])
    init_pid = os.fork()
    if init_pid == 0:
        # Seen from the new pid namespace the parent has no pid: no check against a lost race here.
        kernel.die_with_parent(0)
        become_init(plan)
    os.write(1, f"{init_pid}\n".encode())
    os.close(1)
    os.waitpid(init_pid, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
