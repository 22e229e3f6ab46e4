"""No deleted file is made again by its name beside another container of the pod."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from protos import nri_pb2
from shim.contract.errors import SnapshotDoesNotFit
from shim.daemon.company import Company
from shim.oci.spec import Spec
from shim.restore import opened

FACT = (
    '{"files":[{"path":"/dev/shm/x","mode":33152,"uid":0,"gid":0,"rdev":0,"gone":%s,"at":[]}],'
    '"made":[%s],"sockets_in":[]}'
)


def watched(others: int, *, made: bool) -> None:
    """made: else the file has other names."""
    fact = FACT % ("true", '"/dev/shm/x"' if made else "")
    ticket = SimpleNamespace(container="c1", others=others)
    captured = SimpleNamespace(facts={"volume_files": fact})
    with contextlib.ExitStack() as stack:
        opened.watched(captured, Spec({}), ticket, stack)  # type: ignore[arg-type]


def test_deleted_files_are_made_again_for_nobody_in_company(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opened, "Watch", lambda *_: None)
    with pytest.raises(SnapshotDoesNotFit, match="/dev/shm/x by its name") as caught:
        watched(1, made=True)
    assert caught.value.codes == ["volume_files"]
    watched(0, made=True)
    watched(1, made=False)


def test_containers_of_a_pod_are_counted_whoever_they_are() -> None:
    def of(name: str, number: str, pod: str = "p") -> nri_pb2.Container:
        return nri_pb2.Container(id=number, name=name, pod_sandbox_id=pod)

    registry: Any = ()
    company = Company(registry)
    company.arrives(of("main", "m1"), is_ours=False)
    company.arrives(of("main", "m2"), is_ours=False)
    company.arrives(of("alone", "a", "q"), is_ours=False)
    assert company.others(of("main", "m2")) == 0, "its own earlier attempt is nobody"
    company.arrives(of("sidecar", "s"), is_ours=False)
    assert (company.others(of("main", "m2")), company.others(of("sidecar", "s"))) == (1, 1)
    assert company.others(of("unknown", "u")) == 2
    company.leaves(of("sidecar", "s"))
    assert company.others(of("main", "m2")) == 0
