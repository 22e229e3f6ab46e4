"""Whether other containers of a pod run while one of them is restored. Lean.

CRIU makes deleted files again by their names, as root, where another container may be writing: in
the moments in between it could put a link to a file of the node there (see `shim.capture.ghosts`).
kubelet starts one container of a pod after the other, so that those that run now are all there are.
"""

from __future__ import annotations

import os

from shim.gate.facts import entries, section

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_BEFORE, _BEHIND = "/proc/", "/ns/ipc"


def others(spec: Mapping[str, Any], proc: str = "/proc") -> str:
    """Which process may be in the way; empty when the sandbox's own is alone in the pod.

    All containers of a pod are in the IPC namespace of its sandbox. Raises OSError.
    """
    found = [
        str(each.get("path") or "")
        for each in entries(section(spec, "linux"), "namespaces")
        if each.get("type") == "ipc"
    ]
    path = found[0] if found else ""
    sandbox = path.removeprefix(_BEFORE).removesuffix(_BEHIND)
    if path != f"{_BEFORE}{sandbox}{_BEHIND}" or not sandbox.isdecimal():
        return "its IPC namespace does not tell which other containers the pod has"
    wanted = os.stat(f"{proc}/{sandbox}/ns/ipc")
    for name in filter(str.isdecimal, os.listdir(proc)):
        try:
            status = os.stat(f"{proc}/{name}/ns/ipc")
        except OSError:
            continue  # it has ended
        same = (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino)
        if same and name != sandbox:
            return f"process {name} of another container of the pod is there"
    return ""
