"""Only a snapshot that a trusted key has signed is used; each test is an attack that must not
succeed.
"""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.contract import manifest as manifests
from shim.contract.errors import BadManifest, NotCapturable, NotPublished
from shim.kernel.beneath import open_dir
from shim.store.store import Store
from shim.trust import change, keyfile, signature, verdict
from shim.trust.keyfile import PublicKey
from shim.trust.keys import KeyDirectory, KeyEntry, Keyring
from shim.trust.signature import Signature
from shim.trust.verdict import Trust, Verdict, judge
from tests.unit.manifests import SOURCE, fields, made
from tests.unit.trusting import keys_in

if TYPE_CHECKING:
    from pathlib import Path

    from shim.contract.manifest import File, Manifest

OWN, FOREIGN = keyfile.make(), keyfile.make()
RING = Keyring(own=KeyEntry("this node", "node.key", OWN.public))
SIGNED = made()
FILE = signature.sign(SIGNED, OWN).encode()


def states(data: bytes, found: Manifest = SIGNED, ring: Keyring = RING) -> str:
    return judge(found, data, ring).state


def test_snapshot_signed_by_this_node_is_trusted() -> None:
    found = judge(SIGNED, FILE, RING)
    assert (found.trusted, found.key, found.signer) == (True, OWN.public.id, "this node")


def test_snapshot_signed_by_another_node_is_trusted_once_its_key_is() -> None:
    theirs = signature.sign(SIGNED, FOREIGN).encode()
    found = judge(SIGNED, theirs, RING)
    assert found.state == "unknown-key"
    assert FOREIGN.public.id in str(found), "the operator must be told which key it is"
    assert "quickthaw keys trust" in str(found)
    other = KeyEntry("node-7", "trusted.d/node-7.pub", FOREIGN.public)
    assert judge(SIGNED, theirs, Keyring(trusted=(other,))).signer == "node-7"


@pytest.mark.parametrize("also", [{"own": RING.own}, {"trusted": (RING.own,)}])
def test_revoked_key_is_never_trusted_wherever_else_it_lies(also: dict[str, KeyEntry]) -> None:
    revoked = KeyEntry("lost", "revoked.d/lost.pub", OWN.public)
    found = judge(SIGNED, FILE, Keyring(**also, revoked=(revoked,)))  # type: ignore[arg-type]
    assert found.state == "revoked"
    assert "revoked.d/lost.pub" in str(found)


def test_unsigned_snapshot_is_not_trusted() -> None:
    assert states(b"") == "none"


def test_unreadable_keys_make_every_snapshot_untrusted() -> None:
    ring = Keyring(own=RING.own, broken="revoked.d/x.pub: it is a link")
    found = judge(SIGNED, FILE, ring)
    assert (found.state, "revoked.d/x.pub" in str(found)) == ("no-keys", True)


@pytest.mark.parametrize("bit", range(8))
def test_no_bit_of_the_signature_file_may_change(bit: int) -> None:
    for place in range(len(FILE)):
        changed = bytearray(FILE)
        changed[place] ^= 1 << bit
        found = judge(SIGNED, bytes(changed), RING)
        assert not found.trusted, f"byte {place} was changed to {bytes(changed)!r}"


def test_no_byte_of_the_signature_file_may_be_missing_or_added() -> None:
    for length in range(len(FILE)):
        assert states(FILE[:length]) in ("none", "malformed")
    for more in (b" ", b"\n", b"\0", FILE):
        assert states(FILE + more) == states(more + FILE) == "malformed"


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2}, {"schema": 0}, {"schema": True}, {"schema": 1.0}, {"algorithm": "none"},
        {"algorithm": "ed448"}, {"key": OWN.public.id.upper()}, {"key": OWN.public.id[:8]},
        {"key": None}, {"signature": ""}, {"signature": None}, {"more": 1},
        {"signature": base64.b64encode(b"x" * 63).decode()}, {"signature": "é" * 88},
    ],
)  # fmt: skip
def test_other_form_of_the_signature_file_is_refused(changes: dict[str, object]) -> None:
    data = json.dumps(json.loads(FILE) | changes).encode() + b"\n"
    assert states(data) == "malformed"


def test_duplicate_name_is_refused() -> None:
    twice = FILE.replace(b"{", b'{"key": "' + b"0" * 32 + b'", ', 1)
    assert json.loads(twice) == json.loads(FILE)
    assert states(twice) == "malformed"


def test_base64_with_unused_bits_set_is_refused() -> None:
    """`…Q==` and `…R==` are the same byte: without a check the file would have many forms."""
    encoded = base64.b64encode(OWN.sign(b"")).decode()
    loose = encoded[:-3] + chr(ord(encoded[-3]) + 1) + "=="
    assert base64.b64decode(loose, validate=True) == base64.b64decode(encoded)
    fields = json.loads(FILE) | {"signature": loose}
    assert states(json.dumps(fields).encode() + b"\n") == "malformed"


def test_signature_of_another_manifest_is_refused() -> None:
    other = made(name="other")
    assert states(signature.sign(other, OWN).encode()) == "invalid"


def test_rewritten_manifest_with_a_new_id_needs_a_new_signature() -> None:
    rewritten = made(facts={"user": '{"uid":0}'})
    assert manifests.decode(rewritten.encode()) == rewritten, "by itself it is without fault"
    assert states(FILE, rewritten) == "invalid"


@pytest.mark.parametrize(
    "message",
    [
        manifests.content(SIGNED),
        SIGNED.id.encode(),
        SIGNED.encode(),
        signature.message(SIGNED).replace(b"version 1", b"version 2"),
        signature.message(SIGNED).partition(b"\n")[2],
        signature.message(SIGNED) + b"\n",
    ],
)
def test_signature_for_another_purpose_is_refused(message: bytes) -> None:
    signed = Signature(OWN.public.id, OWN.sign(message)).encode()
    assert states(signed) == "invalid"


def test_key_under_the_id_of_a_trusted_key_is_refused() -> None:
    raw = FOREIGN.sign(signature.message(SIGNED))
    assert states(Signature(OWN.public.id, raw).encode()) == "invalid"


def test_id_and_content_of_a_manifest_are_both_signed() -> None:
    """A manifest that was not decoded, and whose id therefore nobody has compared."""
    forged = manifests.Manifest(**{**made(name="forged").as_json(), "id": SIGNED.id})
    assert states(FILE, forged) == "invalid"
    renamed = manifests.Manifest(**{**SIGNED.as_json(), "id": "f" * 64})
    assert states(FILE, renamed) == "invalid"


def test_attacks_succeed_without_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this test, the tests above could pass for another reason than the verification."""
    monkeypatch.setattr(PublicKey, "accepts", lambda *_: True)
    assert states(signature.sign(made(name="other"), OWN).encode()) == "valid"
    assert states(FILE, made(facts={"user": '{"uid":0}'})) == "valid"
    assert states(Signature(OWN.public.id, b"\0" * 64).encode()) == "valid"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@given(st.binary(max_size=300) | json_values.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_make_the_parser_raise_another_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not |no |schema|longer than|the signature has"):
        signature.decode(data)


@given(st.fixed_dictionaries(
    {"schema": st.just(1), "algorithm": st.just("ed25519"), "key": st.just("a" * 32),
     "signature": st.text("AQgw=\n ", max_size=90) | json_values},
))  # fmt: skip
def test_parsed_signature_is_written_the_same(parts: dict[str, object]) -> None:
    data = json.dumps(parts).encode() + b"\n"
    try:
        found = signature.decode(data)
    except ValueError:
        return
    assert found.encode() == data


changed_fields = st.one_of(
    st.fixed_dictionaries({"name": st.from_regex(r"[a-z]{1,9}", fullmatch=True)}),
    st.fixed_dictionaries({"created_at": st.floats(0, 2e9)}),
    st.fixed_dictionaries({"facts": st.dictionaries(st.text(max_size=5), st.text(max_size=5))}),
    st.fixed_dictionaries({"network": st.dictionaries(st.text(max_size=5), st.integers())}),
    st.fixed_dictionaries({"source": st.text(max_size=9).map(lambda pod: {**SOURCE, "pod": pod})}),
    st.fixed_dictionaries(
        {"requires": st.integers(0, 1 << 40).map(lambda size: {"memory_bytes": size})}
    ),
)


@given(changed_fields, changed_fields)
@settings(max_examples=60)
def test_signature_fits_a_single_manifest(
    first: dict[str, object], second: dict[str, object]
) -> None:
    one, other = made(**first), made(**second)
    signed = signature.sign(one, OWN)
    assert signed.is_of(one, OWN.public)
    assert signed.is_of(other, OWN.public) == (one == other)


# In the store


@pytest.fixture
def keys(tmp_path: Path) -> KeyDirectory:
    return keys_in(tmp_path / "keys")


@pytest.fixture
def store(tmp_path: Path, keys: KeyDirectory) -> Store:
    found = Store(str(tmp_path / "store"), sign=keys.sign)
    found.open()
    return found


def publish(store: Store, **changed: object) -> Manifest:
    def describe(files: tuple[File, ...]) -> Manifest:
        return manifests.build(**fields(files=files, **changed))

    with store.staged() as staged:
        (staged / "criu").mkdir()
        (staged / "criu/pages-1.img").write_bytes(b"x" * 4096)
        return store.publish(staged, describe)


def verdict_of(store: Store, keys: KeyDirectory, found: Manifest) -> Verdict:
    return Trust(keys, store.signature_of).verdict(found)


def test_published_snapshot_is_signed(store: Store, keys: KeyDirectory) -> None:
    found = publish(store)
    file = store.snapshots / found.id / "manifest.sig"
    assert file.stat().st_mode & 0o777 == 0o600
    assert signature.decode(file.read_bytes()).key == keys.private().public.id
    assert verdict_of(store, keys, found).trusted
    again = Store(str(store.root))
    again.open()
    assert verdict_of(again, keys, found).trusted, "a daemon that starts again trusts it, too"


def test_store_without_a_key_publishes_no_trusted_snapshot(
    tmp_path: Path, keys: KeyDirectory
) -> None:
    unsigned = Store(str(tmp_path / "unsigned"))
    unsigned.open()
    assert verdict_of(unsigned, keys, publish(unsigned)).state == "none"


def test_unsignable_snapshot_is_not_published(store: Store, keys: KeyDirectory) -> None:
    os.chmod(f"{keys.path}/node.key", 0o644)
    with pytest.raises(NotPublished, match=r"node\.key.*mode 0644.*chmod 0600"):
        publish(store)
    assert not list(store.snapshots.iterdir())
    with pytest.raises(NotCapturable, match=r"node\.key.*chmod 0600"):
        Trust(keys, store.signature_of).check_signing("c1")


@pytest.mark.parametrize("as_what", ["missing", "a link", "a fifo", "a directory", "too long"])
def test_signature_that_is_no_small_regular_file_is_refused(
    store: Store, keys: KeyDirectory, as_what: str, tmp_path: Path
) -> None:
    found = publish(store)
    file = store.snapshots / found.id / "manifest.sig"
    content = file.read_bytes()
    file.unlink()
    if as_what == "a link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    if as_what == "a fifo":
        os.mkfifo(file)
    if as_what == "a directory":
        file.mkdir()
    if as_what == "too long":
        file.write_bytes(content + b" " * signature.MAX_BYTES)
    store.open()
    assert store.all() == [found], "it is listed all the same"
    expected = "none" if as_what == "missing" else "malformed"
    assert verdict_of(store, keys, found).state == expected


def test_a_verdict_follows_the_keys_and_the_file(
    store: Store, keys: KeyDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "ONE_LOOK_S", -1)
    found, trust = publish(store), Trust(keys, store.signature_of)
    old = keys.private().public.id
    assert trust.verdict(found).trusted
    change.rotate(keys)
    assert (trust.verdict(found).trusted, trust.verdict(found).signer) == (True, f"former-{old}")
    change.revoke(keys, old)
    assert trust.verdict(found).state == "revoked"
    resigned = signature.sign(found, keys.private()).encode()
    (store.snapshots / found.id / "manifest.sig").write_bytes(resigned)
    store.read_index()
    assert trust.verdict(found).trusted


def test_a_signature_is_verified_once(
    store: Store, keys: KeyDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, trust = publish(store), Trust(keys, store.signature_of)
    asked: list[bytes] = []
    accepts = PublicKey.accepts

    def counted(key: PublicKey, raw: bytes, message: bytes) -> bool:
        asked.append(key.raw)
        return accepts(key, raw, message)

    monkeypatch.setattr(PublicKey, "accepts", counted)
    assert all(trust.verdict(found).trusted for _ in range(100))
    assert len(asked) == 1


def test_signature_is_removed_with_its_snapshot(store: Store) -> None:
    found = publish(store)
    store.remove(found.id, users=[])
    assert store.signature_of(found.id) == b""


# The link that the swap checks, which never sees a signature


def test_swap_accepts_only_the_manifest_that_was_signed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ticket has the id whose signature was verified: no other content has that id."""
    found = publish(store)
    place = store.snapshots / found.id
    forged = manifests.build(**{**_content(found), "facts": {"user": '{"uid":0}'}})
    as_signed = manifests.Manifest(**{**forged.as_json(), "id": found.id})

    def read() -> Manifest:
        with open_dir(str(place)) as directory:
            return manifests.read(directory.fileno(), snapshot=found.id)

    assert read() == found
    for written in (forged, as_signed):
        (place / "manifest.json").write_bytes(written.encode())
        with pytest.raises(BadManifest):
            read()
    monkeypatch.setattr(manifests, "_digest", lambda manifest: manifest.id)
    assert read().facts == {"user": '{"uid":0}'}, "it is the digest that refuses"


def _content(found: Manifest) -> dict[str, object]:
    fields = found.as_json()
    del fields["id"], fields["created"]
    return fields
