"""Changes the keys of a node: makes, rotates, trusts and revokes keys.

Every file comes into place by a rename, in an order in which a kill between any two renames leaves
a node that trusts what it must: a key is trusted as a former key before it is replaced, and revoked
before it leaves the trusted keys. The directory is locked: changes happen one at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from typing import TYPE_CHECKING, Final

from shim.contract.errors import KeyRefused, NoSuchKey
from shim.contract.paths import NODE_KEY, NODE_PUBLIC, REVOKED_KEYS, TRUSTED_KEYS
from shim.kernel import replace
from shim.kernel.beneath import open_beneath, open_dir
from shim.trust import keyfile
from shim.trust.keys import PUBLIC_SUFFIX, KeyDirectory, KeyEntry, read_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.trust.keyfile import PublicKey

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SECRET, _OPEN = 0o600, 0o644
MIN_PREFIX: Final = 4
"""The number of digits by which a person may name a key."""


def initialise(keys: KeyDirectory) -> tuple[PublicKey, bool]:
    """Make the node's key if missing, and the public half if it does not belong to the key.

    Returns the key, and whether it is new. Raises KeyRefused, OSError.
    """
    with _locked(keys) as dirfd:
        made = False
        try:
            own = keys.private_at(dirfd)
        except FileNotFoundError:
            own, made = keyfile.make(), True
            _put(dirfd, NODE_KEY, own.pem(), _SECRET)
        _put_public(dirfd, own.public)
        return own.public, made


def rotate(keys: KeyDirectory) -> tuple[PublicKey, KeyEntry | None]:
    """Give the node a new key. The old key stays trusted, as a former key of this node.

    Returns the new key, and the former key if it could be read. Raises OSError.
    """
    with _locked(keys) as dirfd:
        former = _former(dirfd, keys)
        if former is not None and keys.reread().revocation(former.key.id) is None:
            _put(dirfd, former.file, former.key.pem(), _OPEN)
        new = keyfile.make()
        _put(dirfd, NODE_KEY, new.pem(), _SECRET)
        _put_public(dirfd, new.public)
        return new.public, former


def trust(keys: KeyDirectory, data: bytes, name: str) -> tuple[KeyEntry, bool]:
    """Trust the public key in `data` from now on, under a name.

    Returns the key, and whether it was not trusted before. Raises KeyRefused, OSError.
    """
    file = f"{TRUSTED_KEYS}/{_checked(name)}{PUBLIC_SUFFIX}"
    try:
        key = keyfile.parse_public(data)
    except ValueError as error:
        raise KeyRefused(
            "cannot trust the key", about=name, why=str(error),
            do="Give the file node.pub of another node.",
        ) from error  # fmt: skip
    with _locked(keys) as dirfd:
        ring = keys.reread()
        if revoked := ring.revocation(key.id):
            raise keys.refused(
                "cannot trust the key", revoked.file, f"key {key.id} is revoked by this file",
                "Remove the file to trust the key again.",
            )  # fmt: skip
        if known := ring.signer(key.id):
            return known, False
        if _exists(dirfd, file):
            raise keys.refused(
                "cannot trust the key", file, "another key has this name", "Give another --name."
            )
        _put(dirfd, file, key.pem(), _OPEN)
        return KeyEntry(name, file, key), True


def revoke(keys: KeyDirectory, wanted: str) -> tuple[KeyEntry, bool]:
    """Never again trust the key with this name, id, or unique beginning of an id.

    Returns the key, and whether it was not revoked before. Raises NoSuchKey, KeyRefused, OSError.
    """
    with _locked(keys) as dirfd:
        ring = keys.reread()
        found = _find(wanted, [*((ring.own,) if ring.own else ()), *ring.trusted, *ring.revoked])
        if ring.own and ring.own.key == found.key:
            raise keys.refused(
                "cannot revoke the key", NODE_KEY, f"this node signs with {found.key.id}",
                "First give the node a new key: quickthaw keys rotate.",
            )  # fmt: skip
        added = ring.revocation(found.key.id) is None
        entry = KeyEntry(found.name, f"{REVOKED_KEYS}/{found.key.id}{PUBLIC_SUFFIX}", found.key)
        if added:
            _put(dirfd, entry.file, found.key.pem(), _OPEN)
        for each in ring.trusted:
            if each.key == found.key:
                _remove(dirfd, each.file)
        return ring.revocation(found.key.id) or entry, added


def _find(wanted: str, entries: list[KeyEntry]) -> KeyEntry:
    named = [entry for entry in entries if entry.name == wanted or entry.file == wanted]
    by_id = [
        each for each in entries if len(wanted) >= MIN_PREFIX and each.key.id.startswith(wanted)
    ]
    found = {entry.key.id: entry for entry in reversed(named or by_id)}
    if len(found) == 1:
        return next(iter(found.values()))
    near = ", ".join(sorted({entry.key.id for entry in entries})) or "none"
    raise NoSuchKey(
        "cannot find the key", about=wanted,
        why="several keys begin with this" if found else "no key has this id or name",
        do=f"The keys are: {near}.",
    )  # fmt: skip


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise KeyRefused(
            "cannot trust the key", about=name,
            why="a name has letters, digits, dots, hyphens and underscores, 63 at most",
            do="Give a --name.",
        )  # fmt: skip
    return name


def _former(dirfd: int, keys: KeyDirectory) -> KeyEntry | None:
    """Returns the key to be replaced, also if others could read it: rotating mends that."""
    try:
        data = read_key(dirfd, NODE_KEY, keys.uid, 0)
        key = keyfile.parse_private(data).public
    except (OSError, ValueError):
        return None
    name = f"former-{key.id}"
    return KeyEntry(name, f"{TRUSTED_KEYS}/{name}{PUBLIC_SUFFIX}", key)


@contextlib.contextmanager
def _locked(keys: KeyDirectory) -> Iterator[int]:
    """Yields the locked directory, made if missing, and without leftovers of killed changes."""
    with open_dir(os.path.dirname(keys.path)) as parent:
        _make_directory(parent.fileno(), os.path.basename(keys.path))
    with open_dir(keys.path) as directory:
        keys.refuse_shared(directory.fileno())
        fcntl.flock(directory.fileno(), fcntl.LOCK_EX)
        _sweep(directory.fileno())
        for name in (TRUSTED_KEYS, REVOKED_KEYS):
            _make_directory(directory.fileno(), name)
            with open_beneath(directory.fileno(), name, os.O_RDONLY | os.O_DIRECTORY) as beneath:
                _sweep(beneath.fileno())
        yield directory.fileno()


def _make_directory(dirfd: int, name: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=dirfd)
        os.fsync(dirfd)


def _sweep(dirfd: int) -> None:
    """Remove the scratch files of a change that was killed."""
    for name in os.listdir(dirfd):
        if replace.is_scratch(name):
            os.unlink(name, dir_fd=dirfd)


def _put_public(dirfd: int, key: PublicKey) -> None:
    with contextlib.suppress(OSError), open_beneath(dirfd, NODE_PUBLIC) as fd:
        if os.read(fd.fileno(), keyfile.MAX_BYTES) == key.pem():
            return
    _put(dirfd, NODE_PUBLIC, key.pem(), _OPEN)


def _put(dirfd: int, file: str, data: bytes, mode: int) -> None:
    """Write a file beneath the directory: whole and durable, or not at all."""
    directory, _, name = file.rpartition("/")
    with open_beneath(dirfd, directory or ".", os.O_RDONLY | os.O_DIRECTORY) as beneath:
        replace.put(name, data, dir_fd=beneath.fileno(), mode=mode, is_durable=True)
        os.fsync(beneath.fileno())


def _remove(dirfd: int, file: str) -> None:
    directory, _, name = file.rpartition("/")
    with open_beneath(dirfd, directory, os.O_RDONLY | os.O_DIRECTORY) as beneath:
        os.unlink(name, dir_fd=beneath.fileno())
        os.fsync(beneath.fileno())


def _exists(dirfd: int, file: str) -> bool:
    try:
        os.lstat(file, dir_fd=dirfd)
    except FileNotFoundError:
        return False
    return True
