"""Lists the operations on a store, and checks the store after a crash of each."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.contract import manifest
from shim.contract.errors import Blame, SnapshotNotWhole
from shim.integrity.check import SnapshotCheck
from shim.kernel.beneath import open_dir
from shim.store.store import Store
from tests.crash import contents
from tests.unit.manifests import fields

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shim.contract.manifest import File, Manifest

KEPT, TARGET, HELD, NEW, LATER = "kept", "target", "held", "new", "later"
"""Names of snapshots. KEPT, TARGET and HELD exist before: TARGET with a counted failure, HELD in
quarantine. `publish` makes NEW."""
_AGES = {name: float(age) for age, name in enumerate((KEPT, TARGET, HELD, NEW, LATER))}
_RECORDS = ("quarantine", "health", "used")


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation on the store. before, after: its state then, in the form of `_there`."""

    change: Callable[[Store], None]
    before: frozenset[str]
    after: frozenset[str]


def prepared(root: Path) -> None:
    """Make a store at `root` with three snapshots, and leftovers in staging."""
    store = opened(root)
    for name in (KEPT, TARGET, HELD):
        publish(store, name)
        store.used(store.get(name).id)
    fail(store, TARGET, Blame.RESTORE)
    fail(store, HELD, Blame.CONTENT)
    left = root / "staging" / "left"
    left.mkdir()
    contents.write(left, "left")


def opened(root: Path) -> Store:
    """Returns the store as a daemon that has just started has it."""
    store = Store(str(root), sign=lambda found: f"signed {found.id}".encode())
    store.open()
    return store


def publish(store: Store, name: str) -> None:
    """Publish a snapshot, as a capture does."""

    def describe(files: tuple[File, ...]) -> Manifest:
        return manifest.build(**fields(files=files, name=name, created_at=_AGES[name]))

    with store.staged() as staged:
        contents.write(staged, name)
        store.publish(staged, describe)


def remove(store: Store, name: str) -> None:
    """Remove a snapshot, as `quickthaw rm` does."""
    store.remove(store.get(name).id, users=[])


def fail(store: Store, name: str, blame: str) -> None:
    """Count a failed restore from a snapshot, as the daemon does."""
    store.quarantine.failed(
        store.get(name).id, blame=blame, error_class="CriuRestoreFailed", reason="a test", after=2
    )


def release(store: Store, name: str) -> None:
    """Release a snapshot, as `quickthaw quarantine release` does."""
    store.quarantine.release(store.get(name).id)


def _there(store: Store) -> frozenset[str]:
    """Returns the names of the snapshots, and their quarantine records."""
    found = {each.name: each.id for each in store.all()}
    held = {f"{name} in quarantine" for name in found if store.quarantine.get(found[name])}
    return frozenset(found) | held


_HELD = f"{HELD} in quarantine"
_FIRST = frozenset({KEPT, TARGET, HELD, _HELD})
OPERATIONS = {
    "open": Operation(lambda _store: None, _FIRST, _FIRST),
    "publish": Operation(lambda store: publish(store, NEW), _FIRST, _FIRST | {NEW}),
    "remove": Operation(lambda store: remove(store, HELD), _FIRST, _FIRST - {HELD, _HELD}),
    "quarantine": Operation(
        lambda store: fail(store, TARGET, Blame.CONTENT),
        _FIRST, _FIRST | {f"{TARGET} in quarantine"},
    ),
    "release": Operation(lambda store: release(store, HELD), _FIRST, _FIRST - {_HELD}),
}  # fmt: skip


def run(operation: Operation, root: Path) -> None:
    """Open the store and change it, as a daemon would."""
    operation.change(opened(root))


def violations(root: Path, allowed: frozenset[frozenset[str]]) -> list[str]:
    """Returns the faults of the store at `root` after a crash and a start, in words.

    allowed: the permitted states, in the form of `_there`.
    """
    store = opened(root)
    ids = {each.id: each.name for each in store.all()}
    there, listed = _there(store), set(os.listdir(store.snapshots))
    wrong = [f"{name[:12]} is damaged: {why}" for name, why in store.damaged.items()]
    if there not in allowed:
        wrong.append(f"there are {sorted(there)}, expected one of {sorted(map(sorted, allowed))}")
    if listed != ids.keys():
        wrong.append(f"the index has {ids}, the directory {sorted(listed)}")
    if left := os.listdir(store.staging):
        wrong.append(f"left in staging: {left}")
    wrong += [problem for each in store.all() for problem in _not_whole(store, each)]
    wrong += _orphans(root, set(ids))
    return wrong or _of_no_use(store, set(ids.values()))


def _orphans(root: Path, ids: set[str]) -> list[str]:
    """Returns records about snapshots that do not exist, or that contradict each other."""
    found = {kind: os.listdir(root / kind) for kind in _RECORDS}
    about = {kind: {name.removesuffix(".json") for name in names} for kind, names in found.items()}
    wrong = [f"{kind} of none: {about[kind] - ids}" for kind in _RECORDS if about[kind] - ids]
    if both := about["quarantine"] & about["health"]:
        wrong.append(f"in quarantine, and still counted: {both}")
    return wrong


def _not_whole(store: Store, found: Manifest) -> list[str]:
    signed = store.signature_of(found.id)
    if signed != f"signed {found.id}".encode():
        return [f"{found.name}: its signature is {signed!r}"]
    if wrong := _not_as_the_manifest_says(store, found):
        return [wrong]
    there, expected = contents.listed(store.snapshots / found.id), contents.expected(found.name)
    return [
        f"{found.name}: {path} is {there.get(path)}, expected {expected.get(path)}"
        for path in sorted(expected.keys() | there.keys())
        if expected.get(path) != there.get(path)
    ]


def _not_as_the_manifest_says(store: Store, found: Manifest) -> str:
    """Returns the error of the swap's own check, with everything hashed; empty when all is well."""
    until = time.monotonic() + 60
    try:
        with (
            open_dir(str(store.snapshots / found.id)) as place,
            SnapshotCheck(
                place.fileno(), found, container="c1", until=until, with_marks=False
            ) as check,
        ):
            check.begin()
            check.finish()
    except SnapshotNotWhole as error:
        return str(error)
    return ""


def _of_no_use(store: Store, found: set[str]) -> list[str]:
    """Check that snapshots can be made and removed afterwards, also the interrupted snapshot."""
    wrong = []
    for name in (LATER, NEW, TARGET, HELD, KEPT):
        if name in found:
            remove(store, name)
        else:
            publish(store, name)
        if (name in {each.name for each in store.all()}) == (name in found):
            wrong.append(f"{name} cannot be published or removed any more")
    return wrong
