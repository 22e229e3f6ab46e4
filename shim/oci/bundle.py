"""Reads the OCI bundle of a container: its config.json, and the place of its root file system."""

from __future__ import annotations

import os

from shim.oci import spec


class Bundle:
    """path: the bundle's directory. spec: its config.json."""

    __slots__ = ("path", "spec")

    def __init__(self, path: str) -> None:
        """Raises OSError; ValueError if config.json is no object, or names no root."""
        self.path = os.path.abspath(path or ".")
        with open(f"{self.path}/config.json", "rb") as file:
            self.spec = spec.parse(file.read())
        if not isinstance(self.spec.root.get("path"), str):
            raise ValueError("config.json is no OCI configuration: it names no root file system")

    @property
    def rootfs(self) -> str:
        """The absolute path of the mounted root file system."""
        return os.path.join(self.path, self.spec.root["path"])
