"""docs/formats.md in parts, for tests: its sections, tables and examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from shim.contract import jsontext

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "formats.md"
TEXT: Final = DOCUMENT.read_text()
SECTIONS: Final = {
    part.partition("\n")[0]: part.partition("\n")[2] for part in re.split(r"^## ", TEXT, flags=re.M)
}
FORMATS: Final = [name for name in list(SECTIONS)[1:] if name != "Common rules"]
_EXAMPLE = re.compile(r"^```\w+ (\S+)\n(.*?)^```$", re.M | re.S)
EXAMPLES: Final = {label: text.strip() for label, text in _EXAMPLE.findall(TEXT)}


def rows(section: str, head: str = "field") -> list[str]:
    """Returns the names in the first column of the tables of a section that begin with `head`."""
    found = []
    for table in re.findall(rf"^\| {head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", SECTIONS[section], re.M):
        found += re.findall(r"^\| `([^`]+)`", table, re.M)
    return found


def top(section: str) -> set[str]:
    """Returns the names of a section without the fields of nested objects."""
    return {name for name in rows(section) if "." not in name}


def inside(section: str, name: str) -> set[str]:
    """Returns the fields of the object `name` in a section."""
    return {row.partition(".")[2] for row in rows(section) if row.startswith(f"{name}.")}


def octets(label: str) -> bytes:
    """Returns the bytes of an example in hexadecimal."""
    return bytes.fromhex("".join(EXAMPLES[label].split()))


def parsed(label: str) -> Any:
    """Returns an example in JSON."""
    return jsontext.parse(EXAMPLES[label])
