"""The ways by name. Each is imported when it is used: a container without GPUs pays for none."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.gpu.way import Way

DRIVER = "driver"


def named(name: str) -> Way:
    """Raises ValueError for a way that this quickthaw does not know."""
    if name == DRIVER:
        from shim.gpu.driverway import DriverWay

        return DriverWay()
    raise ValueError(f"no such way to carry device memory: {name!r:.40}; upgrade quickthaw")
