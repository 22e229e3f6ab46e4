"""IP addresses as CRIU's images have them, in a form that can be overwritten in place. Lean."""

from __future__ import annotations

import socket

WORD_BYTES = 5
"""Width of one 32-bit word: the longest varint that it can need."""


def encode_word(word: int) -> bytes:
    """`word` as a varint of WORD_BYTES, padded with zero groups. Source: protobuf encoding."""
    groups = [(word >> 7 * index) & 0x7F for index in range(WORD_BYTES)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def address_words(address: str) -> list[int]:
    """The words that CRIU stores for `address`: the raw bytes, loaded in host order."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    raw = socket.inet_pton(family, address)
    return [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]
