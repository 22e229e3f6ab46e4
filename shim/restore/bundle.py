"""The OCI bundle of the container that is being created: only the fields that a swap needs.

Lenient, as OCI asks: unknown fields are ignored. Source: OCI runtime-spec, config.md.
"""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Bundle:
    """path: the bundle's directory. spec: its config.json."""

    __slots__ = ("path", "spec")

    def __init__(self, path: str) -> None:
        """Raises OSError or ValueError."""
        self.path = os.path.abspath(path or ".")
        with open(f"{self.path}/config.json", "rb") as file:
            self.spec: dict[str, Any] = json.load(file)

    @property
    def rootfs(self) -> str:
        """Absolute path of the mounted root file system."""
        return os.path.join(self.path, self.spec["root"]["path"])

    @property
    def environment(self) -> dict[str, str]:
        """The environment that the new container asks for."""
        pairs = (entry.partition("=") for entry in self.spec["process"].get("env") or ())
        return {name: value for name, _, value in pairs}

    @property
    def network_namespace(self) -> str:
        """Path of the sandbox's network namespace, or the empty string."""
        return self.namespace("network")

    def namespace(self, kind: str) -> str:
        """Path of the namespace that is joined, or the empty string. kind: the spec's word."""
        for namespace in self.spec.get("linux", {}).get("namespaces") or ():
            if namespace.get("type") == kind:
                return str(namespace.get("path") or "")
        return ""

    def mount_source(self, destination: str) -> str:
        """The host directory that is bind-mounted at `destination`, or the empty string."""
        for mount in self.spec.get("mounts") or ():
            bind = {"bind", "rbind"} & set(mount.get("options") or ())
            if mount.get("destination") == destination and bind:
                return str(mount.get("source") or "")
        return ""
