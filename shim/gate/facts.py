"""Rule 2 of the gate: makes comparable facts of everything in an OCI spec that grants power.

CRIU restores the captured credentials, so each fact must be equal in the captured and in the new
spec. The facts leave out values that differ from pod to pod and grant nothing: sources of bind
mounts, paths of namespaces and cgroups, hostname, annotations. A field of the spec that this module
does not know goes unchanged into the fact `other`, so that nobody can ignore it by mistake.

Lenient with OCI's shape: a missing or odd part is a value like any other. Lean: the swap path
compares facts right before the restore. Source: OCI runtime-spec, config.md and config-linux.md.
"""

from __future__ import annotations

import os

from shim.contract.jsontext import canonical
from shim.gate import gpudevices
from shim.kernel.sha256 import hexdigest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from shim.oci.spec import Spec, SpecMount

    IsHost = Callable[[str, str], bool]

_MOST_CHARS = 16 << 10
"""Length of a fact. All facts that Kubernetes makes by itself are shorter."""
_CAPABILITY_SETS = ("ambient", "bounding", "effective", "inheritable", "permitted")
_NAMESPACES = {
    "cgroup": "cgroup", "ipc": "ipc", "mount": "mnt", "network": "net", "pid": "pid",
    "time": "time", "user": "user", "uts": "uts",
}  # fmt: skip
"""The spec's word for each kind, and the file's name in /proc/PID/ns."""
_KNOWN = {
    "": {
        "ociVersion", "process", "root", "hostname", "domainname", "mounts", "hooks",
        "annotations", "linux",
    },
    "process": {
        "terminal", "consoleSize", "user", "args", "env", "cwd", "capabilities", "rlimits",
        "noNewPrivileges", "apparmorProfile", "oomScoreAdj", "selinuxLabel", "scheduler",
        "ioPriority", "commandLine",
    },
    "root": {"path", "readonly"},
    "linux": {
        "uidMappings", "gidMappings", "sysctl", "resources", "cgroupsPath", "namespaces",
        "devices", "seccomp", "rootfsPropagation", "maskedPaths", "readonlyPaths", "mountLabel",
        "intelRdt", "personality",
    },
}  # fmt: skip
"""Fields that are a fact below or a fact of the workload (`shim.gate.key`), or grant nothing."""

POWER_FACTS = (
    "user", "capabilities", "no_new_privs", "seccomp", "apparmor", "selinux", "rlimits",
    "namespaces", "id_mappings", "devices", "device_rules", "mounts", "masked_paths",
    "readonly_paths", "sysctls", "root_readonly", "root_propagation", "terminal", "personality",
    "scheduler", "other",
)  # fmt: skip
WORKLOAD_FACTS = (
    "image_digest", "args", "cwd", "env", "process_user", "mounted", "process_devices", "hugepages",
)  # fmt: skip
"""Made by `shim.gate.key`."""


def as_set(value: object) -> object:
    """Returns a list whose order means nothing, in canonical order and without repetitions."""
    if not isinstance(value, list):
        return value or []
    return [item for _, item in sorted({canonical(item): item for item in value}.items())]


def is_host_namespace(path: str, kind: str) -> bool:
    """Whether the namespace at `path` is the host's, in which this process is.

    kind: as in /proc/PID/ns. containerd names the sandbox's namespaces by path even if the sandbox
    shares the host's, so that only a look answers this. Raises OSError when the namespace is gone.
    """
    there, here = os.stat(path), os.stat(f"/proc/self/ns/{kind}")
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def power_facts(spec: Spec, *, is_host: IsHost = is_host_namespace) -> dict[str, str]:
    """Returns every fact of POWER_FACTS, each as canonical JSON.

    is_host: whether the namespace at a path is the host's, see `is_host_namespace`. Raises
    ValueError for a value that JSON cannot hold (NaN).
    """
    process, linux = spec.process, spec.linux
    facts: dict[str, object] = {
        "user": _user(spec.user),
        "capabilities": _capabilities(process.get("capabilities")),
        "no_new_privs": bool(process.get("noNewPrivileges")),
        "seccomp": _digest(linux.get("seccomp")),
        "apparmor": process.get("apparmorProfile") or "",
        "selinux": [process.get("selinuxLabel") or "", linux.get("mountLabel") or ""],
        "rlimits": as_set(process.get("rlimits")),
        "namespaces": _namespaces(spec.namespaces, is_host),
        "id_mappings": [linux.get("uidMappings") or [], linux.get("gidMappings") or []],
        "devices": as_set(gpudevices.devices(spec)),
        "device_rules": gpudevices.rules(spec) or [],  # the last match counts
        "mounts": mounts(spec),
        "masked_paths": as_set(linux.get("maskedPaths")),
        "readonly_paths": as_set(linux.get("readonlyPaths")),
        "sysctls": linux.get("sysctl") or {},
        "root_readonly": bool(spec.root.get("readonly")),
        "root_propagation": linux.get("rootfsPropagation") or "",
        "terminal": bool(process.get("terminal")),
        "personality": linux.get("personality") or {},
        "scheduler": process.get("scheduler") or {},
        "other": _unknown(spec.json),
    }
    return {name: compact(facts[name]) for name in POWER_FACTS}


def compact(value: object) -> str:
    """Returns a fact as canonical JSON: the value, or its digest if a pod's author made it long.

    A comparison for equality loses nothing by the digest, and the spec's length does not reach any
    manifest, message or comparison.
    """
    text = canonical(value)
    if len(text) <= _MOST_CHARS:
        return text
    return canonical({"characters": len(text), "sha256": hexdigest(text.encode())})


def _user(user: Mapping[str, Any]) -> dict[str, object]:
    return {
        "uid": user.get("uid") or 0,
        "gid": user.get("gid") or 0,
        "groups": as_set(user.get("additionalGids")),
        "umask": user.get("umask"),
    }


def _capabilities(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {name: as_set(value.get(name)) for name in _CAPABILITY_SETS}


def _digest(value: object) -> str | None:
    """Returns a digest: a seccomp profile is long, and its readers compare it elsewhere."""
    return hexdigest(canonical(value).encode()) if value else None


def _namespaces(found: Iterable[Mapping[str, Any]], is_host: IsHost) -> dict[str, str]:
    """Returns per kind `new`, `joined` or `host`: an unlisted kind is shared with the host."""
    states = dict.fromkeys(_NAMESPACES, "host")
    for namespace in found:
        kind, path = str(namespace.get("type")), namespace.get("path")
        states[kind] = _joined(kind, str(path), is_host) if path else "new"
    return states


def _joined(kind: str, path: str, is_host: IsHost) -> str:
    try:
        return "host" if is_host(path, _NAMESPACES.get(kind, kind)) else "joined"
    except OSError as error:
        return f"unknown: {path}: {error.strerror}"  # equal to nothing, so this is a refusal


def mounts(spec: Spec) -> list[dict[str, object]]:
    """Returns destination, type and options of each mount, in the order of their destinations.

    The sort is stable: for two mounts on the same destination the order counts.
    """
    found = [_mount(mount) for mount in spec.mounts]
    return sorted(found, key=lambda mount: str(mount["destination"]))


def _mount(mount: SpecMount) -> dict[str, object]:
    json, is_bind = mount.json, mount.is_bind
    fact: dict[str, object] = {
        "destination": mount.destination,
        "type": "bind" if is_bind else json.get("type"),
        "options": _options(json.get("options")),
    }
    if not is_bind:
        fact["source"] = json.get("source")
    return fact | {name: json[name] for name in ("uidMappings", "gidMappings") if json.get(name)}


def _options(value: object) -> object:
    """Returns the options sorted. Of contradicting options the last counts, and only it stays."""
    if not isinstance(value, list):
        return value or []
    return sorted({_family(str(option)): str(option) for option in value}.values())


def _family(option: str) -> str:
    """Returns a common name of contradicting options: `ro` and `rw`, `nodev` and `dev`, `mode=`."""
    if option in ("ro", "rw"):
        return "rw"
    if option in ("private", "shared", "slave", "unbindable"):
        return "propagation"
    if option in ("rprivate", "rshared", "rslave", "runbindable"):
        return "propagation"
    if "=" in option:
        return option.partition("=")[0] + "="
    return option.removeprefix("no")


def _unknown(spec: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, known in _KNOWN.items():
        where = spec.get(name) if name else spec
        if isinstance(where, dict):
            found |= {f"{name}.{key}": where[key] for key in where if key not in known}
    return found
