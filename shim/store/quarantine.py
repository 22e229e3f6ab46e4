"""Keeps failing snapshots out of use, by a record for each of them.

Two kinds of small files lie beside the snapshots, each put in place with a single rename and
synced: `quarantine/ID.json` takes a snapshot out of use, `health/ID.json` counts consecutive
failures before that. The snapshot's own files stay in place: containers may have its diff mounted.
Memory holds a copy of all records. Methods that change a record block; any thread may call them.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Final

from shim.contract import jsontext
from shim.contract.errors import Blame, NotQuarantined
from shim.contract.names import is_snapshot_id
from shim.contract.paths import STORE_HEALTH, STORE_QUARANTINE
from shim.store import durable

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping
    from pathlib import Path

log = logging.getLogger(__name__)

SCHEMA: Final = 1
_MAX_BYTES: Final = 64 * 1024
_MAX_REASON: Final = 4096
_MAX_CAUSES: Final = 32
_MAX_CAUSE: Final = 64
"""Characters: a pod's uid has 36."""
_ENDING: Final = ".json"


@dataclass(frozen=True, slots=True)
class Record:
    """A snapshot in quarantine.

    reason: for people. error_class: of the last failure. blame: CONTENT if the snapshot is damaged,
    RESTORE if it is whole and cannot be restored. failures: in a row. at: unix time. by: the
    program that quarantined the snapshot.
    """

    reason: str
    error_class: str
    blame: str
    failures: int
    at: float
    by: str

    @property
    def damaged(self) -> bool:
        """Whether another capture may well be better."""
        return self.blame == Blame.CONTENT


@dataclass(frozen=True, slots=True)
class Health:
    """The consecutive failures of a snapshot that is in use. at: unix time of the last failure.

    causes: the pods that failed, the latest last: a pod that fails again and again counts once.
    """

    failures: int
    reason: str
    error_class: str
    at: float
    causes: tuple[str, ...] = ()


def decode(data: bytes, kind: type[Record] | type[Health]) -> Record | Health:
    """Returns the record in a file. Raises ValueError unless `encode` can have written it."""
    found = jsontext.parse(data)
    names = {field.name for field in fields(kind)}
    if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
        raise ValueError(f"not a record of schema {SCHEMA}")
    if found.keys() != names:
        raise ValueError(f"unknown or missing keys: {', '.join(sorted(found.keys() ^ names))}")
    for name, value in found.items():
        _check(name, value)
    if isinstance(causes := found.get("causes"), list):
        found["causes"] = tuple(causes)
    return kind(**found)


def _check(name: str, value: object) -> None:
    match name:
        case "failures":
            right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
        case "at":
            right = isinstance(value, float) and 0 <= value < 1e12
        case "blame":
            right = value in (Blame.CONTENT, Blame.RESTORE)
        case "causes":
            right = isinstance(value, list) and len(value) <= _MAX_CAUSES and _are_causes(value)
        case _:
            right = isinstance(value, str) and len(value) <= _MAX_REASON
    if not right:
        raise ValueError(f"{name} is {value!r:.40}")


def _are_causes(found: list[object]) -> bool:
    return all(isinstance(each, str) and 0 < len(each) <= _MAX_CAUSE for each in found)


def encode(record: Record | Health) -> bytes:
    """Returns a record in the form that `decode` reads."""
    return json.dumps({"schema": SCHEMA, **asdict(record)}).encode() + b"\n"


class Quarantine:
    """The records of a store. root: the store's directory."""

    def __init__(self, root: Path) -> None:
        self._quarantine, self._health = root / STORE_QUARANTINE, root / STORE_HEALTH
        self._records: dict[str, Record] = {}
        self._counts: dict[str, Health] = {}
        self._lock = threading.Lock()

    def open(self, snapshots: Container[str]) -> None:
        """Make the directories, read them, remove records without a snapshot. Raises OSError.

        snapshots: the names of all that exist.
        """
        for directory in (self._quarantine, self._health):
            directory.mkdir(mode=0o700, exist_ok=True)
            for name in os.listdir(directory):
                if _snapshot_of(name) not in snapshots and not (directory / name).is_dir():
                    durable.take_away(directory / name)
        self.read()
        for snapshot in self._records.keys() & self._counts.keys():
            self._forget_count(snapshot)  # a crash came between the two steps of `_put`

    def read(self) -> None:
        """Read the records, and change nothing on the disk. Raises OSError."""
        self._records, self._counts = {}, {}
        for snapshot, data in _files(self._quarantine):
            try:
                record = decode(data, Record)
            except ValueError as error:
                # Somebody quarantined the snapshot: an unreadable record must not release it.
                record = Record(f"its record cannot be read: {error}", "", Blame.RESTORE, 0, 0.0,
                                "quickthawd")  # fmt: skip
                log.warning("quarantine of snapshot %s: %s", snapshot[:12], error)
            assert isinstance(record, Record)  # noqa: S101 - for the type checker
            self._records[snapshot] = record
        for snapshot, data in _files(self._health):
            try:
                count = decode(data, Health)
            except ValueError as error:
                log.warning("failures of snapshot %s: %s; counted from 0", snapshot[:12], error)
                continue
            assert isinstance(count, Health)  # noqa: S101 - for the type checker
            self._counts[snapshot] = count

    def get(self, snapshot: str) -> Record | None:
        """Returns the record of a snapshot that is in quarantine."""
        return self._records.get(snapshot)

    def all(self) -> Mapping[str, Record]:
        """Returns every record by the snapshot's id."""
        return dict(self._records)

    def failures(self, snapshot: str) -> int:
        """Returns the number of consecutive failures for which the snapshot may be to blame."""
        count = self._counts.get(snapshot)
        return count.failures if count else 0

    def _causes(self, snapshot: str) -> tuple[str, ...]:
        count = self._counts.get(snapshot)
        return count.causes if count else ()

    def failed(
        self,
        snapshot: str,
        *,
        blame: str,
        error_class: str,
        reason: str,
        after: int,
        cause: str = "",
    ) -> Record | None:
        """Count a failed restore. Returns the record if this failure triggers quarantine.

        cause: the uid of the pod that failed; a second failure of the same pod does not count. A
        failure without a cause always counts. after: the number of consecutive failures that
        triggers quarantine; 0 for never. A snapshot whose content is damaged goes into quarantine
        at once, whatever `cause` and `after` are: such a snapshot cannot become whole. Raises
        OSError.
        """
        if blame not in (Blame.CONTENT, Blame.RESTORE):
            return None
        reason = reason[:_MAX_REASON]
        with self._lock:
            if snapshot in self._records:
                return None
            causes = self._causes(snapshot)
            if cause in causes and blame != Blame.CONTENT:
                return None
            if cause:
                causes = (*causes, cause[:_MAX_CAUSE])[-_MAX_CAUSES:]
            failures, now = self.failures(snapshot) + 1, time.time()
            if blame == Blame.CONTENT or 0 < after <= failures:
                record = Record(reason, error_class, blame, failures, now, "quickthawd")
                self._put(snapshot, record)
                return record
            count = Health(failures, reason, error_class, now, causes)
            durable.put(self._health / f"{snapshot}{_ENDING}", encode(count))
            self._counts[snapshot] = count
        return None

    def succeeded(self, snapshot: str) -> None:
        """Forget earlier failures, because a restore went well. Raises OSError."""
        if snapshot in self._counts:
            with self._lock:
                self._forget_count(snapshot)

    def release(self, snapshot: str) -> Record:
        """Put the snapshot back into use, with a count of 0. Returns its record.

        Raises NotQuarantined, OSError.
        """
        with self._lock:
            record = self._records.get(snapshot)
            if record is None:
                raise NotQuarantined(
                    "cannot release the snapshot", about=snapshot[:12],
                    why="the snapshot is not in quarantine", do="See `quickthaw quarantine ls`.",
                )  # fmt: skip
            self._forget_count(snapshot)
            durable.take_away(self._quarantine / f"{snapshot}{_ENDING}")
            del self._records[snapshot]
        return record

    def drop(self, snapshot: str) -> None:
        """Remove all records of a snapshot that is gone. Raises OSError."""
        if is_snapshot_id(snapshot):
            with self._lock:
                self._forget_count(snapshot)
                durable.take_away(self._quarantine / f"{snapshot}{_ENDING}")
                self._records.pop(snapshot, None)

    def _put(self, snapshot: str, record: Record) -> None:
        # In memory first: even with a full disk the snapshot is out of use while this daemon lives.
        self._records[snapshot] = record
        durable.put(self._quarantine / f"{snapshot}{_ENDING}", encode(record))
        # Before a release is possible: a released snapshot must begin with a count of 0.
        self._forget_count(snapshot)

    def _forget_count(self, snapshot: str) -> None:
        durable.take_away(self._health / f"{snapshot}{_ENDING}")
        self._counts.pop(snapshot, None)


def _snapshot_of(name: str) -> str:
    """Returns the snapshot of a record's file name; empty for any other file name."""
    snapshot = name.removesuffix(_ENDING)
    return snapshot if name.endswith(_ENDING) and is_snapshot_id(snapshot) else ""


def _files(directory: Path) -> Iterator[tuple[str, bytes]]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return  # a store that nobody has opened yet
    for name in sorted(names):
        if snapshot := _snapshot_of(name):
            try:
                yield snapshot, _content(directory / name)
            except FileNotFoundError:
                continue  # removed meanwhile: the command line reads without the daemon's consent
            except OSError as error:
                log.warning("%s: %s", directory / name, error)
                yield snapshot, b""


def _content(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        return file.read(_MAX_BYTES)
