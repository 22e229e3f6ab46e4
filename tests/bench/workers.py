"""Describes the workers that are started, of tests/workers, and the requests to each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from tests.bench.asking import PORT, Request
from tests.node.podspec import ContainerSpec
from tests.workers import images

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

GIB: Final = 1 << 30
BACKINGS: Final = ("memfd", "anonymous")
CONTENTS: Final = ("random", "half-zero", "model")
SENTENCES: Final = "A container starts warm.\nIts model is loaded already."


def _nonce(said: Any) -> str:
    return str(said.get("nonce", ""))


def _vectors(said: Any) -> str:
    return json.dumps([said["vectors"], said["nonce"]])


def _predicted(said: Any) -> str:
    return json.dumps([said["label"], said["text"], said["scores"], said["sha256"]])


@dataclass(frozen=True, slots=True)
class Worker:
    """A workload. bytes: the memory that it is made to have, 0 when its size is not set.

    same: the part of a first answer that must equal the source's. by_process: whether only the
    captured process can give that answer. shared: whether its memory is shared memory.
    """

    name: str
    image: str
    module: str
    request: Request
    same: Callable[[Any], str]
    env: Mapping[str, str] = field(default_factory=dict)
    bytes: int = 0
    by_process: bool = True
    shared: bool = False

    @property
    def command(self) -> Sequence[str]:
        """Returns the container's command."""
        return ("python3", "-m", f"workers.{self.module}")

    def container(self) -> ContainerSpec:
        """Returns the container as a pod's author writes it."""
        return ContainerSpec(images.reference(self.image), command=self.command, env=self.env)

    @property
    def gib(self) -> float:
        """Returns `bytes` in GiB."""
        return self.bytes / GIB


def memory(gib: float, content: str) -> Worker:
    """Returns a process with that much private memory; requests read pages from everywhere."""
    return Worker(
        f"memory-{gib:g}-{content}",
        # Only this image has models.
        "inference" if content == "model" else "probe",
        "memory",
        Request("/sample?n=8&seed={n}", 0.01, first_path="/first"),
        _nonce,
        env={"SIZE_MIB": str(int(gib * 1024)), "CONTENT": content, "PORT": str(PORT)},
        bytes=int(gib * GIB),
    )


def shared(gib: float, backing: str) -> Worker:
    """Returns the same worker with shared memory, `memfd` or `anonymous`."""
    worker = memory(gib, "random")
    return replace(
        worker,
        name=f"shared-{gib:g}-{backing}",
        env={**worker.env, "BACKING": backing},
        shared=True,
    )


def inference() -> Worker:
    """Returns the demo's inference server, asked to read a picture."""
    (invoice,) = (each for each in images.real_inputs() if each.name == "invoice")
    request = Request("/predict", 0.3, method="POST", body=invoice.document)
    return Worker(
        "inference", "inference", "inference", request, _predicted, by_process=False
    )  # every process gives the same answers


def embedding() -> Worker:
    """Returns PyTorch with all-MiniLM-L6-v2, asked for two vectors."""
    request = Request("/embed", 0.1, method="POST", body=SENTENCES.encode())
    return Worker("embedding", "embedding", "embedding", request, _vectors)
