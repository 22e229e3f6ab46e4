"""Manifests for tests: whole manifests, with the fields that a test cares about replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.contract import manifest
from shim.contract.parts import PARTS

if TYPE_CHECKING:
    from shim.contract.manifest import Manifest

SOURCE: dict[str, object] = {
    "namespace": "models", "pod": "inference-0", "pod_uid": "u-1", "container": "server",
    "container_id": "c" * 64, "node": "node-1", "image": "registry/inference:1",
    "image_digest": "sha256:" + "d" * 64, "command": ["python3", "serve.py"],
}  # fmt: skip
SOFTWARE = {
    "quickthaw": "0.1.0", "criu": "4.2", "runtime": "runc 1.3", "kernel": "6.18.2-amd64",
    "arch": "x86_64",
}  # fmt: skip


def fields(**changed: object) -> dict[str, object]:
    """Fields that `manifest.build` takes."""
    return {
        "name": "warm", "key": "a" * 64, "created_at": 1_700_000_000.5, "source": SOURCE,
        "software": SOFTWARE, "facts": {"user": "{}"}, "network": {"addresses": ["::"]},
        "files": [{"path": part.listing, "size": 0, "sha256": "b" * 64} for part in PARTS],
        "sizes": {"criu": 4096, "rootfs": 10, "shm": 0, "memory": 0, "entries": 3},
        "timings": {"frozen": 0.5},
        "requires": {"memory_bytes": 1 << 30},
    } | changed  # fmt: skip


def made(**changed: object) -> Manifest:
    """Returns a manifest with its id."""
    return manifest.build(**fields(**changed))
