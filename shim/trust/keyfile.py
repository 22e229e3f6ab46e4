"""Reads and writes an Ed25519 key in a PEM file, as `openssl genpkey -algorithm ed25519` does.

Strict: a file is exactly a single key and nothing else. In a file with two keys only the first
would count, and in a list of revoked keys the second would then be trusted by mistake.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

_REFUSED: Final = (ValueError, UnsupportedAlgorithm, InternalError)
"""The exceptions of the library for files that are no key. InternalError: for a vertical tab in the
first line, among others."""
MAX_BYTES: Final = 4096
"""A key is 120 bytes long here."""
ID_DIGITS: Final = 32
"""128 bits: nobody finds a second key with the id of a given key."""


_SMALL_ORDER: Final = frozenset(
    bytes.fromhex(each)
    for each in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)
"""Points of order 1, 2, 4 and 8 (RFC 8032, 5.1) without the sign of x, also in encodings that are
not reduced. Verification accepts these points as keys, and everybody can make signatures for
them."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key. id: the first digits of the SHA-256 of `raw`, the 32 bytes of the key."""

    raw: bytes
    id: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.raw).hexdigest()
        object.__setattr__(self, "id", digest[:ID_DIGITS])

    def accepts(self, signature: bytes, message: bytes) -> bool:
        """Whether this key made `signature` over `message`."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def pem(self) -> bytes:
        """Returns the key in the form that `parse_public` reads."""
        key = Ed25519PublicKey.from_public_bytes(self.raw)
        return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class PrivateKey:
    """A private key, with which this node signs. Its content is in no message and no `repr`."""

    __slots__ = ("_key", "public")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """Returns the signature, 64 bytes."""
        return self._key.sign(message)

    def pem(self) -> bytes:
        """Returns the key in the form that `parse_private` reads: a secret."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make() -> PrivateKey:
    """Returns a new key."""
    return PrivateKey(Ed25519PrivateKey.generate())


def parse_public(data: bytes) -> PublicKey:
    """Returns the key of a PEM file of kind `PUBLIC KEY` (SPKI). Raises ValueError otherwise."""
    if b"PRIVATE KEY" in data:
        raise ValueError("a private key, which must not leave its node")
    try:
        key = load_pem_public_key(_bounded(data))
    except _REFUSED as error:
        raise ValueError("not a public key in PEM (SPKI)") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("not an Ed25519 key")
    found = PublicKey(key.public_bytes_raw())
    if _lines(data) != _lines(found.pem()):
        raise ValueError("the file has more than one key")
    if found.raw[:31] + bytes([found.raw[31] & 0x7F]) in _SMALL_ORDER:
        raise ValueError("everybody can sign for this key")
    return found


def parse_private(data: bytes) -> PrivateKey:
    """Returns the key of a PEM file of kind `PRIVATE KEY` (PKCS8). Raises ValueError otherwise."""
    try:
        key = load_pem_private_key(_bounded(data), password=None)
    except TypeError as error:
        raise ValueError("the key needs a passphrase: give a key without one") from error
    except _REFUSED as error:
        raise ValueError("not a private key in PEM (PKCS8)") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("not an Ed25519 key")
    found = PrivateKey(key)
    if _lines(data) != _lines(found.pem()):
        raise ValueError("the file has more than one key")
    return found


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} bytes")
    return data


def _lines(data: bytes) -> list[bytes]:
    """Returns the lines without the changes that mail and other systems make to line ends."""
    return [line for each in data.splitlines() if (line := each.strip())]
