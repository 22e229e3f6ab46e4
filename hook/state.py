"""The OCI state that a runtime gives its hooks: bounded, only the fields that we use."""

from __future__ import annotations

from shim.contract import jsontext
from shim.contract.names import is_container_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

_MAX_BYTES = 1 << 20


class HookState:
    """container: its id. pid: its init as the host sees it, or 0. bundle: its path."""

    __slots__ = ("bundle", "container", "pid")

    def __init__(self, container: str, pid: int, bundle: str) -> None:
        self.container, self.pid, self.bundle = container, pid, bundle


def read_state(source: BinaryIO) -> HookState:
    """Raises ValueError when this is no state of a container that could be ours."""
    state = jsontext.parse(source.read(_MAX_BYTES))
    if not isinstance(state, dict):
        raise ValueError("stdin has no OCI state")
    container, pid, bundle = state.get("id"), state.get("pid") or 0, state.get("bundle") or ""
    if not isinstance(container, str) or not is_container_id(container):
        raise ValueError("the OCI state has no id of a container")
    if type(pid) is not int or not 0 <= pid < 1 << 31 or not isinstance(bundle, str):
        raise ValueError("the OCI state has an odd pid or bundle")
    return HookState(container, pid, bundle)
