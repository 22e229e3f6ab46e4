"""Stores snapshots on disk, and indexes them in memory.

A single rename publishes a snapshot, after all of its content is on the disk: an unpublished
snapshot does not exist. Every start makes the index anew from the manifests.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from shim.contract import faults
from shim.contract import manifest as manifests
from shim.contract.errors import BadManifest, NoSuchSnapshot, SnapshotInUse
from shim.contract.paths import (
    STORE,
    STORE_LEAVING,
    STORE_SNAPSHOTS,
    STORE_STAGING,
    STORE_USED,
    STORE_WORKING_SETS,
)
from shim.integrity import marks
from shim.kernel.beneath import empty_dir, open_dir, remove_tree
from shim.kernel.libc import call
from shim.kernel.replace import take_away
from shim.kernel.stopping import Stop
from shim.store import complete
from shim.store.durable import sync_directory
from shim.store.quarantine import Quarantine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from shim.contract.manifest import File, Manifest
    from shim.contract.names import SnapshotId
    from shim.integrity.marks import Marks

log = logging.getLogger(__name__)

MIN_PREFIX = 4
"""The number of hexadecimal digits that name a snapshot."""
_NEAR_AT_MOST = 3


class Store:
    """The snapshots of a node. No two processes may write: the daemon owns the store.

    sign: returns the content of the signature file for a manifest. Without `sign` the store
    publishes unsigned snapshots, which no node uses. marks_directory: see `shim.integrity.marks`;
    without this directory nothing gets a mark. logs_directory: of failed restores; the logs leave
    with their snapshot. damaged: directories without a readable manifest, by name, with the reason.
    quarantine: the snapshots that no container may start from.
    """

    def __init__(
        self,
        root: str = STORE,
        *,
        sign: Callable[[Manifest], bytes] | None = None,
        marks_directory: str = "",
        logs_directory: str = "",
    ) -> None:
        self.root, self._sign, self._marks = Path(root), sign, marks_directory
        self._logs = logs_directory
        self.snapshots, self.staging = self.root / STORE_SNAPSHOTS, self.root / STORE_STAGING
        self._leaving = self.root / STORE_LEAVING
        self._by_id: dict[str, Manifest] = {}
        self._signatures: dict[str, bytes] = {}
        self.damaged: dict[str, str] = {}
        self.quarantine = Quarantine(self.root)
        self._used, self._working_sets = self.root / STORE_USED, self.root / STORE_WORKING_SETS

    def open(self) -> None:
        """Make the directories, put aside all that is in staging, read the index. Raises OSError.

        The time for this does not depend on leftovers of an earlier capture: see `empty_leaving`.
        """
        for directory in (self.root, self.snapshots, self._leaving):
            directory.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.staging, self._leaving / secrets.token_hex(8))
        self.staging.mkdir(mode=0o700)
        self.read_index()
        # A damaged snapshot exists, too: its records stay as long as the snapshot does.
        exist = self._by_id.keys() | self.damaged.keys()
        self.quarantine.open(exist)
        for directory in (self._used, self._working_sets):
            directory.mkdir(mode=0o700, exist_ok=True)
            for path in directory.iterdir():
                if path.stem not in exist:
                    path.unlink()

    def empty_leaving(self, stop: Stop) -> None:
        """Remove all that `open` put aside. Blocking. Raises OSError, Stopped."""
        with open_dir(str(self._leaving)) as leaving:
            empty_dir(leaving.fileno(), stop.check)

    def read_index(self) -> None:
        """Read every manifest, and the quarantine. Raises OSError."""
        self.quarantine.read()
        self._by_id, self._signatures, self.damaged = {}, {}, {}
        for name in os.listdir(self.snapshots):
            try:
                with open_dir(str(self.snapshots / name)) as directory:
                    self._by_id[name] = manifests.read(directory.fileno(), snapshot=name)
                    self._signatures[name] = complete.signature_in(directory.fileno())
            except FileNotFoundError:
                continue  # removed meanwhile: the command line reads without the daemon's consent
            except (BadManifest, NotADirectoryError) as error:
                self.damaged[name] = str(error)
                log.warning("snapshot %s: %s", name[:12], error)

    def all(self) -> list[Manifest]:
        """Returns every snapshot, the newest first."""
        return self.find()

    def find(self, *, namespace: str = "", key: str = "", name: str = "") -> list[Manifest]:
        """Returns the snapshots that match every given value, the newest first."""
        return _newest_first(
            each
            for each in list(self._by_id.values())  # other threads publish and remove meanwhile
            if (not key or each.key == key)
            and (not name or each.name == name)
            and (not namespace or each.source.namespace == namespace)
        )

    def get(self, wanted: str, *, namespace: str = "") -> Manifest:
        """Returns the snapshot with this id, unique prefix of an id, or name.

        An id may begin with `sha256:`. namespace: of Kubernetes; snapshots of other namespaces do
        not exist for the caller. `NAMESPACE/NAME` also names the namespace. If a namespace has
        several snapshots of a name, the newest is meant. Raises NoSuchSnapshot, with similar ids;
        also for a name that several namespaces have.
        """
        its_namespace, _, name = wanted.rpartition("/")
        index = {
            each: manifest
            for each, manifest in list(self._by_id.items())  # other threads change it meanwhile
            if namespace in ("", manifest.source.namespace)
            and its_namespace in ("", manifest.source.namespace)
        }
        digits = name.removeprefix("sha256:")
        found = [index[each] for each in index if each.startswith(digits)]
        if len(digits) < MIN_PREFIX or not found:
            found = _newest_first(each for each in index.values() if name and each.name == name)
            if len({each.source.namespace for each in found}) == 1:
                found = found[:1]
        if len(found) == 1:
            return found[0]
        raise _not_found(wanted, found, _newest_first(index.values()))

    def signature_of(self, found: str) -> bytes:
        """Returns the unverified signature file of a snapshot; empty if there is none.

        `shim.trust.verdict` judges the signature.
        """
        return self._signatures.get(found, b"")

    def used(self, found: str) -> None:
        """Note that a container has started from the snapshot. Raises OSError.

        Not synced: after a power cut the last use may seem earlier.
        """
        self._used.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(self._used / found, flags, 0o600)
        try:
            os.utime(fd)
        finally:
            os.close(fd)

    def last_use(self, found: Manifest) -> float:
        """Returns when the snapshot was made or last started from: unix time."""
        try:
            return max(found.created_at, os.lstat(self._used / found.id).st_mtime)
        except OSError:
            return found.created_at

    @contextlib.contextmanager
    def staged(self) -> Iterator[Path]:
        """Yields a new directory for a capture, and removes it at the end unless published."""
        place = self.begin()
        try:
            yield place
        finally:
            self.discard(place)

    def begin(self) -> Path:
        """Returns a new directory for a capture, which `discard` removes. Raises OSError."""
        place = self.staging / secrets.token_hex(8)
        place.mkdir(mode=0o700)
        try:
            faults.point("store.staged")
        except BaseException:
            self.discard(place)
            raise
        return place

    def discard(self, staged: Path) -> None:
        """Remove the directory, unless it was published. Blocking: it may hold many files."""
        with open_dir(str(self.staging)) as staging:
            remove_tree(staging.fileno(), staged.name)

    def publish(
        self,
        staged: Path,
        describe: Callable[[tuple[File, ...]], Manifest],
        stop: Stop | None = None,
    ) -> Manifest:
        """Publish a staged capture: digest, sign, place. Blocking: reads and syncs all content.

        describe: returns the manifest, given the listings with the digests. stop: ends the work up
        to the moment when the snapshot exists. Raises NotPublished, SnapshotTooBig, Stopped.
        """
        stop = stop or Stop()
        with complete.border(staged, self.root):
            recorded = complete.digest(staged, stop)
            found = describe(tuple(recorded.files))
            faults.point("store.digested")
            complete.sign(staged, found, self._sign)
        return self.place(staged, recorded.marks, stop)

    def place(
        self, staged: Path, hashed: Mapping[str, Marks] | None = None, stop: Stop | None = None
    ) -> Manifest:
        """Make a complete directory in staging exist as a snapshot. Blocking: syncs all content.

        The directory may come from elsewhere: it has the parts, the listings, the manifest and, in
        a store that signs, a signature. The caller has verified content and signature. hashed: the
        marks of files that the caller hashed in this directory just now, by part. stop: ends the
        work up to the moment when the snapshot exists. Raises NotPublished, Stopped.
        """
        with complete.border(staged, self.root):
            found, signed = complete.read(staged, is_signed=self._sign is not None)
            _sync_file_system(staged)
            faults.point("store.synced")
            if stop:
                stop.check()
            self._rename(staged, found.id)
        self._mark(found.id, hashed or {})
        self._by_id[found.id], self._signatures[found.id] = found, signed
        self.damaged.pop(found.id, None)
        return found

    def _rename(self, staged: Path, found: str) -> None:
        """Publish by a durable rename, undone if it cannot be made durable. Raises OSError."""
        os.rename(staged, self.snapshots / found)
        try:
            faults.point("store.renamed")
            sync_directory(self.snapshots)
            faults.point("store.published")
        except OSError as error:
            try:
                os.rename(self.snapshots / found, staged)
            except OSError as undo:
                error.add_note(f"and it is still in {self.snapshots}: {undo}")
            raise

    def _mark(self, found: str, hashed: Mapping[str, Marks]) -> None:
        """Write marks of files that were hashed just now: the first restore need not hash them."""
        if not self._marks:
            return
        try:
            with open_dir(str(self.snapshots / found)) as directory:
                if marks.count_on(directory.fileno()):
                    for part, marked in hashed.items():
                        marks.write(found, part, marked, self._marks)
        except OSError as error:
            log.warning("the first use of snapshot %s will hash it: %s", found[:12], error)

    def withdraw(self, found: str) -> Manifest | None:
        """Take a snapshot out of the index, so that nobody chooses it during its removal."""
        return self._by_id.pop(found, None)

    def put_back(self, found: Manifest | None) -> None:
        """Undo `withdraw`: the snapshot was not removed after all."""
        if found and (self.snapshots / found.id).exists():
            self._by_id[found.id] = found

    def remove(self, found: SnapshotId, *, users: list[str]) -> None:
        """Delete a snapshot. users: the containers that have the snapshot's diff mounted.

        Raises SnapshotInUse, OSError.
        """
        if users:
            raise SnapshotInUse(
                "cannot remove the snapshot", about=found[:12],
                why=f"containers use its root file system: {', '.join(users)}",
                do="Remove those pods first.",
            )  # fmt: skip
        faults.point("store.remove")
        # A single rename hides the snapshot; the next start removes any rest from staging.
        os.rename(self.snapshots / found, self.staging / found)
        for known in (self._by_id, self._signatures, self.damaged):
            known.pop(found, None)  # at once: the index has the same snapshots as the directory
        faults.point("store.removed")
        sync_directory(self.snapshots)
        faults.point("store.removed.synced")
        self.quarantine.drop(found)
        take_away(f"{self._used}/{found}")
        take_away(f"{self._working_sets}/{found}.json")
        with open_dir(str(self.staging)) as staging:
            remove_tree(staging.fileno(), found)
        if self._marks:
            marks.forget(found, self._marks)
        if self._logs:
            take_away(f"{self._logs}/{found}.log")

    def forget_logs(self) -> None:
        """Remove the logs of snapshots that do not exist. Raises OSError."""
        for path in Path(self._logs).iterdir() if self._logs else ():
            if path.stem not in self._by_id and path.stem not in self.damaged:
                take_away(str(path))


def _newest_first(found: Iterable[Manifest]) -> list[Manifest]:
    return sorted(found, key=lambda each: each.created_at, reverse=True)


def _not_found(wanted: str, found: Sequence[Manifest], index: Sequence[Manifest]) -> NoSuchSnapshot:
    """Returns the error. found: the snapshots `wanted` may mean. index: all the caller may see."""
    if found and found[0].name == wanted:
        names = sorted({f"{each.source.namespace}/{each.name}" for each in found})
        return NoSuchSnapshot(
            "cannot find the snapshot", about=wanted,
            why=f"{len(names)} namespaces have a snapshot of this name",
            do=f"Name the namespace: {', '.join(names)}.",
        )  # fmt: skip
    near = ", ".join(sorted(each.id[:12] for each in found or index[:_NEAR_AT_MOST]))
    return NoSuchSnapshot(
        "cannot find the snapshot", about=wanted,
        why="several begin like this" if found else "none has this id or name",
        do=f"Try one of: {near}." if near else "There are no snapshots.",
    )  # fmt: skip


def _sync_file_system(directory: Path) -> None:
    """Sync all with a single syncfs(2), instead of an fsync for each of perhaps 100,000 files."""
    with open_dir(str(directory)) as fd:
        call("syncfs", fd.fileno())
