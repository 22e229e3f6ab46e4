"""Formats the journal's lines: one line for one message, even with names and answers of pods."""

from __future__ import annotations

import logging

_MOST_CHARS = 8 << 10
"""Length of a message. A message may quote texts of a pod, and everybody shares the journal."""


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
