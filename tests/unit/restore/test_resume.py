"""restored.json is for the user of the container's process."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from shim.oci.spec import Spec
from shim.restore import resume
from tests.unit.manifests import made
from tests.unit.tickets import a_ticket

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

TICKET = a_ticket()


def test_restored_json_is_readable_by_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = tmp_path / TICKET.container
    control.mkdir()
    monkeypatch.setattr(resume, "CONTROL", str(tmp_path))
    given = Spec({"process": {"user": {"uid": 1000, "gid": 7}, "env": ["A=1"]}})
    before = os.umask(0o777)
    try:
        resume.tell(TICKET, made(), given, ["10.0.0.1"])
    finally:
        os.umask(before)
    status = (control / "restored.json").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1000, 7, 0o400)
    assert json.loads((control / "restored.json").read_text())["environment"] == {"A": "1"}
    assert os.listdir(control) == ["restored.json"]
