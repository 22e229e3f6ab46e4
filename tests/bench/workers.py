"""What is started: the workers of tests/workers, and what each is asked."""

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
    """One workload. bytes: the memory that it is made to have, 0 when that is its own affair.

    same: what of a first answer has to be as the source said it. by_process: whether that can
    only come from the captured process. shared: whether its memory is shared memory.
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
        """What runs in the container."""
        return ("python3", "-m", f"workers.{self.module}")

    def container(self) -> ContainerSpec:
        """As a pod's author has it."""
        return ContainerSpec(images.reference(self.image), command=self.command, env=self.env)

    @property
    def gib(self) -> float:
        """`bytes` in GiB."""
        return self.bytes / GIB


def memory(gib: float, content: str) -> Worker:
    """A process with that much private memory; it is asked for pages from everywhere."""
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
    """The same with shared memory, `memfd` or `anonymous`."""
    worker = memory(gib, "random")
    return replace(
        worker,
        name=f"shared-{gib:g}-{backing}",
        env={**worker.env, "BACKING": backing},
        shared=True,
    )


def inference() -> Worker:
    """The demo's inference server, asked to read a picture."""
    (invoice,) = (each for each in images.real_inputs() if each.name == "invoice")
    request = Request("/predict", 0.3, method="POST", body=invoice.document)
    return Worker(
        "inference", "inference", "inference", request, _predicted, by_process=False
    )  # its answers are the same from every process


def embedding() -> Worker:
    """PyTorch and all-MiniLM-L6-v2, asked for two vectors."""
    request = Request("/embed", 0.1, method="POST", body=SENTENCES.encode())
    return Worker("embedding", "embedding", "embedding", request, _vectors)
