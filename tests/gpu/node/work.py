"""The workloads that are captured and restored: the probe of the stand-in, or PyTorch on a GPU."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from tests.node.gpus import gpu_probe
from tests.node.images import File, ImageConfig, write_image
from tests.node.podspec import ContainerSpec, HostPath, VolumeMount

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.node.node import Node

APP: Final = Path(__file__).with_name("torch_app.py")
IMAGE: Final = "quickthaw.test/torch:1"
PASSED_ON: Final = ("LD_LIBRARY_PATH", "NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST")
WEIGHTS: Final = "/srv/weights"
TREES: Final = "/srv/trees"


class Work(Protocol):
    """first: path of the request whose first answer counts. asked: path of a request that needs the
    GPU and little else.
    """

    first: str
    asked: str

    def prepare(self, node: Node) -> None:
        """Import the image, and whatever it needs."""

    def spec(self, case: str, gib: float, *, weights: bool = False) -> ContainerSpec:
        """A container with so much on the device; weights: from a file in the page cache."""

    def weights(self, node: Node, gib: float) -> None:
        """Make that file."""

    def forget_weights(self, node: Node) -> None:
        """Remove that file."""

    @property
    def little(self) -> str:
        """Returns the size of a store that has no room for a capture."""

    def is_right(self, answer: Any, before: Any) -> bool:
        """Whether `answer` to the first request is what it was before."""

    def checksum(self, answer: Any) -> Any:
        """Returns the part of the answer that a restore must not change, of the whole memory."""


@dataclass
class Probe:
    """The probe, on the stand-in. scale: how much smaller everything is. image: its archive."""

    image: Path
    scale: float = 1 / 256
    first: str = "/gpu"
    asked: str = "/gpu/busy?ms=0"

    def prepare(self, node: Node) -> None:
        node.import_image(self.image)

    def spec(self, case: str, gib: float, *, weights: bool = False) -> ContainerSpec:
        del weights
        mib = max(16, int(gib * 1024 * self.scale))
        return gpu_probe(0, env={"CASE": case, "MIB": str(mib)})

    def weights(self, node: Node, gib: float) -> None:
        del node, gib

    def forget_weights(self, node: Node) -> None:
        del node

    @property
    def little(self) -> str:
        return "4m"

    def is_right(self, answer: Any, before: Any) -> bool:
        return bool(answer["wrong"] == 0 and answer == before)

    def checksum(self, answer: Any) -> Any:
        return answer


@dataclass
class Torch:
    """PyTorch of this machine, whose /usr and /opt the container gets."""

    python: str
    first: str = "/answer?seed=1"
    asked: str = "/answer?seed=1"
    places: Sequence[VolumeMount] = ()

    def prepare(self, node: Node) -> None:
        self.places = [VolumeMount(path, HostPath(at), read_only=True) for path, at in _trees(node)]
        links = [
            File(link, link=os.readlink(link))
            for link in ("/bin", "/sbin", "/lib", "/lib64")
            if os.path.islink(link)
        ]
        copied = [
            File(path, Path(path).read_bytes())
            for path in ("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/ld.so.cache")
            if os.path.exists(path)
        ]
        empty = [File(f"/{name}/.keep") for name in ("usr", "opt", "tmp", "root")]
        files = [File("/app/torch_app.py", APP.read_bytes()), *links, *copied, *empty]
        node.import_image(write_image(IMAGE, [files], ImageConfig(), node.kept("torch.tar")))

    def spec(self, case: str, gib: float, *, weights: bool = False) -> ContainerSpec:
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        more = {"WEIGHTS": f"{WEIGHTS}/{gib:g}.safetensors"} if weights else {}
        mounts = [VolumeMount(WEIGHTS, HostPath(WEIGHTS), read_only=True)] if weights else []
        devices = [
            str(path)
            for path in sorted([*Path("/dev").glob("nvidia*"), *Path("/dev/nvidia-caps").glob("*")])
            if path.is_char_device()
        ]
        return ContainerSpec(
            IMAGE, command=[self.python, "/app/torch_app.py"],
            env={"CASE": case, "GIB": f"{gib:g}", "HOME": "/root", "PYTHONUNBUFFERED": "1",
                 "PYTHONDONTWRITEBYTECODE": "1", **passed, **more},
            mounts=[*self.places, *mounts], devices=devices,
        )  # fmt: skip

    def weights(self, node: Node, gib: float) -> None:
        node.run(["mkdir", "-p", WEIGHTS])
        node.run(["mount", "-t", "tmpfs", "-o", "size=48g,huge=always", "weights", WEIGHTS])
        node.run(
            [self.python, str(APP), "save", f"{WEIGHTS}/{gib:g}.safetensors", f"{gib:g}"],
            timeout_s=200,
        )

    def forget_weights(self, node: Node) -> None:
        node.run(["umount", WEIGHTS])

    @property
    def little(self) -> str:
        return "64m"

    def is_right(self, answer: Any, before: Any) -> bool:
        return bool(answer["answer"] == before["answer"])

    def checksum(self, answer: Any) -> Any:
        return answer["checksum"]


def _trees(node: Node) -> list[tuple[str, str]]:
    """Mount /usr and /opt once more, each without what is mounted below, which gets a place of its
    own: CRIU does not know mounts that came along.
    """
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    places: list[tuple[str, str]] = []
    for tree in ("/usr", "/opt"):
        for path in [tree, *sorted({each for each in mounted if each.startswith(f"{tree}/")})]:
            at = Path(f"{TREES}/{len(places)}")
            at.parent.mkdir(parents=True, exist_ok=True)
            at.mkdir() if os.path.isdir(path) else at.touch()
            node.run(["mount", "--bind", path, str(at)])
            places.append((path, str(at)))
    return places


def answer_of(body: bytes) -> Any:
    """The JSON of an answer."""
    return json.loads(body)
