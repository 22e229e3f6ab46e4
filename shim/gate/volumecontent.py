"""Digests the Secret and ConfigMap volumes of a container, whose data a process has in memory.

Two pods may have different Secrets behind the same name of a volume, and a Secret may change: a
restored process would go on with the captured Secret. So the content is a fact of the gate.

We read kubelet's directories as root, beneath descriptors, without links, within bounds of files,
bytes and depth. `..data` is a link that kubelet changes with one rename, to a directory that it
never changes: all reads through one descriptor are of the same version. The digests leave out
tokens of a service account, and files that hold nothing but the pod's own name, uid or address:
they differ from pod to pod. Source: kubelet, pkg/volume/util/atomic_writer.go.
"""

from __future__ import annotations

import errno
import os
import re
import stat

from shim.contract.jsontext import canonical
from shim.gate.key import RANDOM_SUFFIX
from shim.kernel.beneath import O_WALK, open_beneath, open_dir, open_in_root
from shim.kernel.fds import OwnedFd
from shim.kernel.sha256 import hexdigest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.gate.key import PodValues
    from shim.oci.spec import Spec

CODE = "volume_content"
NOT_READ = "not read: "
"""Begins the value of a volume that could not be read, or not within the bounds. No container fits
with such a value: the content is not known."""
_KINDS = ("secret", "configmap", "projected")
_VOLUME = re.compile(
    rf"(/.*/pods/[^/]+)/(?:volumes/kubernetes\.io~({'|'.join(_KINDS)})|volume-subpaths)/([^/]+)(?:/|$)"
)
_TOKEN = re.compile(rb"eyJ[\w-]+\.eyJ[\w-]+\.[\w-]+\s*")
"""A JSON Web Token: its header and its claims are JSON objects in base64url."""
_CURRENT = "..data"
_MAX_FILES, _MAX_BYTES, _MAX_DEPTH = 2048, 16 << 20, 8
_SMALL = 4096
_TRIES = 3


class _Bounds:
    """The files and bytes that may still be read of a container's volumes."""

    def __init__(self) -> None:
        self.files, self.bytes = _MAX_FILES, _MAX_BYTES

    def take(self, path: str, size: int) -> None:
        """Count a file. Raises OSError beyond the bounds."""
        self.files, self.bytes = self.files - 1, self.bytes - size
        if self.files < 0 or self.bytes < 0:
            most = f"more than {_MAX_FILES} files or {_MAX_BYTES >> 20} MiB"
            raise OSError(errno.EFBIG, most, path)


def named(spec: Spec) -> bool:
    """Whether the container has a mount that may be a Secret or ConfigMap volume."""
    return any(True for _ in _mounted(spec))


def fact(spec: Spec, pod: PodValues) -> str:
    """Returns volume to content digest, as canonical JSON. Blocking. Never raises OSError."""
    bounds, found = _Bounds(), {}
    for directory, kind, name in sorted(set(_mounted(spec))):
        for each in (kind,) if kind else _KINDS:  # the path of a subpath does not name the kind
            label = f"{each} volume " + RANDOM_SUFFIX.sub(r"\1", name)
            try:
                found[label] = _content(f"{directory}/volumes", f"kubernetes.io~{each}/{name}", pod,
                                        bounds)  # fmt: skip
            except FileNotFoundError as error:
                if kind:
                    found[label] = f"{NOT_READ}{error.strerror}"
            except OSError as error:
                found[label] = f"{NOT_READ}{error.strerror}"
    return canonical(found)


def _mounted(spec: Spec) -> Iterator[tuple[str, str, str]]:
    """Yields pod directory, kind (empty if not known) and name of each volume."""
    for mount in spec.mounts:
        match = _VOLUME.match(os.path.normpath(mount.source))
        if match and mount.is_bind:
            yield match[1], match[2] or "", match[3]


def _content(volumes: str, path: str, pod: PodValues, bounds: _Bounds) -> str:
    for left in reversed(range(_TRIES)):
        try:
            with open_dir(volumes) as parent, open_beneath(parent.fileno(), path, O_WALK) as volume:
                is_projected = "~projected/" in path
                return f"content {_digest(volume.fileno(), pod, bounds, is_projected)}"
        except FileNotFoundError:
            # kubelet has changed the volume meanwhile, and removed the version before.
            if not left or not os.path.isdir(f"{volumes}/{path}"):
                raise
    raise AssertionError("not reached")


def _digest(volume_fd: int, pod: PodValues, bounds: _Bounds, is_projected: bool) -> str:
    lines = []
    with _current(volume_fd) as current:
        for path, data in _files(current.fileno(), "", bounds, _MAX_DEPTH):
            if not (is_projected and _TOKEN.fullmatch(data)):
                own = _without_pod(data, pod) if is_projected else data
                lines.append(f"{hexdigest(own)} {os.fsencode(path).hex()}")
    return hexdigest("\n".join(lines).encode())[:16]


def _current(volume_fd: int) -> OwnedFd:
    """Opens the directory of the version that is valid now."""
    try:
        return open_in_root(volume_fd, _CURRENT, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return OwnedFd(os.open(".", O_WALK, dir_fd=volume_fd))


def _files(dirfd: int, path: str, bounds: _Bounds, depth: int) -> Iterator[tuple[str, bytes]]:
    if not depth:
        raise OSError(errno.ELOOP, f"more than {_MAX_DEPTH} directories deep", path)
    for name in sorted(os.listdir(dirfd)):
        with open_beneath(dirfd, name, os.O_RDONLY | os.O_NONBLOCK) as opened:
            status = os.fstat(opened.fileno())
            if stat.S_ISDIR(status.st_mode):
                yield from _files(opened.fileno(), f"{path}{name}/", bounds, depth - 1)
                continue
            bounds.take(f"{path}{name}", status.st_size)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "something else than files and directories", path)
            yield f"{path}{name}", _read(opened.fileno(), status.st_size)


def _read(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (part := os.read(fd, size - len(data))):
        data += part
    return bytes(data)


def _without_pod(data: bytes, pod: PodValues) -> bytes:
    if len(data) > _SMALL:
        return data
    text = os.fsdecode(data).strip()
    other = pod.placeholder(text)
    return os.fsencode(other) if other != text else data
