"""The kinds of open descriptors on a page: the capability that a process needs to make each.

CRIU makes every descriptor of a captured process again, with root's power, no matter who made it
first: a neighbour can have passed it over a UNIX socket (SCM_RIGHTS). So a capture takes a
descriptor only when the container's own spec could have made it. The rows are about the fields of
CRIU's images, because those fields, and nothing else, come back: TCP_REPAIR, IP_TRANSPARENT or a
locked filter do not. A kind, a socket option or a field without a row is refused.
`shim.gate.descriptors` applies the table.

Sources: CRIU, images/*.proto; capabilities(7), socket(7), ip(7), packet(7), netlink(7); Linux,
net/core/sock.c, net/netlink/af_netlink.c, fs/fcntl.c. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Value = int | bytes
    Body = Mapping[int, list[Value]]
    Needs = tuple[str, ...]
    Rule = Callable[[int, "Abilities"], Needs]

ANYBODY: Final[Needs] = ()
"""No capability is needed."""
NOBODY: Final[Needs] = ("",)
"""No capability suffices: no snapshot can hold the descriptor, or its power is not known."""
ADMIN: Final[Needs] = ("CAP_NET_ADMIN",)
RAW: Final[Needs] = ("CAP_NET_RAW",)
PORTS: Final[Needs] = ("CAP_NET_BIND_SERVICE",)
LOW_PORTS: Final = 1024
"""A port below this may take PORTS; the pod's network can set another limit."""
PINGS: Final = (1, 58)
"""IPPROTO_ICMP and IPPROTO_ICMPV6, with SOCK_DGRAM."""
RAW_OR_ADMIN: Final[Needs] = ("CAP_NET_ADMIN", "CAP_NET_RAW")


@dataclass(frozen=True, slots=True)
class Abilities:
    """The abilities of a process without power on this node, and in the pod's network namespace.

    sndbuf, rcvbuf: bytes of a socket's buffers at most. first_port: the lowest port that everybody
    may bind. pings: whether everybody may send ICMP echo requests.
    """

    sndbuf: int
    rcvbuf: int
    first_port: int
    pings: bool


@dataclass(frozen=True, slots=True)
class Field:
    """A field of an image. rule: the needs of its value. inner: the table of its own fields."""

    name: str
    rule: Rule | None = None
    inner: Mapping[int, Field] | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of descriptor. at: the field of the file's entry that describes it.

    needs: of the kind itself. fields: the allowed fields; None: the gate does not look at fields.
    """

    name: str
    at: int
    needs: Needs = ANYBODY
    fields: Mapping[int, Field] | None = None


def _if_set(needs: Needs) -> Rule:
    return lambda value, _bounds: needs if value else ANYBODY


def _priority(value: int, _bounds: Abilities) -> Needs:
    return ANYBODY if 0 <= value <= 6 else RAW_OR_ADMIN


def _sndbuf(value: int, bounds: Abilities) -> Needs:
    return ADMIN if value > bounds.sndbuf else ANYBODY


def _rcvbuf(value: int, bounds: Abilities) -> Needs:
    return ADMIN if value > bounds.rcvbuf else ANYBODY


def _port(value: int, bounds: Abilities) -> Needs:
    return PORTS if 0 < value < bounds.first_port else ANYBODY


def _socket_type(value: int, _bounds: Abilities) -> Needs:
    return {1: ANYBODY, 2: ANYBODY, 3: RAW}.get(value, NOBODY)


def _ip_protocol(value: int, bounds: Abilities) -> Needs:
    if value in PINGS:  # or a raw socket, to which the rule of its type applies
        return ANYBODY if bounds.pings else RAW
    return ANYBODY if value in (0, 6, 17, 136) else RAW  # TCP, UDP, UDP-Lite


def _unix_type(value: int, _bounds: Abilities) -> Needs:
    return ANYBODY if value in (1, 2, 5) else NOBODY


def _netlink(value: int, _bounds: Abilities) -> Needs:
    return NETLINK.get(value, ("", NOBODY))[1]


def _clock(value: int, _bounds: Abilities) -> Needs:
    return ("CAP_WAKE_ALARM",) if value in (8, 9) else ANYBODY  # CLOCK_*_ALARM


NETLINK: Final[Mapping[int, tuple[str, Needs]]] = {
    0: ("NETLINK_ROUTE", ANYBODY),
    2: ("NETLINK_USERSOCK", ANYBODY),
    4: ("NETLINK_SOCK_DIAG", ANYBODY),
    5: ("NETLINK_NFLOG", ADMIN),
    6: ("NETLINK_XFRM", ADMIN),
    7: ("NETLINK_SELINUX", ANYBODY),
    9: ("NETLINK_AUDIT", ("CAP_AUDIT_READ", "CAP_AUDIT_CONTROL", "CAP_AUDIT_WRITE")),
    10: ("NETLINK_FIB_LOOKUP", ANYBODY),
    11: ("NETLINK_CONNECTOR", ADMIN),
    12: ("NETLINK_NETFILTER", ANYBODY),
    15: ("NETLINK_KOBJECT_UEVENT", ANYBODY),
    16: ("NETLINK_GENERIC", ANYBODY),
    21: ("NETLINK_CRYPTO", ANYBODY),
}
"""Needs for opening a socket and sending by it. The kernel checks the sender of each request."""
OPEN_GROUPS: Final = {0, 7, 15}
"""The protocols whose multicast groups everybody may join. Others: CAP_NET_ADMIN."""

_OWNER = Field("F_SETOWN")
SOCKET_OPTIONS: Final[Mapping[int, Field]] = {
    1: Field("SO_SNDBUF", _sndbuf), 2: Field("SO_RCVBUF", _rcvbuf),
    3: Field("SO_SNDTIMEO"), 4: Field("SO_SNDTIMEO"), 5: Field("SO_RCVTIMEO"),
    6: Field("SO_RCVTIMEO"), 7: Field("SO_REUSEADDR"), 8: Field("SO_PRIORITY", _priority),
    9: Field("SO_RCVLOWAT"), 10: Field("SO_MARK", _if_set(RAW_OR_ADMIN)),
    11: Field("SO_PASSCRED"), 12: Field("SO_PASSSEC"), 13: Field("SO_DONTROUTE"),
    14: Field("SO_NO_CHECK"),
    15: Field("SO_BINDTODEVICE"),  # everybody's since Linux 5.7
    16: Field("SO_ATTACH_FILTER"),  # classic filters only: it drops what the socket would get
    17: Field("SO_REUSEPORT"), 18: Field("SO_BROADCAST"), 19: Field("SO_KEEPALIVE"),
    20: Field("TCP_KEEPCNT"), 21: Field("TCP_KEEPIDLE"), 22: Field("TCP_KEEPINTVL"),
    23: Field("SO_OOBINLINE"), 24: Field("SO_LINGER"), 25: Field("SO_BUF_LOCK"),
}  # fmt: skip
_OPTIONS = Field("socket options", inner=SOCKET_OPTIONS)
RAW_IP_OPTIONS: Final[Mapping[int, Field]] = {  # of raw sockets alone
    1: Field("IP_HDRINCL"), 2: Field("IP_NODEFRAG"), 3: Field("IPV6_CHECKSUM"),
    4: Field("ICMP_FILTER"),
}  # fmt: skip
IP_OPTIONS: Final[Mapping[int, Field]] = {
    1: Field("IP_FREEBIND"), 4: Field("raw IP options", inner=RAW_IP_OPTIONS),
    5: Field("IP_PKTINFO"), 6: Field("IP_TOS"), 7: Field("IP_TTL"),
}  # fmt: skip
TCP_OPTIONS: Final[Mapping[int, Field]] = {
    1: Field("TCP_CORK"), 2: Field("TCP_NODELAY"), 3: Field("TCP_KEEPCNT"),
    4: Field("TCP_KEEPIDLE"), 5: Field("TCP_KEEPINTVL"),
}  # fmt: skip
INET: Final[Mapping[int, Field]] = {
    1: Field("id"), 2: Field("inode"), 3: Field("family"), 4: Field("type", _socket_type),
    5: Field("protocol", _ip_protocol), 6: Field("state"), 7: Field("port", _port),
    8: Field("peer's port"), 9: Field("flags"), 10: Field("backlog"), 11: Field("address"),
    12: Field("peer's address"), 13: _OWNER, 14: _OPTIONS, 15: Field("IPV6_V6ONLY"),
    16: Field("IP options", inner=IP_OPTIONS), 17: Field("interface"), 18: Field("namespace"),
    19: Field("shutdown"), 20: Field("TCP options", inner=TCP_OPTIONS),
}  # fmt: skip
UNIX: Final[Mapping[int, Field]] = {
    1: Field("id"), 2: Field("inode"), 3: Field("type", _unix_type), 4: Field("state"),
    5: Field("flags"), 6: Field("kind of peer"), 7: Field("backlog"), 8: Field("peer"), 9: _OWNER,
    10: _OPTIONS, 11: Field("name"), 12: Field("shutdown"), 13: Field("mode and owner"),
    14: Field("directory"), 15: Field("deleted"), 16: Field("namespace"), 17: Field("mount"),
}  # fmt: skip
NETLINK_SOCKET: Final[Mapping[int, Field]] = {
    1: Field("id"), 2: Field("inode"), 3: Field("protocol", _netlink), 4: Field("state"),
    6: Field("flags"), 7: Field("port"), 8: Field("groups"), 9: Field("peer's port"),
    10: Field("peer's group"), 11: _OWNER, 12: _OPTIONS, 13: Field("namespace"),
}  # fmt: skip
TIMER: Final[Mapping[int, Field]] = {
    **{number: Field("timer") for number in range(1, 11)}, 4: Field("clock", _clock),
}  # fmt: skip

KINDS: Final[Mapping[int, Kind]] = {
    1: Kind("regular file", 3),  # by its path in the new container: see `shim.gate.volumes`
    2: Kind("pipe", 18),
    3: Kind("fifo", 17),
    4: Kind("inet socket", 4, fields=INET),
    5: Kind("UNIX socket", 16, fields=UNIX),
    6: Kind("eventfd", 8),
    7: Kind("epoll", 9),
    8: Kind("inotify", 13),
    9: Kind("signalfd", 10),
    10: Kind("packet socket (AF_PACKET)", 6, needs=RAW),
    11: Kind("terminal", 19),  # which one: see TERMINALS
    12: Kind("fanotify", 14, needs=("CAP_SYS_ADMIN",)),
    13: Kind("netlink socket", 7, fields=NETLINK_SOCKET),
    14: Kind("namespace", 5),  # of the container itself: see `shim.source.opened`
    15: Kind("TUN/TAP device", 11, needs=ADMIN),
    16: Kind("external file", 15, needs=NOBODY),
    17: Kind("timerfd", 12, fields=TIMER),
    18: Kind("memfd", 20),
    19: Kind("BPF map", 21, needs=("CAP_BPF", "CAP_SYS_ADMIN")),
    20: Kind("pidfd", 22),  # of a process of the container: CRIU refuses others
}
"""By CRIU's number of the kind. Source: CRIU, images/fdinfo.proto."""

TERMINALS: Final[Mapping[int, tuple[str, Needs]]] = {
    1: ("pseudo terminal", ANYBODY),
    2: ("console", ("CAP_SYS_TTY_CONFIG",)),
    3: ("virtual terminal", ("CAP_SYS_TTY_CONFIG",)),
    4: ("controlling terminal", ANYBODY),
    5: ("external terminal", NOBODY),
    6: ("serial line", ("CAP_SYS_TTY_CONFIG",)),
}
"""By CRIU's number of their type. Source: CRIU, images/tty.proto."""

ANONYMOUS: Final[Mapping[str, Needs]] = {
    "[eventfd]": ANYBODY, "[eventpoll]": ANYBODY, "[timerfd]": ANYBODY, "[signalfd]": ANYBODY,
    "inotify": ANYBODY, "[pidfd]": ANYBODY, "[fanotify]": ("CAP_SYS_ADMIN",),
    "bpf-map": ("CAP_BPF", "CAP_SYS_ADMIN"), "bpf-prog": NOBODY, "bpf_link": NOBODY,
    "btf": NOBODY, "[userfaultfd]": NOBODY, "[perf_event]": NOBODY, "[io_uring]": NOBODY,
    "seccomp notify": NOBODY, "[fscontext]": NOBODY, "[landlock-ruleset]": NOBODY,
    "[secretmem]": NOBODY, "kvm-vm": NOBODY, "kvm-vcpu": NOBODY, "dmabuf": NOBODY,
    "sync_file": NOBODY, "mount": NOBODY,
}  # fmt: skip
"""Descriptors without a file, by their names in /proc/PID/fd."""

OPEN_DEVICES: Final = {
    (1, 3), (1, 5), (1, 7), (1, 8), (1, 9),  # null, zero, full, random, urandom
    (5, 0), (5, 1), (5, 2),  # tty, console, ptmx
}  # fmt: skip
"""The character devices of every container, beside its pseudo terminals, 136:*."""
PSEUDO_TERMINALS: Final = 136
