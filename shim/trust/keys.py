"""Reads the keys of a node from /etc/quickthaw/keys, again when they change.

    node.key        the node's private key, with which it signs: 0600, root's
    node.pub        its public half, to be given to other nodes
    trusted.d/*.pub keys of other nodes, and former keys of this node
    revoked.d/*     keys that count for nothing, wherever else they are

Only files that root alone can change count. An unreadable key of trusted.d is left out; an
unreadable key of revoked.d makes the node trust nothing, because the revoked key is unknown.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from shim.contract.errors import KeyRefused
from shim.contract.paths import KEYS, NODE_KEY, NODE_PUBLIC, REVOKED_KEYS, TRUSTED_KEYS
from shim.kernel.beneath import open_beneath, open_dir
from shim.trust import keyfile, signature

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from shim.contract.manifest import Manifest
    from shim.trust.keyfile import PrivateKey, PublicKey

_SETTLED_NS: Final = 2_000_000_000
"""Files change their times in steps (of 10 ms at most). A file that changed this short a time
before it was read may change again within the same step, so it is read once more at the next
look."""
_OTHERS_WRITE: Final = 0o022
_OTHERS_READ: Final = 0o077
PUBLIC_SUFFIX: Final = ".pub"


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key. name: of its file, without the suffix. file: beneath the directory of keys."""

    name: str
    file: str
    key: PublicKey


@dataclass(frozen=True, slots=True)
class Problem:
    """A file or directory that does not count, and the remedy for its operator."""

    file: str
    why: str
    do: str

    def __str__(self) -> str:
        return f"{self.file}: {self.why}. {self.do}"


@dataclass(frozen=True, slots=True)
class Keyring:
    """The content of the directory at a moment.

    own: the key of this node, if it may be used. broken: why the node trusts nothing at all, or
    empty.
    """

    own: KeyEntry | None = None
    trusted: tuple[KeyEntry, ...] = ()
    revoked: tuple[KeyEntry, ...] = ()
    problems: tuple[Problem, ...] = ()
    broken: str = ""
    _signers: Mapping[str, KeyEntry] = field(init=False, compare=False, repr=False)
    _revoked: Mapping[str, KeyEntry] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        revoked = {entry.key.id: entry for entry in self.revoked}
        known = [*((self.own,) if self.own else ()), *self.trusted]
        # Of a key that is there twice, the first counts: this node's own, then by name.
        signers = {entry.key.id: entry for entry in reversed(known) if entry.key.id not in revoked}
        object.__setattr__(self, "_revoked", revoked)
        object.__setattr__(self, "_signers", {} if self.broken else signers)

    def signer(self, key_id: str) -> KeyEntry | None:
        """Returns the trusted key with this id."""
        return self._signers.get(key_id)

    def revocation(self, key_id: str) -> KeyEntry | None:
        """Returns the revoked key with this id."""
        return self._revoked.get(key_id)


class KeyDirectory:
    """Reads the keys. uid: the owner of the files that count."""

    def __init__(self, path: str = KEYS, *, uid: int = 0) -> None:
        self.path, self.uid = path, uid
        self._ring = Keyring()
        self._seen: dict[str, tuple[int, ...] | None] = {}
        self._settled = False

    def current(self) -> Keyring:
        """Returns the keys as they are now: the same object as before when nothing has changed.

        Costs a stat of every key. Never raises: an unreadable key is not trusted.
        """
        if not self._settled or any(self._look(file) != was for file, was in self._seen.items()):
            self._reload()
        return self._ring

    def reread(self) -> Keyring:
        """Read the keys anew, also when they seem unchanged, and return them."""
        self._reload()
        return self._ring

    def private(self) -> PrivateKey:
        """Returns the key with which this node signs. Raises KeyRefused, also if it is revoked."""
        ring = self.current()
        if ring.broken:
            raise self.refused("cannot sign", NODE_KEY, ring.broken, "See `quickthaw keys ls`.")
        try:
            with open_dir(self.path) as directory:
                key = self.private_at(directory.fileno())
        except OSError as error:
            problem = _of_private(error)
            raise self.refused("cannot sign", NODE_KEY, problem.why, problem.do) from error
        if found := ring.revocation(key.public.id):
            raise self.refused(
                "cannot sign", NODE_KEY, f"the node's own key is revoked by {found.file}",
                "Make a new key: quickthaw keys rotate.",
            )  # fmt: skip
        return key

    def private_at(self, dirfd: int) -> PrivateKey:
        """Returns the node's key in directory `dirfd`. Raises KeyRefused; OSError if missing."""
        try:
            return keyfile.parse_private(read_key(dirfd, NODE_KEY, self.uid, _OTHERS_READ))
        except ValueError as error:
            problem = _of_private(error)
            raise self.refused("cannot sign", NODE_KEY, problem.why, problem.do) from error

    def refuse_shared(self, dirfd: int) -> None:
        """Raises KeyRefused when others can change files in the directory `dirfd`."""
        try:
            _refuse_shared(os.fstat(dirfd), self.uid, _OTHERS_WRITE)
        except ValueError as error:
            raise self.refused("cannot use the keys", "", str(error), _mend(self.path)) from error

    def sign(self, found: Manifest) -> bytes:
        """Returns the content of the signature file for a manifest. Raises KeyRefused."""
        return signature.sign(found, self.private()).encode()

    def refused(self, what: str, file: str, why: str, do: str) -> KeyRefused:
        """Returns the error about a file of this directory."""
        return KeyRefused(what, about=f"{self.path}/{file}", why=why, do=do)

    def _look(self, file: str) -> tuple[int, ...] | None:
        try:
            found = os.lstat(f"{self.path}/{file}")
        except OSError:
            return None
        return (
            found.st_dev, found.st_ino, found.st_ctime_ns, found.st_size, found.st_mode,
            found.st_uid,
        )  # fmt: skip

    def _reload(self) -> None:
        now = time.time_ns()
        # Look before the read: a change during the read shows at the next look.
        seen = {file: self._look(file) for file in self._files()}
        ring = self._read()
        if ring != self._ring:
            self._ring = ring
        self._seen = seen
        self._settled = all(each is None or each[2] < now - _SETTLED_NS for each in seen.values())

    def _files(self) -> Iterator[str]:
        """Yields the paths that matter; of a directory that does not exist, its name alone."""
        yield from (".", NODE_KEY, NODE_PUBLIC, TRUSTED_KEYS, REVOKED_KEYS)
        for directory in (TRUSTED_KEYS, REVOKED_KEYS):
            try:
                names = os.listdir(f"{self.path}/{directory}")
            except OSError:
                continue  # `_read` reports it
            yield from (f"{directory}/{name}" for name in names)

    def _read(self) -> Keyring:
        try:
            with open_dir(self.path) as directory:
                _refuse_shared(os.fstat(directory.fileno()), self.uid, _OTHERS_WRITE)
                return _Reading(directory.fileno(), self.uid).ring()
        except FileNotFoundError:
            why, do = "there is no such directory", "Make the directory: quickthaw keys init."
        except (OSError, ValueError) as error:
            why, do = _why(error), _mend(self.path)
        return Keyring(problems=(Problem(self.path, why, do),), broken=f"{self.path}: {why}")


class _Reading:
    """A reading of the directory behind a descriptor."""

    def __init__(self, dirfd: int, uid: int) -> None:
        self._dirfd, self._uid = dirfd, uid
        self._problems: list[Problem] = []

    def ring(self) -> Keyring:
        own = self._own()
        revoked, unreadable = self._listed(REVOKED_KEYS, "")
        trusted, ignored = self._listed(TRUSTED_KEYS, PUBLIC_SUFFIX)
        broken = "; ".join(f"{each.file}: {each.why}" for each in unreadable)
        if own and not broken:
            self._check_public(own)
        return Keyring(own, trusted, revoked, (*self._problems, *unreadable, *ignored), broken)

    def _own(self) -> KeyEntry | None:
        try:
            key = keyfile.parse_private(read_key(self._dirfd, NODE_KEY, self._uid, _OTHERS_READ))
        except (OSError, ValueError) as error:
            self._problems.append(_of_private(error))
            return None
        return KeyEntry("this node", NODE_KEY, key.public)

    def _check_public(self, own: KeyEntry) -> None:
        """Note a problem when node.pub does not fit. Only other nodes use that file."""
        try:
            found = self._public(NODE_PUBLIC)
            if found == own.key:
                return
            why = f"it is of key {found.id}, and {NODE_KEY} is {own.key.id}"
        except (OSError, ValueError) as error:
            why = _why(error)
        problem = Problem(NODE_PUBLIC, why, "Write it again: quickthaw keys init.")
        self._problems.append(problem)

    def _listed(self, directory: str, suffix: str) -> tuple[tuple[KeyEntry, ...], list[Problem]]:
        found: list[KeyEntry] = []
        problems: list[Problem] = []
        for name in self._names(directory, problems):
            file = f"{directory}/{name}"
            try:
                if not name.endswith(suffix):
                    raise ValueError(f"its name does not end with {suffix}")
                found.append(KeyEntry(name.removesuffix(PUBLIC_SUFFIX), file, self._public(file)))
            except (OSError, ValueError) as error:
                problems.append(Problem(file, _why(error), "Mend the file, or remove it."))
        return tuple(found), problems

    def _names(self, directory: str, problems: list[Problem]) -> list[str]:
        """Returns names of files, without hidden files: of editors, and of killed changes."""
        try:
            with open_beneath(self._dirfd, directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
                _refuse_shared(os.fstat(fd.fileno()), self._uid, _OTHERS_WRITE)
                return sorted(name for name in os.listdir(fd.fileno()) if name[0] != ".")
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            do = "Let root alone write to the directory."
            problems.append(Problem(directory, _why(error), do))
            return []

    def _public(self, file: str) -> PublicKey:
        return keyfile.parse_public(read_key(self._dirfd, file, self._uid, _OTHERS_WRITE))


def read_key(dirfd: int, file: str, uid: int, forbidden: int) -> bytes:
    """Returns the content of a key file, which must be `uid`'s, without `forbidden` mode bits.

    Follows no link. Raises OSError, ValueError.
    """
    with open_beneath(dirfd, file, os.O_RDONLY | os.O_NONBLOCK) as fd:
        status = os.fstat(fd.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        _refuse_shared(status, uid, forbidden)
        return os.read(fd.fileno(), keyfile.MAX_BYTES + 1)


def _refuse_shared(status: os.stat_result, uid: int, forbidden: int) -> None:
    if status.st_uid != uid:
        raise ValueError(f"the owner is user {status.st_uid}, not {uid}")
    if (mode := stat.S_IMODE(status.st_mode)) & forbidden:
        does = "change" if forbidden == _OTHERS_WRITE else "read or change"
        raise ValueError(f"others may {does} it (mode {mode:04o})")


def _of_private(error: OSError | ValueError) -> Problem:
    if isinstance(error, FileNotFoundError):
        return Problem(NODE_KEY, "there is no such file", "Make a key: quickthaw keys init.")
    do = (
        f"If nobody else can have had it: chown root:root {NODE_KEY}; chmod 0600 {NODE_KEY}. "
        "Else make a new key with `quickthaw keys rotate`, and revoke the old key."
    )
    return Problem(NODE_KEY, _why(error), do)


def _mend(path: str) -> str:
    return f"As root: chown root:root {path}; chmod 0700 {path}."


def _why(error: OSError | ValueError) -> str:
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error)
