"""Looks at all that the captured processes have open: a walk through /proc while they are frozen.

The walk finds for each file the facts that CRIU's images lack, owner, device and inode. The checks
name, before CRIU starts, every descriptor that no snapshot can hold. Descriptors in the queue of a
socket are in no directory of /proc; CRIU's images list them, and `check_images` looks at them.
Sources: proc_pid_fd(5), proc_pid_map_files(5), namespaces(7).
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shim.contract.errors import NotCapturable
from shim.contract.limits import MAX_OPENED
from shim.criu import images, openfiles
from shim.gate import descriptors, volumes
from shim.gate.kinds import Abilities
from shim.gate.network import open_to_all
from shim.kernel import procfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from shim.kernel.stopping import Stop
    from shim.oci.spec import Spec
    from shim.source.source import Source

_ANONYMOUS = "anon_inode:"
_NAMESPACE = re.compile(r"(\w+):\[\d+\]")
_NO_NAMESPACES = ("pipe", "socket")
_MANY = ("pipe:[", "socket:[")
_ACCESS = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "rw"}
GONE = " (deleted)"
"""How the kernel ends the name of a file that was removed."""
_DO = "Close it before the container is ready, or give the pod what it takes."
_CORE = "/proc/sys/net/core"


@dataclass(frozen=True, slots=True)
class Opened:
    """A descriptor, mapping, working directory or root. name: from /proc.

    number: of the process in the container.
    """

    pid: int
    number: int
    link: str
    name: str
    status: os.stat_result


def look(source: Source, pids: Iterable[int], stop: Stop) -> list[Opened]:
    """All that they have and that is not common. Call it while they are frozen.

    Common is what a snapshot can hold in any number, and nobody asks for: pipes, sockets, files of
    the container's own that have their name. One that has died meanwhile has nothing. Raises
    NotCapturable for more than a snapshot may have, Stopped.
    """
    found: list[Opened] = []
    is_in_volume = volumes.finder(source.spec)
    for pid in pids:
        for each in _of_process(pid):
            stop.check()
            if _is_common(each, is_in_volume):
                continue
            found.append(each)
            if len(found) > MAX_OPENED:
                raise _refused(
                    source, f"it has more than {MAX_OPENED} descriptors and mappings of devices, "
                    "files in volumes, deleted files and files without a name",
                )  # fmt: skip
    return found


def _is_common(opened: Opened, is_in_volume: Callable[[str], bool]) -> bool:
    name, mode = opened.name, opened.status.st_mode
    if not name.startswith("/"):
        return name.startswith(_MANY)
    is_own = (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and not name.endswith(GONE)
    return is_own and not is_in_volume(name)


def lost_names(opened: Iterable[Opened]) -> dict[str, int]:
    """Returns inode numbers by the name that is gone, relative to the container's root.

    Only for files of which other names are left: see `shim.source.deleted`.
    """
    return {
        each.name.removesuffix(GONE).lstrip("/"): each.status.st_ino
        for each in opened
        if each.name.endswith(GONE) and each.status.st_nlink
    }


def check(source: Source, opened: Iterable[Opened], has: int) -> None:
    """Raises NotCapturable with the first descriptor that the container's spec cannot have made.

    has: the capabilities that the spec reaches.
    """
    own = set(_namespaces(source.pid))
    for each in opened:
        if why := _excess(source.spec, each, has, own):
            raise _refused(source, f"process {each.pid} has {why} at {each.link}")


def check_images(
    source: Source,
    directory: Path,
    opened: Iterable[Opened],
    has: int,
    network: Mapping[str, Any],
) -> dict[str, object]:
    """Check all descriptors that the restore would make. Returns the fact `descriptors`.

    directory: CRIU's images. network: of the manifest. Raises NotCapturable; DamagedImage, OSError.
    """
    devices = {each.name for each in opened if _is_device(each.status.st_mode)}
    for ghost in images.ghosts(directory):
        # Of two that had one name, nobody would know which one was looked at.
        if _is_device(ghost.mode):
            raise _refused(source, f"a device is open whose name was removed: {ghost.path}")
    for file in openfiles.named_files(directory):
        if _is_device(file.mode) and file.path not in devices:
            why = "a device that only the queue of a socket holds, or whose name was removed"
            raise _refused(source, f"{why}: {file.path}")
    sysctls = network.get("sysctls") or {}
    tcp = descriptors.Tcp(_third(sysctls, "tcp_wmem"), _third(sysctls, "tcp_rmem"))
    why = descriptors.excess(
        openfiles.open_files(directory), has, bounds(sysctls), tcp,
        openfiles.network_namespace(directory),
    )  # fmt: skip
    if why:
        raise _refused(source, f"a process has a descriptor beyond its spec: {why}")
    return descriptors.by_network(openfiles.open_files(directory), has)


def bounds(sysctls: Mapping[str, str]) -> Abilities:
    """Returns this node's limits for everybody. sysctls: of the pod's network. Raises OSError."""
    first_port, pings = open_to_all(sysctls)
    return Abilities(
        sndbuf=max(2 * _core("wmem_max"), _core("wmem_default")),
        rcvbuf=max(2 * _core("rmem_max"), _core("rmem_default")),
        first_port=first_port,
        pings=pings,
    )


def _refused(source: Source, why: str) -> NotCapturable:
    return NotCapturable("cannot capture", about=source.container, why=why, do=_DO)


def _excess(spec: Spec, opened: Opened, has: int, own: set[str]) -> str:
    mode, name = opened.status.st_mode, opened.name
    if name.startswith(_ANONYMOUS):
        kind = name.removeprefix(_ANONYMOUS)
        needs = descriptors.anonymous(kind)
        return "" if descriptors.suffices(has, needs) else f"{kind}, {descriptors.told(needs)},"
    if (found := _NAMESPACE.fullmatch(name)) and found[1] not in _NO_NAMESPACES:
        return "" if name in own else f"a namespace that is not its own, {name},"
    if _is_device(mode):
        number = os.major(opened.status.st_rdev), os.minor(opened.status.st_rdev)
        kind = "c" if stat.S_ISCHR(mode) else "b"
        if not descriptors.opens_device(spec, kind, number, _access(opened)):
            return f"device {kind} {number[0]}:{number[1]} ({name}), which its spec does not give,"
    return ""


def _access(opened: Opened) -> str:
    """Returns the access mode of a device. A mapped device was open for reading at least.

    The link of a mapping leads to the device itself, which we must not open: reading `/dev/zero`
    never ends.
    """
    directory, fd = os.path.split(opened.link)
    if os.path.basename(directory) != "fd":
        return "r"
    try:
        flags = int(procfs.fdinfo(opened.pid, fd)["flags"], 8)
    except OSError:
        return "r"
    return "" if flags & os.O_PATH else _ACCESS.get(flags & os.O_ACCMODE, "rw")


def _is_device(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _namespaces(pid: int) -> Iterator[str]:
    for name in os.listdir(f"/proc/{pid}/ns"):
        yield os.readlink(f"/proc/{pid}/ns/{name}")


def links(pid: int) -> Iterator[str]:
    """All that leads to what a process has open or mapped, or is in."""
    for directory, names in (
        (f"/proc/{pid}/fd", procfs.descriptors(pid)),
        (f"/proc/{pid}/map_files", procfs.map_files(pid)),
    ):
        with contextlib.suppress(OSError):
            yield from (f"{directory}/{name}" for name in names)
    yield from (f"/proc/{pid}/{name}" for name in ("cwd", "root"))


def _of_process(pid: int) -> Iterator[Opened]:
    try:
        number = procfs.numbers(pid)[-1]
    except OSError:
        return
    for link in links(pid):
        try:
            yield Opened(pid, number, link, os.readlink(link), os.stat(link))
        except OSError:
            continue  # died, or a file without a path


def _third(sysctls: Mapping[str, str], name: str) -> int:
    return int((sysctls.get(f"net.ipv4.{name}") or "0 0 0").split()[2])


def _core(name: str) -> int:
    with open(f"{_CORE}/{name}") as file:
        return int(file.read())
