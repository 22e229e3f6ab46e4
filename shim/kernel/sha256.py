"""Hashes memory with SHA-256. Small data needs no OpenSSL, which takes 5 ms to load. Lean."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

try:
    from _sha2 import sha256 as _sha256  # type: ignore[import-not-found]
except ImportError:  # before Python 3.12, or a Python with OpenSSL's only
    try:
        from _sha256 import sha256 as _sha256  # type: ignore[import-not-found]
    except ImportError:
        from hashlib import sha256 as _sha256

_SMALL = 64 << 10
"""CPython's own code has a third of the speed: longer data is worth the wait for OpenSSL."""


def hexdigest(data: bytes | memoryview) -> str:
    """Returns the digest of `data` in hexadecimal."""
    if len(data) <= _SMALL:
        small: str = _sha256(data).hexdigest()
        return small
    from hashlib import sha256

    return sha256(data).hexdigest()


class Running:
    """Computes the digest of data in pieces. size: of all pieces, about."""

    __slots__ = ("_hash",)

    def __init__(self, size: int) -> None:
        self._hash: Any
        if size <= _SMALL:
            self._hash = _sha256()
        else:
            from hashlib import sha256

            self._hash = sha256()

    def update(self, data: bytes) -> None:
        """Add the next piece."""
        self._hash.update(data)

    def hexdigest(self) -> str:
        """Returns the digest of all pieces, in hexadecimal."""
        found: str = self._hash.hexdigest()
        return found
