"""Writes images as CRIU does, for tests of the code that reads them."""

from pathlib import Path
from typing import Final

from google.protobuf.message import Message

MAGIC: Final = b"\x19\x43\x56\x54\x00\x00\x00\x00"


def image(path: Path, *messages: Message) -> None:
    """Write an image: the magic, then each message with its length before it."""
    raw = [message.SerializeToString() for message in messages]
    path.write_bytes(MAGIC + b"".join(len(each).to_bytes(4, "little") + each for each in raw))
