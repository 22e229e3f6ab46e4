"""Reads and writes `manifest.sig`: the signature over a manifest, and over all its digests.

The signed message is a text that nothing else of this product, or of another, has a reason to sign:
a line that names purpose and version, the id, and the content whose digest is the id. The file has
a single form: a change of any byte makes another signature, or none.
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
"""A signature file is 200 bytes long."""
_ALGORITHM: Final = "ed25519"
_RAW_BYTES: Final = 64
_PURPOSE: Final = b"quickthaw.io snapshot manifest, signature version 1\n"
_KEY_ID = re.compile(f"[0-9a-f]{{{ID_DIGITS}}}")


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature. key: the id of the key that is said to have made it. raw: 64 bytes."""

    key: str
    raw: bytes

    def encode(self) -> bytes:
        """Returns the file in the form that `decode` reads."""
        fields = {
            "schema": SCHEMA, "algorithm": _ALGORITHM, "key": self.key,
            "signature": base64.b64encode(self.raw).decode(),
        }  # fmt: skip
        return json.dumps(fields).encode() + b"\n"

    def is_of(self, found: Manifest, key: PublicKey) -> bool:
        """Whether `key` made this signature, over exactly this manifest."""
        return self.key == key.id and key.accepts(self.raw, message(found))


def decode(data: bytes) -> Signature:
    """Returns the signature of a file. Raises ValueError if `encode` cannot have written it."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} bytes")
    try:
        fields = jsontext.parse(data)
    except ValueError as error:
        raise ValueError("not JSON") from error
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    schema = fields.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise ValueError(f"schema {schema}, this quickthaw reads {SCHEMA}: upgrade quickthaw")
    found = Signature(_key(fields.get("key")), _raw(fields.get("signature")))
    if found.encode() != data:
        raise ValueError("not in the form in which signatures are written")
    return found


def _key(value: object) -> str:
    if not isinstance(value, str) or not _KEY_ID.fullmatch(value):
        raise ValueError("no key id")
    return value


def _raw(value: object) -> bytes:
    if not isinstance(value, str) or not value.isascii():
        raise ValueError("no signature")
    raw = base64.b64decode(value, validate=True)
    if len(raw) != _RAW_BYTES:
        raise ValueError(f"the signature has {len(raw)} bytes, not {_RAW_BYTES}")
    return raw


def sign(found: Manifest, key: PrivateKey) -> Signature:
    """Returns the signature of `key` over the manifest."""
    return Signature(key.public.id, key.sign(message(found)))


def message(found: Manifest) -> bytes:
    """Returns the bytes that are signed."""
    return _PURPOSE + found.id.encode() + b"\n" + manifests.content(found)
