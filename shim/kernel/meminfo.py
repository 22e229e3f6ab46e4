"""Tells how much memory the machine can still give. Source: proc_meminfo(5)."""

from __future__ import annotations


def available_bytes() -> int:
    """Returns MemAvailable, the memory to be had without swapping. Raises OSError, ValueError."""
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo has no MemAvailable")
