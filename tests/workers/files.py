"""Runs the file operations that a test asks of the probe, and holds files open."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .serving import Ask, BadRequest, Json

if TYPE_CHECKING:
    from .serving import Routes

_BLOCK: Final = 1 << 20
_KINDS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def content(seed: int, size: int) -> bytes:
    """Returns `size` bytes that follow from `seed`: a random MiB, repeated."""
    block = random.Random(seed).randbytes(min(size, _BLOCK))  # noqa: S311
    return (block * (size // _BLOCK + 1))[:size]


def digest_of(path: str) -> str:
    """Returns the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: str) -> Json:
    """Returns all facts that a copy must keep; `text` only for a short file."""
    status = os.lstat(path)
    facts: Json = {
        "kind": _KINDS[stat.S_IFMT(status.st_mode)],
        "size": status.st_size,
        "mode": oct(stat.S_IMODE(status.st_mode)),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime_ns": status.st_mtime_ns,
        "nlink": status.st_nlink,
        "blocks": status.st_blocks,
        "device": status.st_dev,
        "inode": status.st_ino,
        "xattrs": _xattrs(path),
    }
    if stat.S_ISLNK(status.st_mode):
        facts["target"] = os.readlink(path)
    if stat.S_ISREG(status.st_mode):
        facts["sha256"] = digest_of(path)
        if status.st_size <= 4096:
            with open(path, encoding="utf-8", errors="replace") as file:
                facts["text"] = file.read()
    if stat.S_ISDIR(status.st_mode):
        facts["entries"] = sorted(os.listdir(path))
    return facts


def _xattrs(path: str) -> dict[str, str]:
    names = os.listxattr(path, follow_symlinks=False)
    return {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names}


def tree(path: str) -> dict[str, Json]:
    """Returns `describe` of everything below `path`, by relative name."""
    found: dict[str, Json] = {}
    for directory, folders, names in os.walk(path):
        for name in [*folders, *names]:
            full = os.path.join(directory, name)
            found[os.path.relpath(full, path)] = describe(full)
    return found


@dataclass
class Held:
    """A file that stays open (or mapped), and its expected content."""

    path: str
    wanted: bytes
    fd: int
    map: mmap.mmap | None = None

    def check(self) -> Json:
        """Compare the present content; a deleted file is read through its descriptor or mapping."""
        if self.map is not None:
            there = bytes(self.map)
        else:
            there = os.pread(self.fd, len(self.wanted) + 1, 0)
        return {
            "ok": there == self.wanted,
            "size": len(there),
            "mapped": self.map is not None,
            "deleted": not os.path.lexists(self.path),
        }


class Files:
    """The file endpoints of the probe."""

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}

    @staticmethod
    def write(ask: Ask) -> Json:
        """Write content of a seed or the request's body; an offset leaves a hole."""
        path, offset = ask.text("path"), ask.whole("offset", 0)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        data = ask.body or content(ask.whole("seed", 1), min(ask.whole("size", 0), _BLOCK))
        left = len(ask.body) or ask.whole("size", 0)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb") as file:
            file.truncate(offset)
            file.seek(offset)
            while left > 0:
                left -= file.write(data[:left])
        return describe(path)

    @staticmethod
    def opaque(ask: Ask) -> Json:
        """Remove a directory and make it again: overlayfs marks the new directory opaque."""
        shutil.rmtree(ask.text("path"))
        os.mkdir(ask.text("path"))
        return describe(ask.text("path"))

    @staticmethod
    def delete(ask: Ask) -> Json:
        """Delete a file, or a directory with all its content."""
        path = ask.text("path")
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
        return {"ok": True}

    @staticmethod
    def change(ask: Ask) -> Json:
        """Change metadata: each parameter that is given."""
        path = ask.text("path")
        if "mode" in ask.query:
            os.chmod(path, ask.whole("mode"))
        if "ns" in ask.query:
            os.utime(path, ns=(ask.whole("ns"), ask.whole("ns")))
        if "name" in ask.query:
            os.setxattr(path, ask.text("name"), ask.text("value").encode())
        return describe(path)

    @staticmethod
    def make(ask: Ask, kind: str) -> Json:
        """Make a directory, fifo, hard link or symbolic link."""
        path = ask.text("path")
        if kind == "mkdir":
            os.makedirs(path, exist_ok=True)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            os.link(ask.text("to"), path)
        else:
            os.symlink(ask.text("to"), path)
        return describe(path)

    def hold(self, ask: Ask) -> Json:
        """Open, fill and keep a file; if asked, delete it, or keep its mapping alone."""
        path, name = ask.text("path"), ask.text("name")
        wanted = content(ask.whole("seed", 1), ask.whole("size", 4096))
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(fd, wanted)
        held = self.held[name] = Held(path, wanted, fd)
        if ask.flag("map"):
            held.map = mmap.mmap(fd, len(wanted))
            os.close(fd)
            held.fd = -1
        if ask.flag("delete"):
            os.unlink(path)
        return held.check()

    def append(self, ask: Ask) -> Json:
        """Write to the end of a held file through its descriptor."""
        held = self.held.get(ask.text("name"))
        if held is None or held.map is not None:
            raise BadRequest(f"no descriptor is held by the name {ask.text('name')}")
        data = ask.text("text").encode()
        os.pwrite(held.fd, data, len(held.wanted))
        held.wanted += data
        return held.check()

    def routes(self) -> Routes:
        """Returns every endpoint by its path."""
        return {
            "/write": self.write,
            "/read": lambda ask: describe(ask.text("path")),
            "/tree": lambda ask: tree(ask.text("path")),
            "/delete": self.delete,
            "/opaque": self.opaque,
            "/chmod": self.change,
            "/mtime": self.change,
            "/xattr": self.change,
            "/mkdir": lambda ask: self.make(ask, "mkdir"),
            "/fifo": lambda ask: self.make(ask, "fifo"),
            "/link": lambda ask: self.make(ask, "link"),
            "/symlink": lambda ask: self.make(ask, "symlink"),
            "/hold": self.hold,
            "/held": lambda _: {name: held.check() for name, held in self.held.items()},
            "/append": self.append,
        }
