"""Makes OCI images without a registry: directory trees to layers, layers to an image archive.

The archive is an OCI image layout in a tar, which `ctr -n k8s.io images import` reads. Layers are
not compressed: they are unpacked on the machine that made them. Source: OCI image-spec 1.1.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import stat
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_INDEX: Final = "application/vnd.oci.image.index.v1+json"
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Layer:
    """A layer as a tar file on disk; uncompressed, so digest and diff id are the same."""

    path: Path
    digest: str


def digest_of(path: Path) -> str:
    """Returns `sha256:…` of a file."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def everything(_: str) -> bool:
    """Keep every path of a tree."""
    return True


def make_layer(
    tree: Path, to: Path, *, prefix: str = "", keep: Callable[[str], bool] = everything
) -> Layer:
    """Write the content of `tree` as a layer at `to`, owned by root, below `prefix`.

    `keep` gets each path relative to `tree`; a directory that is not kept is not entered. Hard
    links stay links; times are cut to seconds.
    """
    scratch = to.with_name(f".{to.name}.part")
    with tarfile.open(scratch, "w", format=tarfile.PAX_FORMAT) as archive:
        for parent in _parents(prefix):
            archive.addfile(_directory(parent))
        for path in _walk(tree, "", keep):
            _add(archive, tree / path, f"{prefix}/{path}".lstrip("/"))
    scratch.rename(to)
    return Layer(to, digest_of(to))


def _parents(prefix: str) -> list[str]:
    parts = prefix.strip("/").split("/") if prefix else []
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _directory(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    return info


def _walk(tree: Path, below: str, keep: Callable[[str], bool]) -> Iterator[str]:
    for entry in sorted(os.scandir(tree / below), key=lambda entry: entry.name):
        path = os.path.join(below, entry.name)
        if keep(path):
            yield path
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(tree, path, keep)


def _add(archive: tarfile.TarFile, source: Path, name: str) -> None:
    if stat.S_ISSOCK(source.lstat().st_mode):
        return  # tar cannot store a socket
    info = archive.gettarinfo(source, name)
    info.uname = info.gname = ""
    info.mtime = int(info.mtime)
    if info.isreg():
        with source.open("rb") as file:
            archive.addfile(info, file)
    else:
        archive.addfile(info)


def write_image(to: Path, name: str, layers: Sequence[Layer], config: Mapping[str, object]) -> None:
    """Write an image archive. `name` is the full reference; `config` has Env, Cmd and more."""
    image = _blob(
        {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        }
    )
    manifest = _blob(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _descriptor(_CONFIG, image),
            "layers": [
                {"mediaType": _LAYER, "digest": layer.digest, "size": layer.path.stat().st_size}
                for layer in layers
            ],
        }
    )
    names = {
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rpartition(":")[2],
    }
    entry = {**_descriptor(_MANIFEST, manifest), "annotations": names}
    index = _blob({"schemaVersion": 2, "mediaType": _INDEX, "manifests": [entry]})
    scratch = to.with_name(f".{to.name}.part")
    with tarfile.open(scratch, "w", format=tarfile.PAX_FORMAT) as archive:
        _put(archive, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        _put(archive, "index.json", index)
        for blob in (image, manifest):
            _put(archive, _blob_path(_digest(blob)), blob)
        for layer in {layer.digest: layer for layer in layers}.values():
            info = tarfile.TarInfo(_blob_path(layer.digest))
            info.size = layer.path.stat().st_size
            with layer.path.open("rb") as file:
                archive.addfile(info, file)
    scratch.rename(to)


def _blob(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _descriptor(media_type: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}


def _blob_path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _put(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
