"""Tell systemd how we are. Source: sd_notify(3)."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send `state`, such as READY=1, to whoever started us and wants to know.

    Does nothing when nobody does, or no longer: that is no reason to fail.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(address)
            connection.sendall(state.encode())
    except OSError as error:
        log.debug("nobody takes %s at %s: %s", state, address, error)
