"""The OCI state that a runtime gives its hooks: bounded, only the fields that we use."""

from __future__ import annotations

import json

from shim.contract.names import is_container_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

_MAX_BYTES = 1 << 20


class State:
    """container: its id. pid: its init as the host sees it, or 0. bundle: its path."""

    __slots__ = ("bundle", "container", "pid")

    def __init__(self, container: str, pid: int, bundle: str) -> None:
        self.container, self.pid, self.bundle = container, pid, bundle


def read_state(source: BinaryIO) -> State:
    """Raises ValueError when this is no state of a container that could be ours."""
    state = json.loads(source.read(_MAX_BYTES))
    if not isinstance(state, dict) or not is_container_id(str(state.get("id"))):
        raise ValueError("stdin has no OCI state")
    return State(str(state["id"]), int(state.get("pid") or 0), str(state.get("bundle") or ""))
