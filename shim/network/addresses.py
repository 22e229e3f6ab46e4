"""Lists the IP addresses of a network namespace, without iproute2 and without pyroute2's 123 ms.

An RTM_GETADDR dump. Source: rtnetlink(7), linux/if_addr.h.
"""

from __future__ import annotations

import socket
import struct

from shim.kernel.netns import entered

_RTM_GETADDR, _RTM_NEWADDR, _NLMSG_DONE, _NLMSG_ERROR = 22, 20, 3, 2
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_HOST, _LINK = 254, 253  # RT_SCOPE_*
_HEADER = struct.Struct("=IHHII")
_ADDRESS = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")


def global_addresses(netns: str) -> list[str]:
    """Returns the addresses of global scope in the namespace at path `netns`, IPv4 before IPv6.

    Raises OSError when the namespace cannot be entered. The calling process must have a single
    thread: it is in the other namespace for a moment.
    """
    with entered(netns):
        route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    found: list[tuple[int, str]] = []
    with route:
        request = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        size = _HEADER.size + len(request)
        route.send(_HEADER.pack(size, _RTM_GETADDR, _DUMP, 1, 0) + request)
        done = False
        while not done:
            done = _messages(route.recv(1 << 16), found)
    return [address for _, address in sorted(found, key=lambda entry: entry[0])]


def _messages(data: bytes, found: list[tuple[int, str]]) -> bool:
    """Collect the addresses of a datagram. Returns True after the last datagram."""
    while len(data) >= _HEADER.size:
        size, kind, *_ = _HEADER.unpack_from(data)
        body, data = data[_HEADER.size : size], data[(size + 3) & ~3 :]
        if kind == _NLMSG_DONE:
            return True
        if kind == _NLMSG_ERROR:
            raise OSError(-struct.unpack_from("=i", body)[0], "RTM_GETADDR")
        if kind == _RTM_NEWADDR and (entry := _address(body)):
            found.append(entry)
    return False


def _address(body: bytes) -> tuple[int, str] | None:
    family, _, _, scope, _ = _ADDRESS.unpack_from(body)
    if scope in (_HOST, _LINK) or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    attributes: dict[int, bytes] = {}
    rest = body[_ADDRESS.size :]
    while len(rest) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(rest)
        attributes[kind] = rest[_ATTRIBUTE.size : size]
        rest = rest[max(4, (size + 3) & ~3) :]
    raw = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
    return (family, socket.inet_ntop(family, raw)) if raw else None
