"""Keys are made, replaced, trusted and revoked, and a kill in between costs nobody's trust."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from shim.contract.errors import KeyRefused, NoSuchKey
from shim.trust import change, keyfile
from shim.trust.keys import KeyDirectory
from tests.unit.trusting import keys_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OTHER = keyfile.make().public


@pytest.fixture
def keys(tmp_path: Path) -> KeyDirectory:
    return keys_in(tmp_path / "keys")


@pytest.fixture
def place(keys: KeyDirectory, tmp_path: Path) -> Path:
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_node_key_is_made_once_and_belongs_to_root_alone(keys: KeyDirectory, place: Path) -> None:
    before = (place / "node.key").read_bytes()
    key, made = change.initialise(keys)
    assert not made
    assert (place / "node.key").read_bytes() == before, "an upgrade never replaces it"
    assert (mode(place), mode(place / "node.key"), mode(place / "node.pub")) == (
        0o700, 0o600, 0o644,
    )  # fmt: skip
    assert keyfile.parse_public((place / "node.pub").read_bytes()) == key
    assert sorted(os.listdir(place)) == ["node.key", "node.pub", "revoked.d", "trusted.d"]


@pytest.mark.parametrize("content", [None, b"", OTHER.pem()])
def test_wrong_public_half_is_reported_and_written_again(
    keys: KeyDirectory, place: Path, content: bytes | None
) -> None:
    public = place / "node.pub"
    right = public.read_bytes()
    public.unlink()
    if content is not None:
        public.write_bytes(content)
    ring = keys.current()
    assert [each.file for each in ring.problems] == ["node.pub"]
    assert ring.own, "the private key tells whose it is"
    assert ring.signer(OTHER.id) is None
    change.initialise(keys)
    assert public.read_bytes() == right
    assert not keys.current().problems


def test_simultaneous_makers_of_the_key_make_a_single_key(tmp_path: Path) -> None:
    def make(_: int) -> tuple[str, bool]:
        keys = KeyDirectory(str(tmp_path / "keys"), uid=os.geteuid())
        key, made = change.initialise(keys)
        return key.id, made

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(make, range(16)))
    assert len({key for key, _ in made}) == 1
    assert [was_made for _, was_made in made].count(True) == 1


def test_damaged_key_is_not_replaced_without_a_request(keys: KeyDirectory, place: Path) -> None:
    (place / "node.key").write_bytes(b"damaged")
    with pytest.raises(KeyRefused, match="not a private key in PEM"):
        change.initialise(keys)
    assert (place / "node.key").read_bytes() == b"damaged"


def test_after_a_rotation_the_old_key_is_trusted_until_it_is_revoked(
    keys: KeyDirectory, place: Path
) -> None:
    old = keys.private().public
    new, former = change.rotate(keys)
    assert former
    assert (former.key, former.name) == (old, f"former-{old.id}")
    assert keys.private().public == new != old
    assert keyfile.parse_public((place / "node.pub").read_bytes()) == new
    assert keys.current().signer(old.id)
    change.revoke(keys, old.id)
    assert keys.current().signer(old.id) is None
    assert os.listdir(place / "trusted.d") == []
    assert keys.current().signer(new.id)


def test_a_key_that_others_could_read_can_be_replaced(keys: KeyDirectory, place: Path) -> None:
    (place / "node.key").chmod(0o644)
    old = keyfile.parse_private((place / "node.key").read_bytes()).public
    new, former = change.rotate(keys)
    assert former
    assert former.key == old
    assert keys.private().public == new
    assert mode(place / "node.key") == 0o600


def test_a_damaged_key_can_be_replaced(keys: KeyDirectory, place: Path) -> None:
    (place / "node.key").write_bytes(b"damaged")
    new, former = change.rotate(keys)
    assert former is None
    assert keys.private().public == new


def test_rotation_does_not_trust_a_revoked_key_again(keys: KeyDirectory, place: Path) -> None:
    old = keys.private().public
    (place / "revoked.d" / "leaked.pub").write_bytes(old.pem())
    change.rotate(keys)
    assert os.listdir(place / "trusted.d") == []
    assert keys.current().signer(old.id) is None


def test_a_key_is_trusted_once_under_its_first_name(keys: KeyDirectory, place: Path) -> None:
    assert change.trust(keys, OTHER.pem(), "node-7") == (
        keys.current().signer(OTHER.id), True,
    )  # fmt: skip
    entry, added = change.trust(keys, OTHER.pem(), "again")
    assert (entry.name, added) == ("node-7", False)
    assert os.listdir(place / "trusted.d") == ["node-7.pub"]


def test_name_belongs_to_a_single_key(keys: KeyDirectory) -> None:
    change.trust(keys, OTHER.pem(), "node-7")
    with pytest.raises(KeyRefused, match="another key has this name"):
        change.trust(keys, keyfile.make().public.pem(), "node-7")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "-x", "é", "a" * 64])
def test_a_name_is_no_path(keys: KeyDirectory, place: Path, name: str) -> None:
    with pytest.raises(KeyRefused, match="a name has letters"):
        change.trust(keys, OTHER.pem(), name)
    assert os.listdir(place / "trusted.d") == []


def test_private_key_of_another_node_is_refused(keys: KeyDirectory) -> None:
    with pytest.raises(KeyRefused, match=r"must not leave its node.*node\.pub"):
        change.trust(keys, keyfile.make().pem(), "node-7")


def test_a_revoked_key_is_not_trusted_by_mistake(keys: KeyDirectory) -> None:
    change.trust(keys, OTHER.pem(), "node-7")
    entry, added = change.revoke(keys, "node-7")
    assert (entry.key, added) == (OTHER, True)
    assert change.revoke(keys, OTHER.id)[1] is False
    with pytest.raises(KeyRefused, match="is revoked by this file"):
        change.trust(keys, OTHER.pem(), "node-7")


def test_the_key_in_use_is_rotated_before_it_is_revoked(keys: KeyDirectory) -> None:
    own = keys.private().public
    with pytest.raises(KeyRefused, match="First give the node a new key: quickthaw keys rotate"):
        change.revoke(keys, own.id)
    assert keys.private().public == own


@pytest.mark.parametrize("wanted", ["", "no-such", "0", "node.key/x"])
def test_missing_key_cannot_be_revoked(keys: KeyDirectory, wanted: str) -> None:
    with pytest.raises(NoSuchKey, match=keys.private().public.id):
        change.revoke(keys, wanted)


# Killed in between

CALLS = ("mkdir", "open", "write", "fchmod", "fsync", "rename", "unlink")


class Killed(BaseException):
    """Ends like SIGKILL: no later action of the program runs."""


@pytest.fixture
def kill_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Arm a kill before the nth system call that changes something."""
    left = [-1]

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if left[0] == 0:
                raise Killed(name)
            left[0] -= 1
            return real(*arguments, **named)

        return call

    def arm(count: int) -> None:
        left[0] = count

    for name in CALLS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    yield arm
    left[0] = -1


def killed_everywhere(
    kill_before: Callable[[int], None],
    prepare: Callable[[int], KeyDirectory],
    changes: Callable[[KeyDirectory], object],
    check: Callable[[KeyDirectory, bool], None],
) -> None:
    """Repeat the action, killed a call later each time, until it comes to its end."""
    for count in range(1000):
        keys = prepare(count)
        kill_before(count)
        try:
            changes(keys)
            ended = True
        except Killed:
            ended = False
        finally:
            kill_before(-1)
        check(KeyDirectory(keys.path, uid=keys.uid), ended)
        if ended:
            assert count > 4, "there was nothing to kill it in"
            return
    pytest.fail("it does not end")


def leftovers(keys: KeyDirectory) -> list[str]:
    return [name for _, _, names in os.walk(keys.path) for name in names if name[0] == "."]


def test_killed_rotation_costs_no_trust(tmp_path: Path, kill_before: Callable[[int], None]) -> None:
    olds: list[keyfile.PublicKey] = []

    def prepare(count: int) -> KeyDirectory:
        keys = keys_in(tmp_path / str(count))
        olds.append(keys.private().public)
        return keys

    def check(keys: KeyDirectory, ended: bool) -> None:
        ring = keys.current()
        assert ring.signer(olds[-1].id), "what the old key signed must stay of use"
        assert ring.own, "there is a whole key at every moment"
        assert ring.signer(keys.private().public.id)
        assert ended == (keys.private().public != olds[-1] and not ring.problems) or not ended
        change.initialise(keys)
        assert not keys.current().problems, "the next start mends what is half done"
        assert leftovers(keys) == []

    killed_everywhere(kill_before, prepare, change.rotate, check)


def test_next_start_completes_a_killed_creation_of_the_first_key(
    tmp_path: Path, kill_before: Callable[[int], None]
) -> None:
    def prepare(count: int) -> KeyDirectory:
        return KeyDirectory(str(tmp_path / str(count)), uid=os.geteuid())

    def check(keys: KeyDirectory, ended: bool) -> None:
        before = keys.current().own
        key, made = change.initialise(keys)
        assert made == (before is None)
        assert before is None or before.key == key, "a key that is there is never replaced"
        assert not keys.current().problems
        assert leftovers(keys) == []
        assert made is False or not ended

    killed_everywhere(kill_before, prepare, change.initialise, check)


def test_killed_revocation_is_done_or_not_at_all(
    tmp_path: Path, kill_before: Callable[[int], None]
) -> None:
    def prepare(count: int) -> KeyDirectory:
        keys = keys_in(tmp_path / str(count))
        change.trust(keys, OTHER.pem(), "node-7")
        return keys

    def check(keys: KeyDirectory, ended: bool) -> None:
        ring = keys.current()
        assert not ring.broken, "half a revocation must not stop the node"
        revoked = ring.revocation(OTHER.id) is not None
        assert (ring.signer(OTHER.id) is None) == revoked
        assert revoked or not ended
        change.revoke(keys, "node-7" if not revoked else OTHER.id)
        assert keys.current().signer(OTHER.id) is None
        assert os.listdir(f"{keys.path}/trusted.d") == []
        assert leftovers(keys) == []

    killed_everywhere(kill_before, prepare, lambda keys: change.revoke(keys, "node-7"), check)
