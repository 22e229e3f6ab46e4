"""Prints the output of a verb: a table for a terminal, aligned plain text for a pipe, or JSON.

Text of a pod's author never reaches a terminal raw: control characters are shown escaped.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shim.contract.errors import QuickthawError

NOTHING: Final = "-"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class Output:
    """The standard output of a run, in one of the three forms, and notes on standard error."""

    def __init__(self, *, as_json: bool, out: TextIO, notes: TextIO) -> None:
        self.as_json, self._out, self._notes = as_json, out, notes

    def json(self, value: object) -> None:
        """Print the whole answer for a program."""
        self._out.write(json.dumps(value, indent=2) + "\n")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print rows of cells under their headings."""
        safe = [[printable(cell) or NOTHING for cell in row] for row in rows]
        if self._out.isatty():
            self._rich(columns, safe)
            return
        widths = [max(map(len, column)) for column in zip(columns, *safe, strict=True)]
        for row in [columns, *safe]:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self._out.write("  ".join(cells).rstrip() + "\n")

    def fields(self, values: Mapping[str, str]) -> None:
        """Print each value on a line, after its name."""
        width = max(map(len, values), default=0) + 2
        for name, value in values.items():
            self.line(f"{name + ':':<{width}}{value or NOTHING}")

    def line(self, text: str = "") -> None:
        """Print a line."""
        self._out.write(printable(text) + "\n")

    def note(self, text: str) -> None:
        """Print a note for the person, not for a program that reads our output."""
        self._notes.write(f"quickthaw: {printable(text)}\n")

    def error(self, error: QuickthawError) -> None:
        """Print the error with the notes that were added to it; for a program all its parts."""
        if self.as_json:
            parts = {"what": error.what, "about": error.about, "why": error.why, "do": error.do}
            told = {
                "class": type(error).__name__, "effect": error.effect, "exit_code": error.exit_code
            }  # fmt: skip
            self.json({"error": parts | told})
        self.note(str(error))
        for note in getattr(error, "__notes__", ()):
            self.note(f"  {note}")

    def progress(self, text: str) -> None:
        """Print a note if a person watches."""
        if self._notes.isatty():
            self.note(text)

    def _rich(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.console import Console  # here: output to a pipe need not pay for this
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console(file=self._out, width=shutil.get_terminal_size().columns).print(table)


def to_streams(*, as_json: bool) -> Output:
    """Returns the output of this process."""
    return Output(as_json=as_json, out=sys.stdout, notes=sys.stderr)


def printable(text: str) -> str:
    """Returns `text` with escapes for all characters on which a terminal would act."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def size(found: Any) -> str:
    """Returns bytes for people: 1.5 GiB."""
    if not isinstance(found, int | float):
        return NOTHING
    value, unit = float(found), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{value:.0f} B"


def duration(found: Any) -> str:
    """Returns seconds for people, in two units at most: 45s, 3m20s, 2h5m, 3d4h."""
    if not isinstance(found, int | float):
        return NOTHING
    seconds = max(0, int(found))
    for unit, length, below, below_length in (
        ("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1),
    ):  # fmt: skip
        if seconds >= length:
            return f"{seconds // length}{unit}{seconds % length // below_length}{below}"
    return f"{seconds}s"


def age(created_at: Any) -> str:
    """Returns how long ago a Unix time was."""
    if not isinstance(created_at, int | float):
        return NOTHING
    return duration(time.time() - created_at)
