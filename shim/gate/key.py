"""Decides which containers are the same workload, and makes the key of their snapshots. Pure.

The facts describe a container as it is known at `CreateContainer`: an object with the shape of an
OCI spec that may hold less than a spec. The objects of source and new container must have the same
fields filled, or their keys differ. Values of environment variables may be secrets: facts have only
digests of them. Lean.
"""

from __future__ import annotations

import hashlib
import re

from shim.contract.jsontext import canonical
from shim.contract.paths import CONTROL_IN_CONTAINER
from shim.gate import gpudevices
from shim.gate.facts import WORKLOAD_FACTS, as_set, compact, mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from typing import Any

    from shim.oci.spec import Spec

_KEY_SCHEMA = 1

_SERVICE_HOST = re.compile(r"([A-Z0-9_]+)_SERVICE_HOST")
_SERVICE_LINK = re.compile(
    r"_SERVICE_HOST|_SERVICE_PORT(?:_[A-Z0-9_]+)?"
    r"|_PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?"
)
_LINK_CHARS = 256
"""A Kubernetes name has 63 characters, and kubelet's addition is shorter than the rest."""
_POD_VOLUME = re.compile(r"/pods/[^/]+/(volumes|volume-subpaths|containers|etc-hosts)(?:/(.*))?$")
_SANDBOX = re.compile(r"/sandboxes/[^/]+/([^/]+)$")
RANDOM_SUFFIX = re.compile(r"(kube-api-access)-[a-z0-9]{5}\b")


class PodValues:
    """The values that differ from pod to pod: each of them becomes its placeholder in facts.

    ips: the pod's addresses as far as they are known, both at capture and at restore.
    """

    __slots__ = ("_known", "ips", "name", "namespace", "node", "uid")

    def __init__(
        self, *, namespace: str, name: str, uid: str, ips: Iterable[str] = (), node: str = ""
    ) -> None:
        self.namespace, self.name, self.uid = namespace, name, uid
        self.ips, self.node = tuple(ips), node
        self._known = {name: "<pod>", uid: "<uid>", node: "<node>"}
        self._known |= dict.fromkeys(self.ips, "<ip>") | {",".join(self.ips): "<ips>"}

    def placeholder(self, value: str) -> str:
        """Returns `value`, or its placeholder, which is the same in every pod."""
        return self._known.get(value, value) if value else value


def workload_facts(
    spec: Spec, pod: PodValues, *, image_digest: str, ignore_env: Collection[str] = ()
) -> dict[str, str]:
    """Returns every fact of WORKLOAD_FACTS, each as canonical JSON.

    ignore_env: names of environment variables that may differ, from the node's configuration.
    """
    process, user = spec.process, spec.user
    facts: dict[str, object] = {
        "image_digest": image_digest,
        "args": process.get("args") or [],
        "cwd": process.get("cwd") or "",
        "env": _environment(spec.environment, pod, ignore_env),
        "process_user": [user.get("uid") or 0, user.get("gid") or 0],
        "mounted": _mounted(spec, pod),
        "process_devices": as_set(_devices(spec)),
        "hugepages": as_set(spec.resources.get("hugepageLimits")),
    }
    return {name: compact(facts[name]) for name in WORKLOAD_FACTS}


def match_key(facts: Mapping[str, str], *, namespace: str, power: Mapping[str, str] | None) -> str:
    """Returns the key over the workload facts, 64 hexadecimal digits.

    power: the power facts, if the caller knows all of them both times; otherwise None, and the gate
    compares the power facts one by one before the swap.
    """
    content = [_KEY_SCHEMA, namespace, {name: facts[name] for name in WORKLOAD_FACTS}, power]
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def _environment(
    found: Mapping[str, str], pod: PodValues, ignored: Collection[str]
) -> dict[str, str]:
    variables = {**found, **gpudevices.visible(found)}
    dropped = {"HOSTNAME", *ignored, *_service_links(variables)}
    return {
        name: hashlib.sha256(pod.placeholder(text).encode(errors="replace")).hexdigest()[:16]
        for name, text in variables.items()
        if name not in dropped
    }


def _service_links(variables: Mapping[str, str]) -> set[str]:
    """Returns the variables that kubelet adds for each Service: other names in _PORT are the pod's.

    A family is complete with X_SERVICE_HOST and X_SERVICE_PORT.
    """
    names = [name for name in variables if len(name) <= _LINK_CHARS]
    found = (_SERVICE_HOST.fullmatch(name) for name in names)
    families = {match[1] for match in found if match and f"{match[1]}_SERVICE_PORT" in variables}
    return {name for name in names if any(family in families for family in _families(name))}


def _families(name: str) -> Iterator[str]:
    """Yields the families that a variable may belong to: each beginning before a link's ending."""
    at = name.find("_")
    while at >= 0:
        if _SERVICE_LINK.fullmatch(name, at):
            yield name[:at]
        at = name.find("_", at + 1)


def _mounted(spec: Spec, pod: PodValues) -> list[object]:
    """Returns each mount with its source: the volume of the pod, or the directory of the host."""
    sources = {
        mount.destination: _shown(mount.source, pod) for mount in spec.mounts if mount.is_bind
    }
    return [
        [
            mount["destination"],
            mount["type"],
            mount["options"],
            sources.get(str(mount["destination"])),
        ]
        for mount in mounts(spec)
        if mount["destination"] != CONTROL_IN_CONTAINER
    ]


def _shown(source: str, pod: PodValues) -> str:
    """Returns text that is equal for two pods of a Deployment, but not for different hostPaths."""
    if match := _SANDBOX.search(source):
        return f"sandbox {match[1]}"
    if match := _POD_VOLUME.search(source):
        kept = (match[2] or "") if match[1].startswith("volume") else ""  # others: a random name
        volume = RANDOM_SUFFIX.sub(r"\1", kept)
        return f"pod {match[1]} {volume}".rstrip()
    return "/".join(pod.placeholder(part) for part in source.split("/"))


def _devices(spec: Spec) -> list[object]:
    found = gpudevices.devices(spec)
    listed = found if isinstance(found, list) else []
    return [_device(each) for each in listed if isinstance(each, dict)]


def _device(device: Mapping[str, Any]) -> list[object]:
    return [device.get(name) for name in ("path", "type", "major", "minor")]
