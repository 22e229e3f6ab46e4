"""Another container of the pod is seen before CRIU makes files by their names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from shim.contract.errors import SnapshotDoesNotFit
from shim.restore import company, opened

if TYPE_CHECKING:
    from pathlib import Path


def _spec(path: str | None) -> dict[str, Any]:
    joined = {"type": "ipc"} if path is None else {"type": "ipc", "path": path}
    return {"linux": {"namespaces": [{"type": "pid"}, joined]}}


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A sandbox of number 7 with a container, 9, and a pod of its own, 8; files stand for them."""
    for name in ("7", "8", "self"):
        (tmp_path / name / "ns").mkdir(parents=True)
        (tmp_path / name / "ns/ipc").write_text(name)
    return tmp_path


def test_sandbox_that_is_alone_and_one_that_is_not(proc: Path) -> None:
    spec = _spec("/proc/7/ns/ipc")
    assert company.others(spec, str(proc)) == ""
    (proc / "9/ns").mkdir(parents=True)
    os.link(proc / "7/ns/ipc", proc / "9/ns/ipc")
    assert "process 9 of another container" in company.others(spec, str(proc))


@pytest.mark.parametrize("path", [None, "/run/netns/x", "/proc/self/ns/ipc", "/proc/7/ns/net"])
def test_unknown_company_is_reported(proc: Path, path: str | None) -> None:
    assert "does not tell" in company.others(_spec(path), str(proc))


def test_deleted_files_are_made_again_for_nobody_in_company(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Captured:
        facts = {  # noqa: RUF012
            "volume_files": '{"files":[{"path":"/dev/shm/x","mode":33152,"uid":0,"gid":0,"rdev":0,'
            '"gone":true,"at":[]}],"made":["/dev/shm/x"],"sockets_in":[]}'
        }

    monkeypatch.setattr(company, "others", lambda _: "process 9 is there")
    with pytest.raises(SnapshotDoesNotFit, match="/dev/shm/x by its name, and process 9 is there"):
        opened.watched(Captured, None, {}, "c1", None)  # type: ignore[arg-type]
