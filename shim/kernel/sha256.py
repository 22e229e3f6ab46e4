"""Hashes memory with SHA-256. Small data needs no OpenSSL, which takes 5 ms to load. Lean."""

from __future__ import annotations

try:
    from _sha2 import sha256 as _sha256  # type: ignore[import-not-found]
except ImportError:  # before Python 3.12, or a Python with OpenSSL's only
    try:
        from _sha256 import sha256 as _sha256  # type: ignore[import-not-found]
    except ImportError:
        from hashlib import sha256 as _sha256

_SMALL = 64 << 10
"""CPython's own has a third of the speed: longer data is worth the wait for OpenSSL."""


def hexdigest(data: bytes | memoryview) -> str:
    """Returns the digest of `data` in hexadecimal."""
    if len(data) <= _SMALL:
        small: str = _sha256(data).hexdigest()
        return small
    from hashlib import sha256

    return sha256(data).hexdigest()
