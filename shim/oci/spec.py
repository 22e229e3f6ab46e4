"""Reads OCI specs: each field that quickthaw uses has its place here. Pure and lean.

Lenient, as OCI asks: a part that is missing or odd is empty, and unknown fields are no error. A
module that compares a whole spec (`shim.gate.facts`) takes the sections as they stand. Source: OCI
runtime-spec, config.md and config-linux.md.
"""

from __future__ import annotations

import os

from shim.contract import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    Json = Mapping[str, Any]

_PERIOD_US = 100_000
"""The kernel's default, if the spec has no period."""


def parse(data: bytes) -> Spec:
    """Returns the spec. Raises ValueError, RecursionError if `data` is no JSON object."""
    found = jsontext.parse(data)
    if not isinstance(found, dict):
        raise ValueError("an OCI spec is a JSON object")
    return Spec(found)


class Spec:
    """An OCI spec. json: as parsed; nobody changes it."""

    __slots__ = ("json",)

    def __init__(self, json: Json) -> None:
        self.json = json

    @property
    def process(self) -> Json:
        """The section about the process."""
        return _section(self.json, "process")

    @property
    def user(self) -> Json:
        """User, group and further groups of the process, as the container counts them."""
        return _section(self.process, "user")

    @property
    def capabilities(self) -> Json:
        """The sets of the process by their names in the spec."""
        return _section(self.process, "capabilities")

    @property
    def env(self) -> list[str]:
        """The environment as listed: a variable may be there several times."""
        found = self.process.get("env")
        return [str(item) for item in found] if isinstance(found, list) else []

    @property
    def environment(self) -> dict[str, str]:
        """The environment by name: the last value of a variable counts."""
        return {name: value for name, _, value in (item.partition("=") for item in self.env)}

    @property
    def root(self) -> Json:
        """The section about the root file system."""
        return _section(self.json, "root")

    @property
    def hostname(self) -> str:
        """The container's host name, empty if the container shares another's."""
        return str(self.json.get("hostname") or "")

    def annotation(self, name: str) -> str | None:
        """Returns the value of an annotation; None if there is none."""
        found = _section(self.json, "annotations").get(name)
        return found if isinstance(found, str) else None

    @property
    def mounts(self) -> list[SpecMount]:
        """All mounts, in the order in which the runtime mounts them."""
        return [SpecMount(each) for each in _entries(self.json, "mounts")]

    def bind_source(self, destination: str) -> str:
        """Returns the host's path that is bind-mounted at `destination`, or the empty string."""
        for mount in self.mounts:
            if mount.destination == destination and mount.is_bind:
                return mount.source
        return ""

    @property
    def linux(self) -> Json:
        """The section for Linux."""
        return _section(self.json, "linux")

    @property
    def namespaces(self) -> list[Json]:
        """The namespaces that the container does not share with the runtime."""
        return _entries(self.linux, "namespaces")

    def namespace(self, kind: str) -> str:
        """Returns the path of the namespace to join, or the empty string. kind: the spec's word."""
        for namespace in self.namespaces:
            if namespace.get("type") == kind:
                return str(namespace.get("path") or "")
        return ""

    @property
    def owner(self) -> tuple[int, int]:
        """The host's user and group ID of the process; root's if none is mapped."""
        return (
            _on_host(self.user.get("uid"), _entries(self.linux, "uidMappings")),
            _on_host(self.user.get("gid"), _entries(self.linux, "gidMappings")),
        )

    @property
    def devices(self) -> list[Json]:
        """The device nodes."""
        return _entries(self.linux, "devices")

    @property
    def resources(self) -> Json:
        """The section about cgroups."""
        return _section(self.linux, "resources")

    @property
    def cgroups_path(self) -> str:
        """The wish for the cgroup, in the form that the runtime's cgroup driver needs; or empty."""
        return str(self.linux.get("cgroupsPath") or "")

    @property
    def device_rules(self) -> list[Json]:
        """The cgroup's rules about devices: the last rule that matches counts."""
        return _entries(self.resources, "devices")

    @property
    def memory_limit_bytes(self) -> int:
        """The limit of the memory cgroup, 0 if there is no limit."""
        limit = _section(self.resources, "memory").get("limit")
        return limit if isinstance(limit, int) and limit > 0 else 0

    @property
    def cpus(self) -> float:
        """The processors that the quota allows, 0 if there is no quota."""
        cpu = _section(self.resources, "cpu")
        quota, period = cpu.get("quota"), cpu.get("period") or _PERIOD_US
        if not isinstance(quota, int) or not isinstance(period, int) or min(quota, period) <= 0:
            return 0.0
        return quota / period


class SpecMount:
    """A mount of a spec. json: as parsed.

    destination: the normal form of the path in the container. is_bind: the mount shows a directory
    or file of the host. source: its path there; otherwise what the type of file system needs.
    """

    __slots__ = ("destination", "is_bind", "json", "source")

    def __init__(self, json: Json) -> None:
        options = json.get("options")
        listed = options if isinstance(options, list) else ()
        self.json = json
        self.destination = os.path.normpath(str(json.get("destination")))
        self.is_bind = json.get("type") == "bind" or "bind" in listed or "rbind" in listed
        self.source = str(json.get("source") or "")


def _section(value: Json, name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _entries(value: Json, name: str) -> list[Json]:
    found = value.get(name)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _on_host(number: object, mappings: list[Json]) -> int:
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
