"""Encodes IP addresses in CRIU's images so that a restore can overwrite them in place. Lean."""

from __future__ import annotations

import socket

WORD_BYTES = 5
"""The width of a 32-bit word: the longest varint that it can need."""


def encode_word(word: int) -> bytes:
    """Returns `word` as a padded varint of WORD_BYTES. Source: protobuf encoding."""
    groups = [(word >> 7 * index) & 0x7F for index in range(WORD_BYTES)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def address_words(address: str) -> list[int]:
    """Returns the words that CRIU stores for `address`: the raw bytes, loaded in host order."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    raw = socket.inet_pton(family, address)
    return [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]
