"""restored.json is for the user of the container's process."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from shim.contract.ticket import Ticket
from shim.oci.bundle import Bundle
from shim.restore import resume
from tests.unit.manifests import made

if TYPE_CHECKING:
    from pathlib import Path

MAPPED = [
    {"containerID": 0, "hostID": 100_000, "size": 1000},
    {"containerID": 1000, "hostID": 200_000, "size": 10},
]
TICKET = Ticket(
    container="c" * 64, snapshot="5" * 64, fallback="cold", deadline_s=1, turns=1, turn_wait_s=1,
    turn_hold_s=60,
    pod_namespace="models", pod_name="pod", pod_uid="u", container_name="main", resume="",
    gpu_pairs=[], others=0,
)  # fmt: skip


def bundle_of(place: Path, user: object, mappings: object = None) -> Bundle:
    spec: dict[str, Any] = {
        "root": {"path": "rootfs"}, "process": {"user": user, "env": ["A=1"]},
        "linux": {"uidMappings": mappings, "gidMappings": mappings},
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(spec))
    return Bundle(str(place))


@pytest.mark.parametrize(
    ("user", "mappings", "owner"),
    [
        ({"uid": 1000, "gid": 7}, None, (1000, 7)),
        ({}, None, (0, 0)),
        (None, None, (0, 0)),
        ({"uid": 1000, "gid": 7}, MAPPED, (200_000, 100_007)),
        ({"uid": 5000, "gid": 1010}, MAPPED, (0, 0)),
        ({"uid": -1, "gid": "x"}, None, (0, 0)),
        ({"uid": 1, "gid": 1}, [{"containerID": "0", "hostID": 1, "size": 1}], (0, 0)),
    ],
)
def test_owner_of_restored_json_is_the_host_uid_of_the_process_user(
    tmp_path: Path, user: object, mappings: object, owner: tuple[int, int]
) -> None:
    assert bundle_of(tmp_path, user, mappings).owner == owner


def test_restored_json_is_readable_by_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = tmp_path / TICKET.container
    control.mkdir()
    monkeypatch.setattr(resume, "CONTROL", str(tmp_path))
    before = os.umask(0o777)
    try:
        resume.tell(TICKET, made(), bundle_of(tmp_path, {"uid": 1000, "gid": 7}), ["10.0.0.1"])
    finally:
        os.umask(before)
    status = (control / "restored.json").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1000, 7, 0o400)
    assert json.loads((control / "restored.json").read_text())["environment"] == {"A": "1"}
    assert os.listdir(control) == ["restored.json"]
