"""The journal's lines: one for one message, whatever names and answers of pods are in it."""

from __future__ import annotations

import logging

_MOST_CHARS = 8 << 10
"""Of one message. A message may have texts of a pod in it, and the journal is everybody's."""


class OneLine(logging.Formatter):
    """Shows control characters as escapes: nobody but us can begin a line of the journal."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        message = record.message
        if len(message) > _MOST_CHARS:
            message = f"{message[:_MOST_CHARS]}… ({len(message)} characters)"
        if not message.isprintable():
            message = "".join(
                char if char.isprintable() else char.encode("unicode_escape").decode()
                for char in message
            )
        record.message = message
        return super().formatMessage(record)
