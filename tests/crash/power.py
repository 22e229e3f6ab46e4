"""Cuts the power of a store: records an operation on a disk, then checks every possible wreck.

A program of its own, which makes its own mount namespace:

    python -m tests.crash.power OPERATION [--subsets N] [--seed N] [--options MOUNT]
        [--others PROBABILITY] [--without CALL]

Prints a JSON object. The power goes at each flush, and at the moment when the operation reported
that it was done. Flushed writes are on the disk; of later writes, none, all, and N random subsets
of blocks. Each such disk is mounted, which replays the file system's journal, and the store is
started and checked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shim.contract.errors import QuickthawError
from shim.kernel import libc
from tests.crash import disk, loop
from tests.crash.disk import Flush, Mark, Write
from tests.crash.operations import OPERATIONS, prepared, run, violations
from tests.node.kernel import CLONE_NEWNS, MNT_DETACH, MS_PRIVATE, MS_REC, mount, unshare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.crash.operations import Operation

_SIZE = 16 << 20
_MAKE = (
    "mkfs.ext4", "-q", "-b", str(disk.BLOCK), "-J", "size=4", "-N", "512", "-m", "0",
    "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0",
)  # fmt: skip
_DONE = "done"


@dataclass(slots=True)
class Result:
    """The counts of a run. flushes, blocks: of the operation. disks: wrecks that were checked."""

    flushes: int = 0
    blocks: int = 0
    disks: int = 0
    violations: list[str] = field(default_factory=list)


class Bench:
    """Records and checks. place: a scratch directory. wanted: the arguments."""

    def __init__(self, place: Path, wanted: argparse.Namespace) -> None:
        self._options, self._wanted = wanted.options, wanted
        self._fuse, self._mount = place / "fuse", place / "mount"
        for directory in (self._fuse, self._mount):
            directory.mkdir()

    def made(self) -> bytes:
        """Returns a disk with a prepared store, cleanly unmounted."""
        fd = os.memfd_create("image")
        os.truncate(fd, _SIZE)
        subprocess.run([*_MAKE, f"/proc/{os.getpid()}/fd/{fd}"], check=True)
        with loop.mounted(fd, self._mount, "ext4", "", block=disk.BLOCK):
            prepared(self._mount / "store")
        image = os.pread(fd, _SIZE, 0)
        os.close(fd)
        return image

    def recorded(self, image: bytes, operation: Operation) -> list[disk.Event]:
        """Returns the events of a disk with `image` during the operation."""
        with disk.served(image, self._fuse) as served:
            fd = os.open(served.path, os.O_RDWR | os.O_CLOEXEC)
            with loop.mounted(fd, self._mount, "ext4", self._options, block=disk.BLOCK):
                os.close(fd)
                child = os.fork()
                if child == 0:
                    self._operate(served, operation)
                _, status = os.waitpid(child, 0)
            events = list(served.events())  # the unmount has written everything
        if status:
            raise SystemExit("the operation itself failed")
        return events

    def _operate(self, served: disk.Disk, operation: Operation) -> None:
        status = 1
        try:
            _let_others_sync(self._mount, self._wanted.others, _chance(self._wanted.seed))
            _take_out(self._wanted.without)
            run(operation, self._mount / "store")
            served.mark(_DONE)
            status = 0
        finally:
            os._exit(status)

    def judged(self, image: bytes, allowed: frozenset[frozenset[str]]) -> list[str]:
        """Returns the faults of the store on a disk with this content."""
        fd = os.memfd_create("wreck")
        try:
            os.write(fd, image)
            with loop.mounted(fd, self._mount, "ext4", self._options, block=disk.BLOCK):
                return violations(self._mount / "store", allowed)
        except (OSError, QuickthawError) as error:
            return [f"the store cannot be used: {error}"]
        finally:
            os.close(fd)


def _chance(seed: int) -> random.Random:
    """Returns a random generator: the same seed makes the same wrecks."""
    return random.Random(seed)  # noqa: S311 - nothing secret


def _let_others_sync(place: Path, odds: float, chance: random.Random) -> None:
    """Before a change of a file, by chance, sync the file system as another process might.

    So the power can also go between changes that would otherwise be written together.
    """
    if not odds:
        return
    place_fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    sync = getattr(libc._libc, "syncfs")  # noqa: B009 - the call before `_take_out`

    def hook(event: str, _arguments: tuple[object, ...]) -> None:
        if (event == "open" or event.startswith("os.")) and chance.random() < odds:
            sync(place_fd)

    sys.addaudithook(hook)


def _take_out(without: str) -> None:
    """Replace a call by nothing: the mutation that the tests must find."""
    if without == "fsync":
        os.fsync = lambda fd: None
    elif without:
        setattr(libc._libc, without, lambda _fd: 0)


def wrecks(
    image: bytes, events: Iterable[disk.Event], *, subsets: int, chance: random.Random
) -> Iterator[tuple[bool, str, bytes]]:
    """Yields (whether the operation was done, the lost writes, content) for each possible disk."""
    durable, pending, done, flushes = bytearray(image), list[Write](), False, 0
    for event in [*events, Flush()]:
        if isinstance(event, Write):
            pending.append(event)
            continue
        for text, kept in _choices(pending, subsets, chance):
            yield done, f"after flush {flushes}: {text}", _with(durable, kept)
        if isinstance(event, Mark):
            done = event.text == _DONE
            for text, kept in _choices(pending, subsets, chance):
                yield done, f"when done: {text}", _with(durable, kept)
        else:
            durable, pending, flushes = bytearray(_with(durable, pending)), [], flushes + 1
    yield done, "nothing is lost", bytes(durable)


def _choices(
    pending: list[Write], subsets: int, chance: random.Random
) -> Iterator[tuple[str, list[Write]]]:
    """Yields subsets of the writes since the last flush, which have reached the disk."""
    yield f"none of {len(pending)} blocks", []
    if not pending:
        return
    yield f"all {len(pending)} blocks", pending
    for _ in range(min(subsets, 2 ** len(pending) - 2)):
        odds = chance.random()
        kept = [write for write in pending if chance.random() < odds]
        yield f"{len(kept)} of {len(pending)} blocks", kept


def _with(durable: bytearray, writes: Iterable[Write]) -> bytes:
    content = bytearray(durable)
    for write in writes:
        content[write.offset : write.offset + len(write.data)] = write.data
    return bytes(content)


def main() -> int:
    """Run the bench. Returns 0 also when there are violations, which are in the output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("--subsets", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--options", default="")
    parser.add_argument("--others", type=float, default=0)
    parser.add_argument("--without", default="")
    wanted = parser.parse_args()
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    with tempfile.TemporaryDirectory(prefix="quickthaw-power-") as scratch:
        mount("none", scratch, "tmpfs")
        try:
            result = _all(Bench(Path(scratch), wanted), wanted)
        finally:
            libc.call("umount2", os.fsencode(scratch), MNT_DETACH)
    json.dump({name: getattr(result, name) for name in result.__slots__}, sys.stdout)
    return 0


def _all(bench: Bench, wanted: argparse.Namespace) -> Result:
    operation, chance, result = OPERATIONS[wanted.operation], _chance(wanted.seed), Result()
    image = bench.made()
    events = bench.recorded(image, operation)
    result.flushes = sum(isinstance(event, Flush) for event in events)
    result.blocks = sum(isinstance(event, Write) for event in events)
    for done, lost, content in wrecks(image, events, subsets=wanted.subsets, chance=chance):
        result.disks += 1
        allowed = {operation.after} if done else {operation.before, operation.after}
        for problem in bench.judged(content, frozenset(allowed)):
            result.violations.append(f"{lost}: {problem}")
    return result


if __name__ == "__main__":
    sys.exit(main())
