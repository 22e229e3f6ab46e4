"""Files in volumes are the captured files, or the swap refuses them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from shim.gate import volumes
from shim.kernel.capabilities import mask_of
from shim.oci.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    root = tmp_path / "volume"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "file").write_text("own")
    (root / "link").symlink_to("/etc/shadow")
    (root / "inner").symlink_to("sub/file")
    (root / "dir").symlink_to("sub")
    return root


def recorded(volume: Path, path: str, **changes: Any) -> dict[str, Any]:
    """Returns the record of the present file of this volume."""
    try:
        status = (volume / path.removeprefix("/data/")).lstat()
    except FileNotFoundError:
        status = volume.lstat()
    return {
        "path": path, "mode": status.st_mode, "uid": status.st_uid, "gid": status.st_gid,
        "rdev": status.st_rdev, "gone": False, "at": [[1, "fd/5"]],
    } | changes  # fmt: skip


def changed(volume: Path, *files: dict[str, Any], sockets_in: Sequence[str] = ()) -> list[str]:
    """Returns the files that the swap finds changed."""
    mounts = [
        {"destination": "/data", "type": "bind", "source": str(volume), "options": ["rbind"]},
        {"destination": "/data/tmp", "type": "tmpfs", "source": "tmpfs"},
    ]
    fact = {"files": [*files], "made": [], "sockets_in": [*sockets_in]}
    return volumes.changed(Spec({"mounts": mounts}), fact)


def test_link_in_a_volume_is_found(volume: Path) -> None:
    paths = ["/data/link", "/data/inner", "/data/dir/file", "/data/../../etc/shadow"]
    found = changed(volume, *(recorded(volume, path) for path in paths))
    assert found == [f"{path} leads over a link" for path in paths]
    assert changed(volume, sockets_in=["/data/sub", "/data/dir", "/data/gone"]) == [
        "/data/dir leads over a link"
    ]


def test_unchanged_or_missing_file_is_not_reported(volume: Path) -> None:
    same = [recorded(volume, path) for path in ("/data/sub/file", "/data/sub", "/data/gone")]
    assert changed(volume, *same) == []
    assert changed(volume, recorded(volume, "/data/link", gone=True)) == []
    place = recorded(volume, "/data", uid=5, mode=0o40700)
    assert changed(volume, place) == [], "the volume's own directory is the new pod's"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mode": 0o10644}, "is of another type"),
        ({"mode": 0o100600}, "has mode"),
        ({"uid": 1234}, "belongs to"),
        ({"gid": 1234}, "belongs to"),
        ({"rdev": 0x103}, "is another device"),
    ],
)
def test_other_file_in_the_same_place_is_reported(
    volume: Path, change: dict[str, Any], told: str
) -> None:
    (volume / "sub/file").chmod(0o644)
    (found,) = changed(volume, recorded(volume, "/data/sub/file", **change))
    assert told in found


def test_fifo_in_the_same_place_is_reported_without_blocking(volume: Path) -> None:
    record = recorded(volume, "/data/sub/file")
    (volume / "sub/file").unlink()
    os.mkfifo(volume / "sub/file")
    assert "is of another type" in changed(volume, record)[0]


def test_unreadable_file_in_a_volume_is_reported(volume: Path) -> None:
    """As one of a server that does not answer; here a name is too long."""
    path = f"/data/{'x' * 300}"
    record = recorded(volume, "/data/sub/file") | {"path": path}
    told = f"{path} cannot be looked at: File name too long"
    assert changed(volume, record, sockets_in=[path]) == [told, told]


def test_mount_inside_of_a_volume_does_not_belong_to_the_volume(volume: Path) -> None:
    (volume / "tmp").symlink_to("/etc")
    record = recorded(volume, "/data/tmp/passwd")
    assert changed(volume, record) == ["/data/tmp/passwd is in no volume of this pod"]


def test_a_fact_of_another_version_fits_no_container() -> None:
    facts: list[object] = [
        ["/data/f"],
        {"files": []},
        {"files": [{"path": "/f"}], "made": [], "sockets_in": []},
        {"files": [], "made": 7, "sockets_in": []},
        7,
    ]
    for fact in facts:
        with pytest.raises(ValueError, match="volume_files"):
            volumes.changed(Spec({}), fact)


@pytest.mark.parametrize(
    ("uid", "has", "mode", "write", "may"),
    [
        (0, [], 0o600, True, True), (7, [], 0o600, False, False), (7, [], 0o644, False, True),
        (7, [], 0o644, True, False), (7, ["CAP_DAC_READ_SEARCH"], 0o600, False, True),
        (7, ["CAP_DAC_READ_SEARCH"], 0o600, True, False), (7, ["CAP_CHOWN"], 0o600, True, True),
        (7, [], 0o666, True, True),
    ],
)  # fmt: skip
def test_only_files_that_the_containers_user_can_open_are_accepted(
    volume: Path, uid: int, has: list[str], mode: int, write: bool, may: bool
) -> None:
    file = volume / "sub/file"
    file.chmod(mode)
    spec = Spec({"process": {"user": {"uid": uid, "gid": 7}}})
    assert volumes.may_open(spec, mask_of(has), file.stat(), write=write) == may
    user = {"uid": uid, "gid": 7, "additionalGids": [file.stat().st_gid]}
    group = Spec({"process": {"user": user}})
    file.chmod(0o660)
    assert volumes.may_open(group, 0, file.stat(), write=True)
