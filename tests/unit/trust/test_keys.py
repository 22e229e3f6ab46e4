"""Which keys count: by kind, by owner and mode, and as they are at this moment."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from shim.contract.errors import KeyRefused
from shim.trust import change, keyfile
from shim.trust.keys import KeyDirectory
from tests.unit.trusting import keys_in

if TYPE_CHECKING:
    from pathlib import Path

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
OTHER = keyfile.make().public
PRIVATE_OF_ANOTHER_KIND: dict[
    str,
    rsa.RSAPrivateKey
    | ec.EllipticCurvePrivateKey
    | ed448.Ed448PrivateKey
    | x25519.X25519PrivateKey,
] = {
    "rsa": rsa.generate_private_key(65537, 2048),
    "ec": ec.generate_private_key(ec.SECP256R1()),
    "ed448": ed448.Ed448PrivateKey.generate(),
    "x25519": x25519.X25519PrivateKey.generate(),
}


@pytest.fixture
def keys(tmp_path: Path) -> KeyDirectory:
    return keys_in(tmp_path / "keys")


@pytest.fixture
def place(keys: KeyDirectory, tmp_path: Path) -> Path:
    return tmp_path / "keys"


def trusted(keys: KeyDirectory) -> set[str]:
    """Returns the ids of the keys that count."""
    ring = keys.current()
    known = [*([ring.own] if ring.own else []), *ring.trusted]
    return {entry.key.id for entry in known if ring.signer(entry.key.id)}


# The files


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
def test_keys_made_by_openssl_are_accepted(keys: KeyDirectory, place: Path) -> None:
    private = place / "node.key"
    private.unlink()
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    private.chmod(0o600)
    written = subprocess.run(
        ["openssl", "pkey", "-in", private, "-pubout"], check=True, capture_output=True
    ).stdout
    key = keys.private()
    assert keyfile.parse_public(written) == key.public
    assert key.public.accepts(key.sign(b"x"), b"x")
    assert (key.pem(), key.public.pem()) == (private.read_bytes(), written)
    other = keys_in(place.parent / "of another node")
    assert change.trust(other, written, "node-7")[1]
    assert key.public.id in trusted(other)


@pytest.mark.parametrize("kind", PRIVATE_OF_ANOTHER_KIND)
def test_a_key_of_another_kind_is_refused(kind: str) -> None:
    private = PRIVATE_OF_ANOTHER_KIND[kind]
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(ValueError, match="not an Ed25519 key"):
        keyfile.parse_public(public)
    with pytest.raises(ValueError, match="not an Ed25519 key"):
        keyfile.parse_private(
            private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )


def test_an_encrypted_private_key_is_refused() -> None:
    private = keyfile.make()._key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    with pytest.raises(ValueError, match="passphrase"):
        keyfile.parse_private(private)


def test_key_file_has_a_single_key_and_nothing_else() -> None:
    """In a list of revoked keys a second key would go on being trusted."""
    for data in (OTHER.pem() * 2, b"# old\n" + OTHER.pem(), OTHER.pem() + keyfile.make().pem(),
                 OTHER.pem()[:-5], OTHER.raw, b"", b"\0", OTHER.pem() + b" " * 5000):  # fmt: skip
        with pytest.raises(ValueError, match=r"not an? |private key|more than one|longer than"):
            keyfile.parse_public(data)
    secret = keyfile.make().pem()
    with pytest.raises(ValueError, match="more than one key"):
        keyfile.parse_private(secret * 2)


def test_key_of_small_order_is_refused() -> None:
    """A point of small order: verification uses a multiple of the point, which is often zero."""
    for raw in keyfile._SMALL_ORDER:
        for sign in (0, 0x80):
            weak = keyfile.PublicKey(raw[:31] + bytes([raw[31] | sign]))
            with pytest.raises(ValueError, match="everybody can sign"):
                keyfile.parse_public(weak.pem())
    nothing = keyfile.PublicKey(bytes(32))
    forged = [nothing.accepts(bytes(64), str(turn).encode()) for turn in range(64)]
    assert any(forged), "this is what would be open to everybody"


def test_refused_keys_are_all_points_of_small_order() -> None:
    """Eight of them on the curve, as arithmetic tells, which the list shall not be believed."""
    found = {int.from_bytes(raw, "little") % P for raw in keyfile._SMALL_ORDER}
    assert found == small_order_ys()


P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P


def small_order_ys() -> set[int]:
    """Returns the y of all points whose eightfold is the neutral point.

    Order 1 and 2: y = 1, -1. Order 4: y = 0. Order 8: their double has y = 0, so x^2 = -y^2, and on
    the curve -x^2 + y^2 = 1 + D x^2 y^2 that is D y^4 + 2 y^2 - 1 = 0.
    """
    root = square_root((1 + D) % P)
    assert root is not None
    squares = [(-1 + sign * root) * pow(D, -1, P) % P for sign in (1, -1)]
    roots = [y for square in squares if (y := square_root(square)) is not None]
    return {0, 1, P - 1} | {y % P for y in roots} | {-y % P for y in roots}


def square_root(value: int) -> int | None:
    """Source: RFC 8032, 5.1.3, for a prime that is 5 modulo 8."""
    root = pow(value, (P + 3) // 8, P)
    for candidate in (root, root * pow(2, (P - 1) // 4, P) % P):
        if candidate * candidate % P == value % P:
            return candidate
    return None


def test_key_file_with_foreign_line_ends_is_still_the_key() -> None:
    assert keyfile.parse_public(OTHER.pem().replace(b"\n", b"\r\n")) == OTHER
    assert keyfile.parse_public(b"\n" + OTHER.pem().strip()) == OTHER


@given(st.binary(max_size=200).flatmap(
    lambda data: st.sampled_from([data, OTHER.pem()[:40] + data, OTHER.pem() + data])
))  # fmt: skip
def test_no_bytes_make_the_parsers_raise_another_error(data: bytes) -> None:
    for parse in (keyfile.parse_public, keyfile.parse_private):
        try:
            parse(data)
        except ValueError:
            continue
        assert data.split() == OTHER.pem().split()


def test_no_message_holds_the_private_key(keys: KeyDirectory, place: Path) -> None:
    secret = (place / "node.key").read_text().splitlines()[1]
    (place / "node.key").chmod(0o644)
    with pytest.raises(KeyRefused) as refused:
        keys.private()
    assert secret not in str(refused.value) + repr(keyfile.parse_private(
        (place / "node.key").read_bytes()
    )) + str(keys.current())  # fmt: skip


# Owners and modes


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o660, 0o644, 0o666, 0o610])
def test_a_private_key_that_others_can_touch_is_refused(
    keys: KeyDirectory, place: Path, mode: int
) -> None:
    own = keys.private().public.id
    (place / "node.key").chmod(mode)
    with pytest.raises(KeyRefused, match=rf"node\.key.*mode {mode:04o}.*chmod 0600"):
        keys.private()
    assert own not in trusted(keys)
    with pytest.raises(KeyRefused, match="chmod 0600"):
        change.initialise(keys)
    (place / "node.key").chmod(0o600)
    assert own in trusted(keys)


@AS_ROOT
@pytest.mark.parametrize("file", ["node.key", ".", "trusted.d/other.pub", "trusted.d"])
def test_key_of_another_user_does_not_count(keys: KeyDirectory, place: Path, file: str) -> None:
    change.trust(keys, OTHER.pem(), "other")
    own = keys.private().public.id
    assert trusted(keys) == {own, OTHER.id}
    os.chown(place / file, 4711, 4711)
    left = {"node.key": {OTHER.id}, ".": set()}.get(file, {own})
    assert trusted(keys) == left
    assert any("user 4711" in each.why for each in keys.current().problems)


@pytest.mark.parametrize("file", ["trusted.d/other.pub", "trusted.d", "."])
def test_key_that_others_can_write_does_not_count(
    keys: KeyDirectory, place: Path, file: str
) -> None:
    change.trust(keys, OTHER.pem(), "other")
    (place / file).chmod((place / file).stat().st_mode | 0o020)
    assert OTHER.id not in trusted(keys)
    assert any("others may change it" in str(each) for each in keys.current().problems)


def test_a_key_behind_a_link_does_not_count(keys: KeyDirectory, place: Path) -> None:
    (place.parent / "elsewhere.pub").write_bytes(OTHER.pem())
    (place / "trusted.d" / "other.pub").symlink_to(place.parent / "elsewhere.pub")
    assert OTHER.id not in trusted(keys)
    os.rename(place / "node.key", place / "real.key")
    (place / "node.key").symlink_to("real.key")
    with pytest.raises(KeyRefused):
        keys.private()


def test_fifo_in_the_place_of_a_key_blocks_nobody(keys: KeyDirectory, place: Path) -> None:
    own = keys.private().public.id
    os.mkfifo(place / "trusted.d" / "other.pub", 0o600)
    assert trusted(keys) == {own}
    assert [each.why for each in keys.current().problems] == ["not a regular file"]


def test_only_pub_files_are_trusted(keys: KeyDirectory, place: Path) -> None:
    (place / "trusted.d" / "other.pem").write_bytes(OTHER.pem())
    (place / "trusted.d" / ".other.pub.swp").write_bytes(OTHER.pem())
    assert OTHER.id not in trusted(keys)
    assert [each.file for each in keys.current().problems] == ["trusted.d/other.pem"]


@pytest.mark.parametrize("name", ["other.pub", "other", "other.pem"])
def test_file_in_revoked_d_revokes_whatever_its_name(
    keys: KeyDirectory, place: Path, name: str
) -> None:
    change.trust(keys, OTHER.pem(), "other")
    (place / "revoked.d" / name).write_bytes(OTHER.pem())
    assert OTHER.id not in trusted(keys)
    assert keys.current().revocation(OTHER.id)


@pytest.mark.parametrize("how", ["damaged", "a link", "writable by others", "a closed directory"])
def test_unreadable_revocation_makes_every_key_untrusted(
    keys: KeyDirectory, place: Path, how: str
) -> None:
    file = place / "revoked.d" / "lost.pub"
    file.write_bytes(b"x" if how == "damaged" else OTHER.pem())
    if how == "a link":
        os.rename(file, place / "lost")
        file.symlink_to(place / "lost")
    if how == "writable by others":
        file.chmod(0o666)
    if how == "a closed directory":
        (place / "revoked.d").chmod(0o777)
    assert trusted(keys) == set()
    assert "revoked.d" in keys.current().broken
    with pytest.raises(KeyRefused, match=r"revoked\.d"):
        keys.private()


def test_missing_directory_holds_no_keys(tmp_path: Path) -> None:
    keys = KeyDirectory(str(tmp_path / "none"), uid=os.geteuid())
    assert "quickthaw keys init" in str(keys.current().problems[0])
    with pytest.raises(KeyRefused, match="no such directory"):
        keys.private()


def test_a_revoked_node_key_signs_nothing(keys: KeyDirectory, place: Path) -> None:
    own = keys.private().public
    (place / "revoked.d" / "own.pub").write_bytes(own.pem())
    with pytest.raises(KeyRefused, match=r"revoked by revoked\.d/own\.pub.*keys rotate"):
        keys.private()


# Changes


def test_key_rewritten_in_place_is_noticed_at_once(keys: KeyDirectory, place: Path) -> None:
    """As often as the disk can: also within one step of the file's time, and of equal length."""
    both = [OTHER, keyfile.make().public]
    file = place / "trusted.d" / "other.pub"
    for turn in range(300):
        file.write_bytes(both[turn % 2].pem())
        assert both[turn % 2].id in trusted(keys)
        assert both[1 - turn % 2].id not in trusted(keys), "a look that comes too early must count"


def test_key_replaced_with_the_same_modification_time_is_noticed(
    keys: KeyDirectory, place: Path
) -> None:
    """`cp -p` and rsync set the time at which a file was modified."""
    change.trust(keys, OTHER.pem(), "other")
    file, new = place / "trusted.d" / "other.pub", keyfile.make().public
    settle(keys)
    before = file.stat()
    file.write_bytes(new.pem())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert trusted(keys) >= {new.id}
    assert OTHER.id not in trusted(keys)


def settle(keys: KeyDirectory) -> None:
    """Lets the reader of the keys believe that the files last changed long ago."""
    keys.current()
    keys._settled = True


def test_files_that_have_not_changed_are_not_read_again(
    keys: KeyDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    ring = keys.reread()
    monkeypatch.setattr(keys, "_read", lambda: pytest.fail("nothing has changed"))
    assert keys.current() is ring


def test_a_clock_that_was_set_back_costs_time_and_no_trust(
    keys: KeyDirectory, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    assert OTHER.id not in trusted(keys)
    (place / "trusted.d" / "other.pub").write_bytes(OTHER.pem())
    assert OTHER.id in trusted(keys)
    (place / "trusted.d" / "other.pub").unlink()
    assert OTHER.id not in trusted(keys)


def test_every_change_is_noticed_without_a_restart(keys: KeyDirectory, place: Path) -> None:
    own = keys.private().public.id
    settle(keys)
    change.trust(keys, OTHER.pem(), "other")
    settle(keys)
    assert trusted(keys) == {own, OTHER.id}
    settle(keys)
    (place / "trusted.d" / "other.pub").rename(place / "revoked.d" / "other.pub")
    assert trusted(keys) == {own}
    settle(keys)
    shutil.rmtree(place / "revoked.d")
    change.trust(keys, OTHER.pem(), "other")
    settle(keys)
    assert trusted(keys) == {own, OTHER.id}
    settle(keys)
    (place / "node.key").chmod(0o644)
    assert trusted(keys) == {OTHER.id}
