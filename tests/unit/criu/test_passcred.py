"""CRIU before 4.2 finds SO_PASSCRED and SO_PASSSEC off where Linux 6.16 and later refuse them."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from typing import TYPE_CHECKING

import pytest

from shim.criu import passcred

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIONS = (socket.SO_PASSCRED, 34)


@pytest.fixture
def cgroup() -> Iterator[str]:
    """Makes an empty cgroup beneath our own; removes it when its processes are gone."""
    try:
        path = tempfile.mkdtemp(prefix="quickthaw-", dir=passcred.unified_cgroup(os.getpid()))
    except (OSError, ValueError) as error:
        pytest.skip(f"needs a cgroup v2 that we may write: {error}")
    yield path
    os.rmdir(path)


@pytest.fixture(autouse=True)
def _needed() -> None:
    if not passcred.kernel_refuses():
        pytest.skip("this kernel answers by itself")


def _asked(cgroup: str, family: int, *, value: int = 0) -> list[int | str]:
    """Returns the answers for a socket of `family` to a process in `cgroup`: values, or names of
    errors.
    """
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            with open(f"{cgroup}/cgroup.procs", "w") as procs:
                procs.write(str(os.getpid()))
            told: list[int | str] = []
            with socket.socket(family) as asked, passcred.attach(cgroup):
                if value:
                    asked.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, value)
                for option in (*OPTIONS, socket.SO_TYPE, socket.SO_PEERSEC):
                    try:
                        told.append(asked.getsockopt(socket.SOL_SOCKET, option))
                    except OSError as error:
                        told.append(errno.errorcode[error.errno or 0])
            os.write(writer, repr(told).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return [int(item) if item.isdigit() else item for item in text.strip("[]").split(", ")]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_internet_sockets_report_the_options_as_off(cgroup: str, family: int) -> None:
    assert _asked(cgroup, family)[:2] == [0, 0]


@pytest.mark.parametrize("value", [0, 1])
def test_unix_sockets_keep_their_own_answer(cgroup: str, value: int) -> None:
    assert _asked(cgroup, socket.AF_UNIX, value=value)[:2] == [value, 0]


def test_other_options_are_not_touched(cgroup: str) -> None:
    kind, peer = _asked(cgroup, socket.AF_INET)[2:]
    assert kind == socket.SOCK_STREAM
    assert peer == "'ENOPROTOOPT'", "a refusal that is not about the two stays one"


def test_other_cgroups_are_not_touched(cgroup: str) -> None:
    with passcred.attach(cgroup):
        assert passcred.kernel_refuses()


def test_missing_cgroup_is_reported_and_the_dump_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passcred, "read_mounts", list)
    with passcred.answered(os.getpid()) as why:
        assert "no cgroup v2 is mounted" in why
