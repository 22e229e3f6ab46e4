"""Makes the node that everything is measured on: the product, podman, and runc's own restore."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shim.kernel.libc import call
from tests.bench import asking
from tests.node.base import BUILD
from tests.node.node import Node
from tests.workers import images

if TYPE_CHECKING:
    from collections.abc import Iterator

SUITE: Final = "forky"
PACKAGES: Final = ("crun", "libcriu2", "netavark", "podman")
ON_DISK: Final = {"podman": "/var/lib/containers", "bench": "/var/lib/bench"}
STORE: Final = "/var/lib/bench"
"""The images of the other ways lie in a directory of the disk, as quickthaw's store does."""
HANDLER: Final = "stock"
WRAPPER: Final = "/usr/local/bin/stock-runtime"
CURRENT: Final = "/run/bench/image"
_HANDLER_CONFIG: Final = f"""\
version = 2

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{HANDLER}]
  runtime_type = "io.containerd.runc.v2"

  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{HANDLER}.options]
    BinaryName = "{WRAPPER}"
"""
# containerd's pods have podman's default network.
_PODMAN_CONFIG: Final = '[network]\ndefault_subnet = "10.89.0.0/16"\n'
PODMAN_ENVIRONMENT: Final = {"PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}


class Ground:
    """The node, and the images that it has."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._imported: set[str] = set()
        self._loaded: set[str] = set()

    def image(self, name: str, *, podman: bool = False) -> str:
        """Have a worker's image in the node. Returns the image's name."""
        archive = images.build(name)
        if name not in self._imported:
            self.node.import_image(archive)
            self._imported.add(name)
        if podman and name not in self._loaded:
            with archive.open("rb") as file:
                self.node.run(
                    ["podman", "load"], stdin=file, timeout_s=600, environment=PODMAN_ENVIRONMENT
                )
            self._loaded.add(name)
        return images.reference(name)

    def store(self, name: str) -> Path:
        """Returns a path in STORE, as the host sees it."""
        return self.node.path(f"{STORE}/{name}")

    def settle(self) -> None:
        """Wait until the writes of earlier starts are on the disk. Raises OSError.

        An import writes gigabytes, and the next unmount of an overlay waits for all of them.
        """
        fd = os.open(self.store(""), os.O_RDONLY | os.O_DIRECTORY)
        try:
            call("syncfs", fd)
        finally:
            os.close(fd)

    def cgroup(self, path: str) -> Path:
        """Returns a cgroup of the node as a path of the host, in a hierarchy with every process."""
        top = next((each for each in self.node.cgroups if "/memory/" in str(each)), None)
        return (top or self.node.cgroups[0]) / path.lstrip("/")


@contextmanager
def ground(*, podman: bool = True) -> Iterator[Ground]:
    """Yields a node with all that is measured, podman if wanted. Raises ServiceFailed."""
    (deb,) = (BUILD.parent / "packages").glob("*.deb")
    with Node(SUITE, packages=PACKAGES if podman else (), on_disk=ON_DISK) as node:
        node.install_deb(deb)
        node.write(WRAPPER, (Path(__file__).parent / "stock_runtime.sh").read_text())
        node.path(WRAPPER).chmod(0o755)
        node.write("/etc/containerd/conf.d/bench.toml", _HANDLER_CONFIG)
        node.write("/etc/containers/containers.conf.d/bench.conf", _PODMAN_CONFIG)
        asking.install(node)
        node.start_containerd()
        node.start_daemon()
        yield Ground(node)


def evict(directory: Path) -> None:
    """Take the files of `directory` out of the page cache, and nothing else.

    Pages that a process has mapped stay.
    """
    for fd in _opened(directory):
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def cache(directory: Path) -> None:
    """Read the files of `directory` into the page cache.

    The stored files of all ways, for a large worker, exceed the machine's memory: without this,
    each way would find whatever the way before has left in the cache.
    """
    buffer = bytearray(4 << 20)
    for fd in _opened(directory):
        while os.readv(fd, [buffer]):
            pass


def _opened(directory: Path) -> Iterator[int]:
    """Yields a descriptor of every regular file, one after the other."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if path.is_symlink() or not path.is_file():
                continue
            fd = os.open(path, os.O_RDONLY)
            try:
                yield fd
            finally:
                os.close(fd)


def size_of(directory: Path) -> int:
    """Returns the bytes that a directory's files take on the disk; a hard link counts once."""
    found = {}
    for parent, _, names in os.walk(directory):
        for name in names:
            status = os.lstat(Path(parent, name))
            found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())
