"""The journal's lines: one for one message, whatever names and answers of pods are in it."""

from __future__ import annotations

import logging


class OneLine(logging.Formatter):
    """Shows control characters as escapes: nobody but us can begin a line of the journal."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode()
            for char in record.message
        )
        return super().formatMessage(record)
