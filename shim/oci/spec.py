"""Reads parts of an OCI spec leniently: a part that is missing or odd is empty. Pure and lean.

Source: OCI runtime-spec, config.md and config-linux.md.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def section(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the object `name` in `value`, empty when there is none."""
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def entries(value: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the objects in the list `name` in `value`."""
    found = value.get(name)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def is_bind(mount: Mapping[str, Any]) -> bool:
    """Whether the mount shows a directory or file of the host."""
    options = mount.get("options")
    listed = options if isinstance(options, list) else []
    return mount.get("type") == "bind" or "bind" in listed or "rbind" in listed


def memory_limit(spec: Mapping[str, Any]) -> int:
    """Returns the container's memory limit in bytes, 0 if there is no limit."""
    memory = section(section(section(spec, "linux"), "resources"), "memory")
    limit = memory.get("limit")
    return limit if isinstance(limit, int) and limit > 0 else 0
