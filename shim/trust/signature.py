"""`manifest.sig`: who vouches for a manifest, and for all that its digests name.

What is signed is a text that nothing else of this product, or of another, has a reason to sign: a
line that names purpose and version, the id, and the content that the id is the digest of. The file
has one form only: whoever changes a byte of it makes it another signature, or none.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shim.contract import jsontext
from shim.contract import manifest as manifests
from shim.trust.keyfile import ID_DIGITS

if TYPE_CHECKING:
    from shim.contract.manifest import Manifest
    from shim.trust.keyfile import PrivateKey, PublicKey

SCHEMA: Final = 1
MAX_BYTES: Final = 1024
"""It is 200 bytes long."""
_ALGORITHM: Final = "ed25519"
_RAW_BYTES: Final = 64
_PURPOSE: Final = b"quickthaw.io snapshot manifest, signature version 1\n"
_KEY_ID = re.compile(f"[0-9a-f]{{{ID_DIGITS}}}")


@dataclass(frozen=True, slots=True)
class Signature:
    """key: the id of the key that is said to have made it. raw: 64 bytes."""

    key: str
    raw: bytes

    def encode(self) -> bytes:
        """The file as `decode` takes it."""
        fields = {
            "schema": SCHEMA, "algorithm": _ALGORITHM, "key": self.key,
            "signature": base64.b64encode(self.raw).decode(),
        }  # fmt: skip
        return json.dumps(fields).encode() + b"\n"

    def is_of(self, found: Manifest, key: PublicKey) -> bool:
        """Whether `key` made it, over exactly this manifest."""
        return self.key == key.id and key.accepts(self.raw, message(found))


def decode(data: bytes) -> Signature:
    """Raises ValueError for everything that `Signature.encode` cannot have written."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES} bytes")
    try:
        fields = jsontext.parse(data)
    except ValueError as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    schema = fields.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise ValueError(f"schema {schema}, this quickthaw reads {SCHEMA}; upgrade it")
    found = Signature(_key(fields.get("key")), _raw(fields.get("signature")))
    if found.encode() != data:
        raise ValueError("it is not in the form in which signatures are written")
    return found


def _key(value: object) -> str:
    if not isinstance(value, str) or not _KEY_ID.fullmatch(value):
        raise ValueError("it names no key")
    return value


def _raw(value: object) -> bytes:
    if not isinstance(value, str) or not value.isascii():
        raise ValueError("there is no signature in it")
    raw = base64.b64decode(value, validate=True)
    if len(raw) != _RAW_BYTES:
        raise ValueError(f"the signature has {len(raw)} bytes, not {_RAW_BYTES}")
    return raw


def sign(found: Manifest, key: PrivateKey) -> Signature:
    """The signature of `key` over the manifest."""
    return Signature(key.public.id, key.sign(message(found)))


def message(found: Manifest) -> bytes:
    """What is signed."""
    return _PURPOSE + found.id.encode() + b"\n" + manifests.content(found)
