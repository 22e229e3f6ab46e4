"""Whether other containers of a pod run while one of them is restored. Lean.

CRIU makes deleted files again by their names, as root, where another container may be writing: in
the moments in between it could put a link to a file of the node there (see `shim.capture.ghosts`).
kubelet starts one container of a pod after the other, so that those that run now are all there are.
"""

from __future__ import annotations

import os
import re

from shim.gate.facts import entries, section

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_SANDBOX = re.compile(r"/proc/(\d+)/ns/ipc")


def others(spec: Mapping[str, Any], proc: str = "/proc") -> str:
    """Which process may be in the way; empty when the sandbox's own is alone in the pod.

    All containers of a pod are in the IPC namespace of its sandbox. Raises OSError.
    """
    found = [
        str(each.get("path") or "")
        for each in entries(section(spec, "linux"), "namespaces")
        if each.get("type") == "ipc"
    ]
    sandbox = _SANDBOX.fullmatch(found[0]) if found else None
    if sandbox is None:
        return "its IPC namespace does not tell which other containers the pod has"
    wanted = os.stat(f"{proc}/{sandbox[1]}/ns/ipc")
    for name in filter(str.isdecimal, os.listdir(proc)):
        try:
            status = os.stat(f"{proc}/{name}/ns/ipc")
        except OSError:
            continue  # it has ended
        same = (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino)
        if same and name != sandbox[1]:
            return f"process {name} of another container of the pod is there"
    return ""
