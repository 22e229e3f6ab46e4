"""Mounts that runc puts over paths are mounted at a restore without `tar`; mounts with content are
not.
"""

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from protos import criu_pb2
from shim.criu.images import entries
from shim.criu.masks import mount_bare, own_null

MAGIC: Final = struct.pack("<II", 0x54564319, 0x1234)
TMPFS, AUTO = 5, 16
CORRUPT: Final = gzip.compress(b"x" * 100)[:10] + b"\xff" * 20


def archive(criu: Path, device: int, *names: str, mode: int = 0o1777, uid: int = 0) -> None:
    """Writes an archive as CRIU makes it of a tmpfs."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in (".", *names):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE
            member.mode, member.uid = mode, uid
            tar.addfile(member)
    (criu / f"tmpfs-dev-{device}.tar.gz.img").write_bytes(gzip.compress(out.getvalue()))


def mounted(
    criu: Path, *mounts: criu_pb2.Mount, change: Callable[[Path], None] = mount_bare
) -> list[criu_pb2.Mount]:
    """Returns the content of the image afterwards."""
    image = criu / "mountpoints-12.img"
    raw = [mount.SerializeToString() for mount in mounts]
    image.write_bytes(MAGIC + b"".join(struct.pack("<I", len(each)) + each for each in raw))
    change(criu)
    assert image.read_bytes().startswith(MAGIC)
    return [criu_pb2.Mount.FromString(entry) for entry in entries(image)]


def mask(device: int, number: int = 1) -> criu_pb2.Mount:
    """Returns a mount of a read-only tmpfs, with a field that we do not know."""
    made = criu_pb2.Mount(fstype=TMPFS, mnt_id=number, root_dev=device, sb_flags=1)
    return criu_pb2.Mount.FromString(made.SerializeToString() + b"\x42\x04/sys")


def test_all_mounts_of_an_empty_tmpfs_are_mounted_by_name(tmp_path: Path) -> None:
    archive(tmp_path, 72)
    one, other = mounted(tmp_path, mask(72), mask(72, number=2))
    for mount, before in ((one, mask(72)), (other, mask(72, number=2))):
        assert (mount.fstype, mount.fsname) == (AUTO, "tmpfs")
        mount.fstype = TMPFS
        mount.ClearField("fsname")
        assert mount == before, "and nothing else has changed"


@pytest.mark.parametrize(
    ("names", "mode", "uid"), [(["./x"], 0o1777, 0), ([], 0o755, 0), ([], 0o1777, 7)]
)
def test_tmpfs_that_differs_from_a_new_tmpfs_stays(
    tmp_path: Path, names: list[str], mode: int, uid: int
) -> None:
    archive(tmp_path, 72, *names, mode=mode, uid=uid)
    assert mounted(tmp_path, mask(72)) == [mask(72)]


@pytest.mark.parametrize(
    "other", [{"sb_flags": 0}, {"fstype": 6}, {"ext_key": "/dev/null"}, {"ext_mount": True}]
)
def test_mount_that_is_no_mask_stays(tmp_path: Path, other: dict[str, object]) -> None:
    archive(tmp_path, 72)
    mount = mask(72)
    for name, value in other.items():
        setattr(mount, name, value)
    assert mounted(tmp_path, mount) == [mount]


@pytest.mark.parametrize(
    "content", [b"", b"no gzip", gzip.compress(b"no archive"), CORRUPT, bytes(5000)]
)
def test_unreadable_archive_is_left_to_criu(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tmpfs-dev-72.tar.gz.img").write_bytes(content)
    assert mounted(tmp_path, mask(72)) == [mask(72)]
    (tmp_path / "tmpfs-dev-72.tar.gz.img").unlink()
    assert mounted(tmp_path, mask(72)) == [mask(72)]


DEV: Final = criu_pb2.Mount(fstype=TMPFS, mnt_id=1, root_dev=50, root=b"/", mountpoint=b"./dev")
SHM: Final = criu_pb2.Mount(
    fstype=TMPFS, mnt_id=2, root_dev=60, root=b"/", mountpoint=b"/dev/shm", ext_key="/dev/shm"
)


def null_at(place: str, device: int = 50) -> criu_pb2.Mount:
    """Returns an external mount, as runc has CRIU dump it."""
    return criu_pb2.Mount(
        fstype=TMPFS, mnt_id=9, root_dev=device, root=b"/null", mountpoint=place.encode(),
        ext_key=f"/{place.strip('./')}",
    )  # fmt: skip


def test_masked_files_get_the_null_device_of_the_container(tmp_path: Path) -> None:
    before = [DEV, SHM, null_at("proc/keys"), null_at("./sys/firmware/x"), null_at("dev/other")]
    after = mounted(tmp_path, *before, change=own_null)
    assert [mount.ext_key for mount in after] == ["", "/dev/shm", "", "", "/dev/other"]
    for then, now in zip(before, after, strict=True):
        now.ext_key = then.ext_key
        if not then.ext_key:
            now.ClearField("ext_key")
        assert now == then, "and nothing else has changed"


@pytest.mark.parametrize(
    "mounts", [[SHM, null_at("proc/keys")], [DEV, null_at("proc/keys", device=7)]]
)
def test_null_device_of_the_node_is_never_bound(
    tmp_path: Path, mounts: list[criu_pb2.Mount]
) -> None:
    with pytest.raises(ValueError, match="proc/keys is masked by a null device that is not"):
        mounted(tmp_path, *mounts, change=own_null)
