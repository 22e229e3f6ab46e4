"""Checks whether a container's spec could have made each of its descriptors: see `shim.gate.kinds`.

Pure.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from shim.criu.openfiles import decoded
from shim.gate.kinds import (
    ADMIN,
    ANONYMOUS,
    ANYBODY,
    KINDS,
    LOW_PORTS,
    NETLINK,
    NOBODY,
    OPEN_DEVICES,
    OPEN_GROUPS,
    PINGS,
    PORTS,
    PSEUDO_TERMINALS,
    RAW,
    TERMINALS,
)
from shim.kernel.capabilities import mask_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any

    from shim.criu.openfiles import OpenFile
    from shim.gate.kinds import Abilities, Body, Field, Needs
    from shim.oci.spec import Spec

_INET, _NETLINK, _TERMINAL = 4, 13, 11
_PORT, _PROTOCOL, _TCP = 7, 5, 6
_OPTIONS_OF = {4: 14, 5: 10, 13: 12}
"""The field with the options of a socket of this kind."""
_NAMESPACE_OF = {4: 18, 5: 16, 10: 20, 13: 13, 15: 4}
"""The field with the network namespace of a file of this kind."""
_BUF_LOCK, _SNDBUF_LOCKED, _RCVBUF_LOCKED = 25, 1, 2


@dataclasses.dataclass(frozen=True, slots=True)
class Tcp:
    """Sizes in bytes to which the kernel itself lets the buffers of a TCP socket grow."""

    sndbuf: int
    rcvbuf: int


def reachable(spec: Spec, held: int = 0) -> int:
    """Returns the capabilities with which the spec's own processes can make descriptors: a mask.

    held: the permitted capabilities of the captured processes. A user other than root reaches the
    bounding set at most by set-user-ID programs, and then a process holds what the program gave.
    """
    reached = "ambient" if spec.user.get("uid") else "bounding"
    return mask_of(spec.capabilities.get(reached) or ()) | held


def excess(
    files: Iterable[OpenFile], has: int, bounds: Abilities, tcp: Tcp, netns: int | None
) -> str:
    """Describes the first descriptor that takes more than the capabilities `has`; empty if none.

    netns: CRIU's number of the container's network namespace. Raises DamagedImage.
    """
    for each in files:
        kind = KINDS.get(each.kind)
        if kind is None:
            return f"a descriptor of a kind that quickthaw does not know: {each.kind} of CRIU's"
        for what, needs in _needed(each, bounds, tcp, netns):
            if not suffices(has, needs):
                return f"{kind.name}{what}, {told(needs)}"
    return ""


def by_network(files: Iterable[OpenFile], has: int) -> dict[str, object]:
    """Returns the powers that sockets have by the pod's network alone: lowest port (or 0), pings.

    Raises DamagedImage.
    """
    ports, pings = [], False
    for each in files:
        raw = each.entry.get(KINDS[each.kind].at, [None])[-1] if each.kind == _INET else None
        if not isinstance(raw, bytes):
            continue
        body = decoded(raw)
        port, protocol = body.get(_PORT, [0])[-1], body.get(_PROTOCOL, [0])[-1]
        if isinstance(port, int) and not suffices(has, PORTS) and 0 < port < LOW_PORTS:
            ports.append(port)
        pings |= protocol in PINGS and not suffices(has, RAW)
    return {"lowest_port": min(ports, default=0), "pings": pings}


def suffices(has: int, needs: Needs) -> bool:
    """Whether the mask has one of the needed capabilities."""
    return needs == ANYBODY or bool(has & mask_of(needs))


def told(needs: Needs) -> str:
    """Returns the words for messages about the missing capability."""
    if needs == NOBODY:
        return "which no snapshot can hold"
    return f"which takes {' or '.join(needs)}"


def _needed(
    file: OpenFile, bounds: Abilities, tcp: Tcp, netns: int | None
) -> Iterator[tuple[str, Needs]]:
    kind = KINDS[file.kind]
    yield "", kind.needs
    raw = file.entry.get(kind.at, [None])[-1]
    if not isinstance(raw, bytes):
        yield " without a description", NOBODY
        return
    body = decoded(raw)
    if file.kind == _TERMINAL:
        name, needs = TERMINALS.get(file.terminal, (f"type {file.terminal}", NOBODY))
        yield f": {name}", needs
    if file.kind in _NAMESPACE_OF:
        place = body.get(_NAMESPACE_OF[file.kind], [netns])[-1]
        if place != netns:
            yield f" of network namespace {place!r}, not its own", NOBODY
    if file.kind == _NETLINK:
        yield from _groups(body)
    if kind.fields:
        yield from _fields(kind.fields, body, _bounds(file.kind, body, bounds, tcp))


def _groups(body: Body) -> Iterator[tuple[str, Needs]]:
    protocol = body.get(3, [0])[-1]
    known = NETLINK.get(protocol) if isinstance(protocol, int) else None
    name, _ = known or (f"protocol {protocol!r}", NOBODY)
    if any(body.get(8, ())) and protocol not in OPEN_GROUPS:
        yield f" with groups of {name}", ADMIN


def _fields(
    table: Mapping[int, Field], body: Body, bounds: Abilities
) -> Iterator[tuple[str, Needs]]:
    for number, values in body.items():
        row = table.get(number)
        if row is None:
            yield f" with a field that quickthaw does not know, number {number}", NOBODY
            continue
        for value in values:
            if row.inner is not None:
                inner = decoded(value) if isinstance(value, bytes) else {}
                yield from _fields(row.inner, inner, bounds)
            elif row.rule is not None:
                needs = row.rule(value, bounds) if isinstance(value, int) else NOBODY
                yield f" with {row.name} {value!r}", needs


def _bounds(kind: int, body: Body, bounds: Abilities, tcp: Tcp) -> Abilities:
    """Returns the bounds; larger for TCP buffers whose size the process has not set."""
    if kind != _INET or body.get(_PROTOCOL) != [_TCP]:
        return bounds
    raw = body.get(_OPTIONS_OF[kind], [b""])[-1]
    locked = decoded(raw).get(_BUF_LOCK, [0])[-1] if isinstance(raw, bytes) else 0
    locks = locked if isinstance(locked, int) else 0
    return dataclasses.replace(
        bounds,
        sndbuf=bounds.sndbuf if locks & _SNDBUF_LOCKED else max(bounds.sndbuf, tcp.sndbuf),
        rcvbuf=bounds.rcvbuf if locks & _RCVBUF_LOCKED else max(bounds.rcvbuf, tcp.rcvbuf),
    )


def anonymous(name: str) -> Needs:
    """Returns the needs of a descriptor without a file, by its name in /proc."""
    return ANONYMOUS.get(name, NOBODY)


def opens_device(spec: Spec, kind: str, number: tuple[int, int], access: str) -> bool:
    """Whether the spec lets its processes open this device node.

    kind: `c` or `b`. access: of `r` and `w`. The last of the cgroup's rules that matches counts.
    Source: OCI runtime-spec, config-linux.md; runc, libcontainer/specconv (AllowedDevices).
    """
    if kind == "c" and (number in OPEN_DEVICES or number[0] == PSEUDO_TERMINALS):
        return True
    kinds = ("c", "u") if kind == "c" else ("b",)
    for each in spec.devices:
        if each.get("type") in kinds and (each.get("major"), each.get("minor")) == number:
            return True
    allowed: set[str] = set()
    for rule in spec.device_rules:
        if _fits(rule, kind, number):
            given = set(rule.get("access") or "rwm")
            allowed = allowed | given if rule.get("allow") else allowed - given
    return set(access) <= allowed


def _fits(rule: Mapping[str, Any], kind: str, number: tuple[int, int]) -> bool:
    wanted = rule.get("type") or "a"
    if wanted not in ("a", kind):
        return False
    for has, asked in zip(number, (rule.get("major"), rule.get("minor")), strict=True):
        if asked not in (None, -1, has):
            return False
    return True
