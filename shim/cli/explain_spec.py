"""`quickthaw explain SPEC`: applies the gate to an OCI spec, with this node's store and keys.

Works without the daemon. Guesses nothing: a value that neither the spec nor the options have is
unknown, and does not fit.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from shim.cli import offline
from shim.contract.errors import BadRequest, NoSuchSnapshot
from shim.gate import volumecontent
from shim.gate.explain import explained, nearest
from shim.gate.key import PodValues
from shim.gate.request import request_of
from shim.node import facts
from shim.oci import spec as oci_spec
from shim.store.store import Store

if TYPE_CHECKING:
    from argparse import Namespace

    from shim.cli.output import Output
    from shim.contract.manifest import Manifest
    from shim.oci.spec import Spec

_MAX_BYTES = 16 << 20
_CRI = "io.kubernetes.cri.sandbox-"
"""Prefix of the annotations in which containerd notes the pod of a container's spec."""


def explain(asked: Namespace, out: Output) -> dict[str, Any]:
    """Returns the comparison of the spec at `asked.what`. Raises QuickthawError, OSError."""
    spec = _read(asked.what)
    store = Store()
    store.read_index()
    node = asyncio.run(facts.learn(asked.criu, offline.trust(store))).node
    pod = _pod(spec, asked)
    if unknown := _unknown(pod, asked):
        out.note(f"the fact is not known, so the snapshot does not fit: {', '.join(unknown)}")
    try:
        request = request_of(
            spec, pod, node, image_digest=asked.image_digest, ignore_env=asked.ignore_env,
            any_namespace=asked.any_namespace, volume_content=volumecontent.fact(spec, pod),
        )  # fmt: skip
    except ValueError as error:
        raise _bad(asked.what, str(error)) from error
    namespace = "" if asked.any_namespace else pod.namespace
    chosen = "asked for" if asked.snapshot else "the nearest"
    found = _chosen(store, asked.snapshot, pod) or nearest(request, store.find(namespace=namespace))
    if found is None:
        raise NoSuchSnapshot(
            "cannot explain", about=asked.what, why="the store has no snapshot to compare",
            do="Name a snapshot with --snapshot; see `quickthaw ls`.",
        )  # fmt: skip
    container = {"spec": asked.what, "namespace": pod.namespace, "pod": pod.name}
    return {"container": container, "chosen": chosen, **explained(found, request)}


def _chosen(store: Store, wanted: str, pod: PodValues) -> Manifest | None:
    """Returns the wanted snapshot: a name is first looked for in the pod's own namespace."""
    if not wanted:
        return None
    named = store.find(namespace=pod.namespace, name=wanted) if pod.namespace else []
    return named[0] if named else store.get(wanted)


def _read(path: str) -> Spec:
    with open(path, "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"longer than {_MAX_BYTES} bytes")
        spec = oci_spec.parse(data)
        if not spec.process:
            raise ValueError("no OCI spec: it has no process")
    except ValueError as error:
        raise _bad(path, str(error)) from error
    return spec


def _bad(path: str, why: str) -> BadRequest:
    return BadRequest("cannot read the spec", about=path, why=why, do="Give a config.json.")


def _pod(spec: Spec, asked: Namespace) -> PodValues:
    def noted(name: str) -> str:
        return spec.annotation(f"{_CRI}{name}") or ""

    return PodValues(
        namespace=asked.namespace or noted("namespace"), name=asked.pod_name or noted("name"),
        uid=asked.pod_uid or noted("uid"), ips=asked.pod_ip, node=os.uname().nodename,
    )  # fmt: skip


def _unknown(pod: PodValues, asked: Namespace) -> list[str]:
    found = {
        "the pod's namespace (--namespace)": pod.namespace or asked.any_namespace,
        "its image's digest (--image-digest)": asked.image_digest,
    }
    return [what for what, value in found.items() if not value]
