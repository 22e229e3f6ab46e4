"""Reads and changes the network namespace of this process. Only this module imports pyroute2.

pyroute2 takes 123 ms to import: import this module only where there is something to change or
record.
"""

from __future__ import annotations

import contextlib
import errno
import os

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SYSCTLS = "/proc/sys/net"
_RECORDED = (
    "core/somaxconn",
    "ipv4/ip_forward",
    "ipv4/ip_local_port_range",
    "ipv4/ip_nonlocal_bind",
    "ipv4/ip_unprivileged_port_start",
    "ipv4/ping_group_range",
    "ipv4/tcp_keepalive_intvl",
    "ipv4/tcp_keepalive_probes",
    "ipv4/tcp_keepalive_time",
    "ipv4/tcp_rmem",
    "ipv4/tcp_syncookies",
    "ipv4/tcp_wmem",
    "ipv6/bindv6only",
    "ipv6/conf/all/disable_ipv6",
    "ipv6/ip_nonlocal_bind",
)
"""The sysctls that a process can depend on and that a pod's spec or the runtime can set."""
_IFA_F_NODAD = 0x02


def facts() -> dict[str, object]:
    """Returns addresses, routes, links with their MTU and the net sysctls, as plain JSON.

    Raises OSError or pyroute2's NetlinkError.
    """
    with IPRoute() as route:
        links = {link["index"]: link.get("ifname") for link in route.get_links()}
        return {
            "links": [
                {"name": link.get("ifname"), "mtu": link.get("mtu"), "state": link.get("state")}
                for link in route.get_links()
            ],
            "addresses": [
                {
                    "link": links.get(address["index"]),
                    "address": address.get("local") or address.get("address"),
                    "prefix": address["prefixlen"],
                    "scope": address["scope"],
                }
                for address in route.get_addr()
            ],
            "routes": [_route(entry, links) for entry in route.get_routes()],
            "sysctls": _sysctls(),
        }


def _route(entry: Any, links: dict[int, str]) -> dict[str, object]:
    return {
        "to": f"{entry.get('dst') or 'default'}/{entry['dst_len']}",
        "via": entry.get("gateway"),
        "link": links.get(entry.get("oif")),
        "table": entry.get("table"),
    }


def _sysctls() -> dict[str, str]:
    found = {}
    for name in _RECORDED:
        with contextlib.suppress(FileNotFoundError), open(f"{_SYSCTLS}/{name}") as file:
            found[f"net.{name.replace('/', '.')}"] = file.read().strip()
    return found


def bring_up_loopback() -> None:
    """Set `lo` up; no error when `lo` is up already."""
    with IPRoute() as route:
        route.link("set", index=1, state="up")


def add_to_loopback(address: str) -> None:
    """Make `address` bindable by giving it to `lo`; no error when `lo` has it already."""
    try:
        with IPRoute() as route:
            route.addr(
                "add", index=1, address=address, prefixlen=_host(address), flags=_flags(address)
            )
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise OSError(error.code, os.strerror(error.code), address) from error


def remove_from_loopback(address: str) -> None:
    """Take `address` from `lo`; no error when `lo` does not have it."""
    try:
        with IPRoute() as route:
            route.addr("del", index=1, address=address, prefixlen=_host(address))
    except NetlinkError as error:
        if error.code != errno.EADDRNOTAVAIL:
            raise OSError(error.code, os.strerror(error.code), address) from error


def _host(address: str) -> int:
    return 128 if ":" in address else 32


def _flags(address: str) -> int:
    # Duplicate address detection would leave an IPv6 address tentative, and so not bindable.
    return _IFA_F_NODAD if ":" in address else 0
