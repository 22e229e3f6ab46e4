"""Reads what a process can see of itself and of its container, from /proc as it is now."""

from __future__ import annotations

import os
import resource
import socket
import struct
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .serving import Json

_STATUS: Final = frozenset(
    {
        *("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters"),
        *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
        *("Threads", "NSpid", "SigIgn", "SigCgt", "Cpus_allowed_list"),
    }
)
_LIMITS: Final = [name for name in dir(resource) if name.startswith("RLIMIT_")]


def text_of(path: str) -> str | None:
    """Returns a file's content, or None when the file cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def status_fields(status: str) -> dict[str, str]:
    """Returns the fields of /proc/PID/status that tell what a process may do."""
    pairs = (line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {name: " ".join(value.split()) for name, value in pairs if name in _STATUS}


def who() -> Json:
    """Returns credentials and confinement; `status` has the kernel's names."""
    return {
        "pid": os.getpid(),
        "uid": os.getuid(),
        "gid": os.getgid(),
        "groups": os.getgroups(),
        "cwd": os.getcwd(),
        "umask": (text_of("/proc/self/status") or "").partition("Umask:")[2].split()[0],
        "status": status_fields(text_of("/proc/self/status") or ""),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS},
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in _namespaces()},
        "cgroup": text_of("/proc/self/cgroup"),
        "apparmor": text_of("/proc/self/attr/current"),
        "oom_score_adj": text_of("/proc/self/oom_score_adj"),
        "python": sys.version.split()[0],
    }


def _namespaces() -> list[str]:
    return sorted(os.listdir("/proc/self/ns"))


def environment() -> Json:
    """Returns the environment at the start (from /proc), and as the process sees it."""
    return {
        "environ": dict(os.environ),
        "started_with": (text_of("/proc/self/environ") or "").split("\0")[:-1],
        "argv": (text_of("/proc/self/cmdline") or "").split("\0")[:-1],
    }


def mounts() -> list[Json]:
    """Returns destination, type, source and options of every mount and file system, in order."""
    rows: list[Json] = []
    for line in (text_of("/proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, source, whole) = before.split(), after.split()
        rows.append(
            {
                "destination": fields[4], "type": kind, "source": source, "options": fields[5],
                "super_options": whole,
            }
        )  # fmt: skip
    return rows


def local_ipv4(fib_trie: str) -> list[str]:
    """Returns the local unicast addresses in /proc/net/fib_trie, each once, in order."""
    found: dict[str, None] = {}
    address = ""
    for line in fib_trie.splitlines():
        words = line.split()
        if words[:1] == ["|--"]:
            address = words[1]
        elif words[:2] == ["/32", "host"] and words[2:] == ["LOCAL"]:
            found[address] = None
    return list(found)


def local_ipv6(if_inet6: str) -> list[str]:
    """Returns the addresses in /proc/net/if_inet6, in the usual notation."""
    rows = (line.split()[0] for line in if_inet6.splitlines() if line.strip())
    return [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row)) for row in rows]


def default_gateway(route: str) -> str | None:
    """Returns the IPv4 default gateway in /proc/net/route."""
    for line in route.splitlines()[1:]:
        _, destination, gateway, *_ = line.split()
        if destination == "00000000":
            return socket.inet_ntoa(struct.pack("=L", int(gateway, 16)))
    return None


def listeners() -> list[str]:
    """Returns the listening TCP sockets of this network namespace, as ADDRESS@PORT."""
    found = []
    for family, path in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in (text_of(f"/proc/net/{path}") or "").splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A":
                host, port = local.split(":")
                # Four-byte words in the order of the machine.
                words = struct.unpack(f">{len(host) // 8}L", bytes.fromhex(host))
                raw = struct.pack(f"={len(words)}L", *words)
                found.append(f"{socket.inet_ntop(family, raw)}@{int(port, 16)}")
    return sorted(found)


def own_address() -> str:
    """Returns the pod's first address that is not loopback. Raises OSError when there is none."""
    for address in local_ipv4(text_of("/proc/net/fib_trie") or ""):
        if not address.startswith("127."):
            return address
    raise OSError(99, "this network namespace has no address but loopback")


def network() -> Json:
    """Returns names and addresses as they are at this moment."""
    return {
        "hostname": socket.gethostname(),
        "ipv4": local_ipv4(text_of("/proc/net/fib_trie") or ""),
        "ipv6": local_ipv6(text_of("/proc/net/if_inet6") or ""),
        "gateway": default_gateway(text_of("/proc/net/route") or ""),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "listeners": listeners(),
        "resolv_conf": text_of("/etc/resolv.conf"),
        "hosts": text_of("/etc/hosts"),
        "etc_hostname": text_of("/etc/hostname"),
    }
