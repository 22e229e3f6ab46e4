"""The probe's reading of /proc, and its answers to requests."""

from __future__ import annotations

import json
import os
from http.client import HTTPConnection
from typing import TYPE_CHECKING

import pytest

from tests.workers import facts, files
from tests.workers.fork import Family
from tests.workers.probe import Probe
from tests.workers.serving import Ask, Identity, LineLog, Server, answer

if TYPE_CHECKING:
    from pathlib import Path

FIB_TRIE = """Main:
  +-- 0.0.0.0/0 3 0 5
     +-- 10.88.0.0/16 2 0 2
           |-- 10.88.0.7
              /32 host LOCAL
           |-- 10.88.255.255
              /32 link BROADCAST
     +-- 127.0.0.0/8 2 0 2
           |-- 127.0.0.1
              /32 host LOCAL
Local:
           |-- 10.88.0.7
              /32 host LOCAL
"""
ROUTE = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
eth0 00000000 0100580A 0003 0 0 0 00000000 0 0 0
eth0 0000580A 00000000 0001 0 0 0 0000FFFF 0 0 0
"""


def ask(**query: str) -> Ask:
    """Returns a request with these parameters."""
    return Ask(query, b"", ("127.0.0.1", 1), ("127.0.0.1", 2))


def test_each_address_is_listed_once_without_broadcast() -> None:
    assert facts.local_ipv4(FIB_TRIE) == ["10.88.0.7", "127.0.0.1"]


def test_gateway_is_read_in_the_byte_order_of_the_kernel() -> None:
    assert facts.default_gateway(ROUTE) == "10.88.0.1"


def test_ipv6_addresses_are_written_as_people_write_them() -> None:
    line = "00000000000000000000000000000001 01 80 10 80       lo\n"
    assert facts.local_ipv6(line) == ["::1"]


def test_status_has_the_fields_that_grant_power() -> None:
    fields = facts.status_fields("Name:\tx\nUid:\t1\t1\t1\t1\nCapEff:\t00ff\nSeccomp:\t2\n")
    assert fields == {"Uid": "1 1 1 1", "CapEff": "00ff", "Seccomp": "2"}


def test_this_process_can_be_described() -> None:
    assert facts.who()["pid"] == os.getpid()
    assert json.dumps([facts.who(), facts.network(), facts.environment(), facts.mounts()])


@pytest.mark.parametrize(
    ("path", "query", "status"),
    [
        ("/nothing", {}, 404),
        ("/write", {}, 400),
        ("/log", {"count": "many"}, 400),
        ("/read", {"path": "/does/not/exist"}, 409),
        ("/count", {}, 200),
    ],
)
def test_failures_become_answers(path: str, query: dict[str, str], status: int) -> None:
    assert answer(Probe().routes(), path, ask(**query)).status == status


def test_every_endpoint_is_in_the_documentation() -> None:
    from tests.workers import probe

    assert [path for path in Probe().routes() if path not in (probe.__doc__ or "")] == []


def test_held_files_are_verified_even_after_deletion(tmp_path: Path) -> None:
    held = files.Files()
    held.hold(ask(path=str(tmp_path / "a"), name="a", delete="1"))
    held.hold(ask(path=str(tmp_path / "b"), name="b", delete="1", map="1"))
    held.append(ask(name="a", text="more"))
    assert all(one.check()["ok"] and one.check()["deleted"] for one in held.held.values())
    os.pwrite(held.held["a"].fd, b"!", 10)
    assert not held.held["a"].check()["ok"]
    os.close(held.held["a"].fd)
    mapped = held.held["b"].map
    assert mapped is not None
    mapped.close()


def test_written_files_have_the_content_of_their_seed(tmp_path: Path) -> None:
    size, path = (1 << 20) + 7, tmp_path / "deep" / "file"
    files.Files.write(ask(path=str(path), size=str(size), seed="3"))
    assert path.read_bytes() == files.content(3, size)


def test_a_hole_before_the_offset_takes_no_blocks(tmp_path: Path) -> None:
    facts_of = files.Files.write(ask(path=str(tmp_path / "f"), size="4096", offset="10000000"))
    blocks, size = facts_of["blocks"], facts_of["size"]
    assert isinstance(blocks, int)
    assert (blocks < 100, size) == (True, 10004096)


def test_a_request_is_logged_before_it_is_answered(capfd: pytest.CaptureFixture[str]) -> None:
    log, me = LineLog(), Identity("test")
    server = Server("127.0.0.1", 0, {"/hello": lambda _: {"hello": 1}}, log, me)
    server.start()
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    try:
        connection.request("GET", "/hello?x=1")
        assert json.loads(connection.getresponse().read()) == {"hello": 1}
    finally:
        connection.close()
        server.socket.close()
    assert capfd.readouterr().out == "00000001 request 1 GET /hello 200\n"


def test_fork_worker_verifies_everything_shared(tmp_path: Path) -> None:
    family = Family(str(tmp_path))
    try:
        assert [set(family.check().values()) for _ in range(3)] == [{"ok"}] * 3
    finally:
        family.close()
