"""What changes the store, each operation on a prepared one, and what may be true after a crash."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.contract import manifest
from shim.store.store import Store
from tests.crash import contents
from tests.unit.manifests import fields

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shim.contract.manifest import File, Manifest

KEPT, TARGET, NEW, LATER = "kept", "target", "new", "later"
"""Names of snapshots: KEPT and TARGET are there before, NEW is what `publish` makes."""
_AGES = {name: float(age) for age, name in enumerate((KEPT, TARGET, NEW, LATER))}


@dataclass(frozen=True, slots=True)
class Operation:
    """One change. before, after: the names of the snapshots that there are then."""

    change: Callable[[Store], None]
    before: frozenset[str]
    after: frozenset[str]


def prepared(root: Path) -> None:
    """A store at `root` with KEPT and TARGET in it, and something left in staging."""
    store = Store(str(root))
    store.open()
    for name in (KEPT, TARGET):
        publish(store, name)
    left = root / "staging" / "left"
    left.mkdir()
    contents.write(left, "left")


def publish(store: Store, name: str) -> None:
    """What a capture does with the store."""

    def describe(files: tuple[File, ...]) -> Manifest:
        return manifest.build(**fields(files=files, name=name, created_at=_AGES[name]))

    with store.staged() as staged:
        contents.write(staged, name)
        store.publish(staged, describe)


def remove(store: Store, name: str) -> None:
    """What `quickthaw rm` does with the store."""
    store.remove(store.get(name).id, users=[])


def _nothing(_store: Store) -> None:
    """Opening alone: it empties staging."""


_BOTH = frozenset({KEPT, TARGET})
OPERATIONS = {
    "open": Operation(_nothing, _BOTH, _BOTH),
    "publish": Operation(lambda store: publish(store, NEW), _BOTH, _BOTH | {NEW}),
    "remove": Operation(lambda store: remove(store, TARGET), _BOTH, frozenset({KEPT})),
}


def run(operation: Operation, root: Path) -> None:
    """As a daemon would: open the store, change it."""
    store = Store(str(root))
    store.open()
    operation.change(store)


def violations(root: Path, allowed: frozenset[frozenset[str]]) -> list[str]:
    """What is wrong with the store at `root` after a crash and a start, in words.

    allowed: the sets of snapshots, by name, of which one must be there.
    """
    store = Store(str(root))
    store.open()
    found = {each.name: store.snapshots / each.id for each in store.all()}
    wrong = [f"{name[:12]} is damaged: {why}" for name, why in store.damaged.items()]
    if frozenset(found) not in allowed:
        wrong.append(f"there are {sorted(found)}, expected one of {sorted(map(sorted, allowed))}")
    if (listed := set(os.listdir(store.snapshots))) != {each.id for each in store.all()}:
        wrong.append(f"the index has {found}, the directory {sorted(listed)}")
    if left := os.listdir(store.staging):
        wrong.append(f"left in staging: {left}")
    wrong += [problem for name, place in found.items() for problem in _not_whole(place, name)]
    return wrong or _of_no_use(store, set(found))


def _not_whole(place: Path, name: str) -> list[str]:
    there, expected = contents.listed(place), contents.expected(name)
    return [
        f"{name}: {path} is {there.get(path)}, expected {expected.get(path)}"
        for path in sorted(expected.keys() | there.keys())
        if expected.get(path) != there.get(path)
    ]


def _of_no_use(store: Store, found: set[str]) -> list[str]:
    """Whether snapshots can be made and removed afterwards, the interrupted one included."""
    wrong = []
    for name in (LATER, NEW, TARGET, KEPT):
        if name in found:
            remove(store, name)
        else:
            publish(store, name)
        if (name in {each.name for each in store.all()}) == (name in found):
            wrong.append(f"{name} cannot be published or removed any more")
    return wrong
