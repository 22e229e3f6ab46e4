"""Writes and lists the files of these tests' snapshots: every kind that a capture makes, small."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tempfile
from pathlib import Path

from shim.contract.parts import PARTS

CAPTURED = tuple(part.name for part in PARTS)
"""The parts of a snapshot that a capture writes. All else is the store's own."""
_OPAQUE = "trusted.overlay.opaque"


def write(place: Path, name: str) -> None:
    """Fill `place` with the files that a capture of the container `name` would leave."""
    criu, rootfs, shm, memory = (place / part for part in CAPTURED)
    for directory in (
        criu,
        memory,
        rootfs,
        shm,
        rootfs / "etc",
        rootfs / "var",
        rootfs / "var/empty",
    ):
        directory.mkdir(mode=0o755)
    for number in range(3):
        (criu / f"pages-{number}.img").write_bytes(_bytes(f"{name}{number}", 9000 * (number + 1)))
    (criu / "empty.img").write_bytes(b"")
    (memory / "space-1.data").write_bytes(_bytes(f"{name}space", 20000))
    (rootfs / "etc/hosts").write_bytes(_bytes(f"{name}hosts", 200))
    (rootfs / "etc/hosts").chmod(0o4750)
    os.link(rootfs / "etc/hosts", rootfs / "etc/hosts.again")
    os.symlink("hosts", rootfs / "etc/link")
    os.mknod(rootfs / "var/gone", stat.S_IFCHR | 0o600, os.makedev(0, 0))  # a whiteout
    os.setxattr(rootfs / "etc", _OPAQUE, b"y")
    with (rootfs / "var/sparse").open("wb") as file:
        file.seek(1 << 16)
        file.write(_bytes(f"{name}sparse", 5000))
    (shm / "sem.lock").write_bytes(_bytes(f"{name}shm", 4096))


def listed(place: Path) -> dict[str, str]:
    """Returns each captured path beneath `place`, with all its metadata and a digest."""
    return {
        str(path.relative_to(place)): _described(path)
        for part in CAPTURED
        for path in sorted([place / part, *(place / part).rglob("*")])
        if path.exists() or path.is_symlink()
    }


@functools.cache
def expected(name: str) -> dict[str, str]:
    """Returns the list of a whole snapshot of the container `name`, in the form of `listed`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        write(Path(scratch), name)
        return listed(Path(scratch))


def _described(path: Path) -> str:
    status = path.lstat()
    kind = f"{status.st_mode:o} {status.st_uid} {status.st_rdev}"
    if path.is_symlink():
        return f"{kind} -> {path.readlink()}"
    marks = [(name, os.getxattr(path, name)) for name in os.listxattr(path)]
    if not path.is_file():
        return f"{kind} {marks}"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{kind} {marks} {status.st_size} bytes {status.st_nlink} names {digest}"


def _bytes(seed: str, count: int) -> bytes:
    blocks = (hashlib.sha256(f"{seed}{at}".encode()).digest() for at in range(count // 32 + 1))
    return b"".join(blocks)[:count]


def state(root: Path) -> str:
    """Returns a digest of everything beneath `root`, without the random names in staging."""
    staging = sorted(str(path) for path in (root / "staging").glob("*"))
    found = [f"{path} {_described(path)}" for path in sorted(root.rglob("*"))]
    text = "\n".join(found)
    for number, name in enumerate(staging):
        text = text.replace(name, f"staging/{number}")
    return hashlib.sha256(text.encode()).hexdigest()
