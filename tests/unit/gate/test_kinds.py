"""The table of descriptors: every row, the capability that it takes, and kinds without a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.criu.images import DamagedImage
from shim.criu.openfiles import OpenFile, decoded, named_files, network_namespace, open_files
from shim.gate import descriptors, kinds
from shim.gate.descriptors import Tcp, by_network, excess, opens_device, reachable
from shim.gate.kinds import ANONYMOUS, ANYBODY, KINDS, NOBODY, TERMINALS, Abilities
from shim.kernel.capabilities import NAMES, mask_of
from shim.oci.spec import Spec
from tests.unit.criu.test_images import MAGIC, field, varint

if TYPE_CHECKING:
    from pathlib import Path

BOUNDS = Abilities(sndbuf=425_984, rcvbuf=425_984, first_port=1024, pings=False)
TCP = Tcp(4 << 20, 6 << 20)
ALL = mask_of(NAMES)


def file_of(kind: int, body: bytes = b"", terminal: int = 1) -> OpenFile:
    row = KINDS.get(kind)
    raw = field(1, kind) + field(2, 7) + field(row.at if row else 30, body)
    return OpenFile(kind, decoded(raw), terminal)


def refused(kind: int, body: bytes = b"", has: int = 0, **bounds: Any) -> str:
    given = Abilities(**{**{name: getattr(BOUNDS, name) for name in BOUNDS.__slots__}, **bounds})
    return excess([file_of(kind, body)], has, given, TCP, 3)


def inet(*more: bytes, kind: int = 2, protocol: int = 17, options: bytes = b"") -> bytes:
    return field(4, kind) + field(5, protocol) + field(14, options) + b"".join(more)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_free_or_takes_its_capability_and_no_other(kind: int) -> None:
    row = KINDS[kind]
    if row.needs == ANYBODY:
        assert refused(kind) == ""
        return
    assert row.name in refused(kind)
    assert refused(kind, has=ALL & ~mask_of(row.needs))
    if row.needs == NOBODY:
        assert "no snapshot can hold" in refused(kind, has=ALL)
        return
    for capability in row.needs:
        assert capability in NAMES
        assert capability in refused(kind)
        assert refused(kind, has=mask_of([capability])) == ""


@pytest.mark.parametrize("kind", [0, 21, 65534])
def test_a_kind_without_a_row_is_refused(kind: int) -> None:
    assert f"does not know: {kind}" in refused(kind, has=ALL)


TABLES = [(number, dict(row.fields)) for number, row in KINDS.items() if row.fields]


@pytest.mark.parametrize(("kind", "table"), TABLES)
def test_every_field_has_a_row_and_another_is_refused(
    kind: int, table: dict[int, kinds.Field]
) -> None:
    for number, row in table.items():
        zero = field(number, b"" if row.inner else 1 if row.rule in TYPES else 0)
        told = refused(kind, zero)
        assert told == "" or "namespace" in told, row.name
    assert "number 99" in refused(kind, field(99, 0), has=ALL)
    for number, row in table.items():
        if row.inner:
            assert "number 99" in refused(kind, field(number, field(99, 0)), has=ALL)


TYPES = (kinds.INET[4].rule, kinds.UNIX[3].rule)
OPTIONS: list[tuple[int, int, int, str]] = [
    (1, 425_984, 425_985, "CAP_NET_ADMIN"), (2, 425_984, 425_985, "CAP_NET_ADMIN"),
    (8, 6, 7, "CAP_NET_ADMIN"), (8, 0, 2**32 - 1, "CAP_NET_RAW"), (10, 0, 1, "CAP_NET_RAW"),
    (10, 0, 1, "CAP_NET_ADMIN"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "free", "over", "capability"), OPTIONS)
@pytest.mark.parametrize(("kind", "at"), [(4, 14), (5, 10), (13, 12)])
def test_socket_options_take_their_capability_from_a_value_on(
    kind: int, at: int, number: int, free: int, over: int, capability: str
) -> None:
    assert refused(kind, field(at, field(number, free))) == ""
    name = kinds.SOCKET_OPTIONS[number].name
    assert f"{name} {over}" in refused(kind, field(at, field(number, over)))
    assert refused(kind, field(at, field(number, over)), has=mask_of([capability])) == ""


def test_buffers_of_tcp_may_have_grown_unless_the_process_has_set_them() -> None:
    grown = field(2, 6 << 20)
    assert refused(4, inet(kind=1, protocol=6, options=grown)) == ""
    assert refused(4, inet(kind=1, protocol=6, options=grown + field(25, 1))) == ""
    assert "SO_RCVBUF" in refused(4, inet(kind=1, protocol=6, options=grown + field(25, 2)))
    assert "SO_RCVBUF" in refused(4, inet(kind=1, protocol=6, options=field(2, (6 << 20) + 1)))
    assert "SO_RCVBUF" in refused(4, inet(options=grown)), "UDP's do not grow"


@pytest.mark.parametrize(
    ("body", "told", "capability"),
    [
        (inet(kind=3), "type 3", "CAP_NET_RAW"),
        (inet(protocol=132), "protocol 132", "CAP_NET_RAW"),
        (inet(protocol=1), "protocol 1", "CAP_NET_RAW"),
        (inet(field(7, 80)), "port 80", "CAP_NET_BIND_SERVICE"),
    ],
)
def test_inet_sockets_take_their_capabilities(body: bytes, told: str, capability: str) -> None:
    assert told in refused(4, body)
    assert told in refused(4, body, has=ALL & ~mask_of([capability]))
    assert refused(4, body, has=mask_of([capability])) == ""


def test_ports_and_pings_that_the_network_of_the_pod_gives_are_recorded() -> None:
    web, ping = inet(field(7, 80)), inet(protocol=58)
    assert refused(4, web, first_port=80) == ""
    assert refused(4, ping, pings=True) == ""
    files = [file_of(4, web), file_of(4, inet(field(7, 443))), file_of(4, ping), file_of(6)]
    assert by_network(files, 0) == {"lowest_port": 80, "pings": True}
    assert by_network(files, ALL) == {"lowest_port": 0, "pings": False}


def test_netlink_groups_take_their_capability() -> None:
    assert refused(13, field(3, 0) + field(8, 1)) == ""
    assert "groups of NETLINK_NETFILTER" in refused(13, field(3, 12) + field(8, 1))
    assert refused(13, field(3, 12) + field(8, 0)) == ""
    assert "protocol 99" in refused(13, field(3, 99), has=ALL)


def test_sockets_of_another_network_namespace_are_refused() -> None:
    assert refused(4, inet(field(18, 3))) == ""
    assert "network namespace 4" in refused(4, inet(field(18, 4)), has=ALL)
    assert "network namespace 4" in refused(5, field(16, 4), has=ALL)


@pytest.mark.parametrize("number", [*TERMINALS, 99])
def test_terminal_kinds_are_free_or_refused_by_name(number: int) -> None:
    name, needs = TERMINALS.get(number, ("type 99", NOBODY))
    told = excess([file_of(11, terminal=number)], 0, BOUNDS, TCP, 3)
    assert (told == "") == (needs == ANYBODY)
    assert told == "" or name in told


@pytest.mark.parametrize("name", ANONYMOUS)
def test_descriptors_without_a_file_are_free_or_refused(name: str) -> None:
    assert descriptors.anonymous(name) == ANONYMOUS[name]
    assert descriptors.anonymous(f"{name}2") == NOBODY


def test_the_kernels_alarm_clocks_take_a_capability() -> None:
    assert refused(17, field(4, 1)) == ""
    assert "CAP_WAKE_ALARM" in refused(17, field(4, 8))


def test_root_reaches_its_bounding_set_and_another_user_its_held_capabilities() -> None:
    sets = {"bounding": ["CAP_NET_RAW"], "ambient": ["CAP_CHOWN"]}
    root = Spec({"process": {"user": {"uid": 0}, "capabilities": sets}})
    other = Spec({"process": {"user": {"uid": 7}, "capabilities": sets}})
    assert reachable(root) == mask_of(["CAP_NET_RAW"])
    assert reachable(other) == mask_of(["CAP_CHOWN"])
    assert reachable(other, mask_of(["CAP_KILL"])) == mask_of(["CAP_CHOWN", "CAP_KILL"])
    assert reachable(Spec({})) == 0


DENY = {"allow": False, "access": "rwm"}
NODES = {"allow": True, "type": "c", "access": "m"}


@pytest.mark.parametrize(
    ("rules", "devices", "opens"),
    [
        ([], [], False),
        ([DENY, NODES], [], False),
        ([DENY, {"allow": True, "access": "rwm"}], [], True),
        ([DENY, {"allow": True, "type": "c", "major": 10, "minor": 200, "access": "rw"}], [], True),
        ([DENY, {"allow": True, "type": "c", "major": 10, "minor": -1, "access": "r"}], [], False),
        ([{"allow": True, "type": "b", "access": "rwm"}], [], False),
        ([{"allow": True, "access": "rwm"}, DENY], [], False),
        ([DENY], [{"type": "c", "major": 10, "minor": 200}], True),
        ([DENY], [{"type": "b", "major": 10, "minor": 200}], False),
    ],
)
def test_only_devices_of_the_spec_are_accepted(
    rules: list[Any], devices: list[Any], opens: bool
) -> None:
    spec = Spec({"linux": {"devices": devices, "resources": {"devices": rules}}})
    assert opens_device(spec, "c", (10, 200), "rw") == opens
    assert opens_device(spec, "c", (1, 3), "rw"), "/dev/null is everybody's"
    assert not opens_device(Spec({}), "b", (1, 3), "r"), "a disk of these numbers is not"


def test_objects_in_the_images_are_found(tmp_path: Path) -> None:
    named = field(2, 2) + field(6, b"srv/caf\xe9") + field(10, 0o20666)
    terminal = field(1, 4) + field(2, 9)
    entries = [field(1, 1) + field(2, 1) + field(3, named), field(1, 11) + field(19, terminal)]
    write(tmp_path / "files.img", *entries)
    write(tmp_path / "tty-info.img", field(1, 9) + field(2, 6))
    write(tmp_path / "ids-1.img", field(6, 12))
    assert [each.terminal for each in open_files(tmp_path)] == [0, 6]
    (found,) = named_files(tmp_path)
    assert (found.path, found.flags, found.mode) == ("/srv/caf\udce9", 2, 0o20666)
    assert network_namespace(tmp_path) == 12


def write(path: Path, *entries: bytes) -> None:
    sized = (len(entry).to_bytes(4, "little") + entry for entry in entries)
    path.write_bytes(MAGIC + b"".join(sized))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_damaged(data: bytes) -> None:
    try:
        found = decoded(data)
    except DamagedImage:
        return
    assert all(number >= 0 for number in found)


@given(st.lists(st.tuples(st.integers(1, 2**20), st.integers(0, 2**64 - 1))))
def test_every_field_is_found(written: list[tuple[int, int]]) -> None:
    raw = b"".join(varint(number << 3) + varint(value) for number, value in written)
    found = decoded(raw)
    assert sum(map(len, found.values())) == len(written)
    assert all(value in found[number] for number, value in written)
