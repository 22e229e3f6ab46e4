"""Makes the gate's request for a container, from the container's OCI spec, its pod and its node.

The decision, a capture and `quickthaw explain` all make their requests here. Lean.
"""

from __future__ import annotations

from shim.contract.jsontext import canonical
from shim.criu import options
from shim.gate import gpu, network, volumes
from shim.gate.facts import power_facts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from typing import Any

    from shim.contract.manifest import Manifest
    from shim.gate.key import PodValues
    from shim.oci.spec import Spec


class Node:
    """The known facts of this node. host: as of `shim.gate.host`. criu: its version, or empty.

    gpus: as of `shim.gate.gpu`, None when they cannot be read. trust: returns the signer of a
    snapshot, or the problem with its signature, and whether this node trusts it.
    """

    __slots__ = ("arch", "criu", "gpus", "host", "kernel", "trust")

    def __init__(
        self,
        *,
        arch: str,
        kernel: str,
        criu: str,
        host: Mapping[str, str],
        gpus: Mapping[str, Any] | None,
        trust: Callable[[Manifest], tuple[str, bool]],
    ) -> None:
        self.arch, self.kernel, self.criu = arch, kernel, criu
        self.host, self.gpus, self.trust = host, gpus, trust


def _nobody(_found: Manifest) -> tuple[str, bool]:
    return "", False


NOWHERE = Node(arch="", kernel="", criu="", host={}, gpus=None, trust=_nobody)


class AtSwap:
    """ours: our file with CRIU's options for this container. named: the file that its spec names.

    changed: returns the captured files that have changed in the volumes of the container's pod.
    open_to_all: the lowest port that everybody may bind in the pod's network, and whether everybody
    may ping.
    """

    __slots__ = ("changed", "named", "open_to_all", "ours")

    def __init__(
        self,
        *,
        ours: str,
        named: str,
        changed: Callable[[object], list[str]],
        open_to_all: Callable[[], tuple[int, bool]],
    ) -> None:
        self.ours, self.named, self.changed = ours, named, changed
        self.open_to_all = open_to_all


class Request:
    """The known facts of the container that is to start, and of its node.

    namespace: of Kubernetes. key: the match key. facts: power, workload and host facts by name.
    memory_limit_bytes: 0 for none. any_namespace: the node's configuration allows snapshots of
    other Kubernetes namespaces. any_volume_content: the pod's author accepts any content of its
    Secret and ConfigMap volumes. at_swap: facts that only the swap knows. An empty value is not
    known, and does not fit.
    """

    __slots__ = (
        "any_namespace", "any_volume_content", "at_swap", "facts", "key", "memory_limit_bytes",
        "namespace", "node",
    )  # fmt: skip

    def __init__(
        self,
        *,
        facts: Mapping[str, str],
        memory_limit_bytes: int,
        namespace: str = "",
        key: str = "",
        node: Node = NOWHERE,
        any_namespace: bool = False,
        at_swap: AtSwap | None = None,
    ) -> None:
        self.any_volume_content = False
        self.facts, self.memory_limit_bytes = facts, memory_limit_bytes
        self.namespace, self.key, self.any_namespace = namespace, key, any_namespace
        self.node, self.at_swap = node, at_swap


def request_of(
    spec: Spec,
    pod: PodValues,
    node: Node,
    *,
    image_digest: str,
    ignore_env: Collection[str] = (),
    any_namespace: bool = False,
    volume_content: str | None = None,
) -> Request:
    """Returns the request of the container with this spec. Raises ValueError if not JSON (NaN).

    An empty value (the pod's namespace, the image's digest) is not known and fits no snapshot.
    ignore_env, any_namespace: from the node's configuration. volume_content: of
    `shim.gate.volumecontent`, None if nobody has looked.
    """
    from shim.gate import volumecontent
    from shim.gate.key import match_key, workload_facts  # late: a swap compares no key

    workload = workload_facts(spec, pod, image_digest=image_digest, ignore_env=ignore_env)
    # A node that shares snapshots between namespaces gives all of them the same key.
    key = match_key(workload, namespace="" if any_namespace else pod.namespace, power=None)
    facts = {**power_facts(spec), **workload, **node.host}
    if not image_digest:
        del facts["image_digest"]
    if volume_content is None and not volumecontent.named(spec):
        volume_content = canonical({})  # there is no volume to look at
    if volume_content is not None:
        facts[volumecontent.CODE] = volume_content
    if gpus := gpu.fact(spec, node.gpus):
        facts["gpu"] = gpus
    facts |= gpu.host_facts(spec, gpu.chosen(spec, node.gpus), facts["namespaces"])
    return Request(
        facts=facts, memory_limit_bytes=spec.memory_limit_bytes, namespace=pod.namespace, key=key,
        node=node, any_namespace=any_namespace,
    )  # fmt: skip


def request_at_swap(spec: Spec, container: str) -> Request:
    """Returns the request for the rows of SWAP. spec: as the runtime gets it."""
    at_swap = AtSwap(
        ours=options.path_of(container),
        named=str(spec.annotation(options.ANNOTATION)),
        changed=lambda fact: volumes.changed(spec, fact),
        open_to_all=lambda: network.open_in_sandbox(spec),
    )
    return Request(
        facts=power_facts(spec), memory_limit_bytes=spec.memory_limit_bytes, at_swap=at_swap
    )
