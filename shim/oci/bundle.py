"""Reads the OCI bundle of the container that is being created: only the fields that a swap needs.

Lenient, as OCI asks: ignores unknown fields. Source: OCI runtime-spec, config.md.
"""

from __future__ import annotations

import os

from shim.contract import jsontext
from shim.oci.spec import entries, is_bind, section

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Bundle:
    """path: the bundle's directory. spec: its config.json."""

    __slots__ = ("path", "spec")

    def __init__(self, path: str) -> None:
        """Raises OSError; ValueError if config.json is no object, or names no root."""
        self.path = os.path.abspath(path or ".")
        with open(f"{self.path}/config.json", "rb") as file:
            spec = jsontext.parse(file.read())
        if not isinstance(spec, dict) or not isinstance(section(spec, "root").get("path"), str):
            raise ValueError("config.json is no OCI configuration")
        self.spec: dict[str, Any] = spec

    @property
    def rootfs(self) -> str:
        """The absolute path of the mounted root file system."""
        return os.path.join(self.path, self.spec["root"]["path"])

    @property
    def environment(self) -> dict[str, str]:
        """The environment that the new container asks for."""
        listed = section(self.spec, "process").get("env")
        found = listed if isinstance(listed, list) else []
        texts = (entry for entry in found if isinstance(entry, str))
        pairs = (entry.partition("=") for entry in texts)
        return {name: value for name, _, value in pairs}

    @property
    def owner(self) -> tuple[int, int]:
        """The host's user and group ID of the container's process; root's if none is mapped."""
        user, linux = section(section(self.spec, "process"), "user"), section(self.spec, "linux")
        return (
            _on_host(user.get("uid"), entries(linux, "uidMappings")),
            _on_host(user.get("gid"), entries(linux, "gidMappings")),
        )

    @property
    def network_namespace(self) -> str:
        """The path of the sandbox's network namespace, or the empty string."""
        return self.namespace("network")

    def namespace(self, kind: str) -> str:
        """Returns the path of the namespace to join, or the empty string. kind: the spec's word."""
        for namespace in entries(section(self.spec, "linux"), "namespaces"):
            if namespace.get("type") == kind:
                return str(namespace.get("path") or "")
        return ""

    def mount_source(self, destination: str) -> str:
        """Returns the host directory that is bind-mounted at `destination`, or the empty string."""
        for mount in entries(self.spec, "mounts"):
            if mount.get("destination") == destination and is_bind(mount):
                return str(mount.get("source") or "")
        return ""


def _on_host(number: object, mappings: list[dict[str, Any]]) -> int:
    wanted = number if isinstance(number, int) and number >= 0 else 0
    if not mappings:
        return wanted  # the container shares the host's numbers
    for mapping in mappings:
        first, host, size = (mapping.get(name) for name in ("containerID", "hostID", "size"))
        if not (isinstance(first, int) and isinstance(host, int) and isinstance(size, int)):
            continue
        if first <= wanted < first + size:
            return host + wanted - first
    return 0
