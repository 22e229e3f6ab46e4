"""OCI images without a registry: layers to an image layout in a tar file, and that to a node.

Source: OCI image specification, image-layout and config; containerd names an imported image by
the annotation `io.containerd.image.name`.
"""

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.node.base import BUILD, locked, node_root
from tests.node.enclosure import Enclosure

PAUSE: Final = "quickthaw.test/pause:1"
ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class File:
    """A file of a layer. `path` is absolute in the image; `link` makes the file a symlink."""

    path: str
    content: bytes = b""
    mode: int = 0o644
    link: str = ""


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The run configuration of an image."""

    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    working_directory: str = "/"
    user: str = ""

    def as_json(self) -> dict[str, object]:
        """Returns the `config` object of an OCI image configuration."""
        path = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        environment = [f"{k}={v}" for k, v in {**path, **self.environment}.items()]
        return {
            "Entrypoint": list(self.entrypoint),
            "Cmd": list(self.command),
            "Env": environment,
            "WorkingDir": self.working_directory,
            "User": self.user,
        }


Layer = Path | Sequence[File]
"""A directory whose content is the layer, or the layer's files."""


def layer_of_files(files: Iterable[File]) -> bytes:
    """Returns a layer's tar: the same bytes for the same files. Makes directories as needed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        made: set[str] = set()
        for file in files:
            for parent in reversed(Path(file.path.lstrip("/")).parents):
                if str(parent) not in {".", *made}:
                    made.add(str(parent))
                    tar.addfile(_entry(str(parent), tarfile.DIRTYPE, 0o755))
            entry = _entry(file.path.lstrip("/"), tarfile.REGTYPE, file.mode)
            if file.link:
                entry.type, entry.linkname = tarfile.SYMTYPE, file.link
            entry.size = len(file.content)
            tar.addfile(entry, io.BytesIO(file.content))
    return buffer.getvalue()


def _entry(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = kind, mode
    return entry


def write_image(reference: str, layers: Sequence[Layer], config: ImageConfig, into: Path) -> Path:
    """Write the image `reference` as an OCI layout into the tar file `into`.

    Layers are bottom first and not compressed: nobody transports them.
    """
    into.parent.mkdir(parents=True, exist_ok=True)
    scratch = into.with_name(f".{into.name}.partial")
    with tarfile.open(scratch, mode="w", format=tarfile.PAX_FORMAT) as tar:
        written = [_add_layer(tar, layer) for layer in layers]
        digests = [each["digest"] for each in written]
        described = _add_json(tar, "config.v1", _configuration(config, digests))
        manifest = {"schemaVersion": 2, "config": described, "layers": written}
        listed = _add_json(tar, "manifest.v1", manifest)
        listed["annotations"] = {"io.containerd.image.name": reference}
        _add(tar, "index.json", json.dumps({"schemaVersion": 2, "manifests": [listed]}).encode())
        _add(tar, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
    scratch.rename(into)
    return into


def _configuration(config: ImageConfig, digests: Sequence[str]) -> dict[str, object]:
    machine = ARCHITECTURES[os.uname().machine]
    return {
        "architecture": machine,
        "os": "linux",
        "config": config.as_json(),
        "rootfs": {"type": "layers", "diff_ids": list(digests)},
    }


def _add_layer(tar: tarfile.TarFile, layer: Layer) -> dict[str, Any]:
    if not isinstance(layer, Path):
        return _add_blob(tar, "layer.v1.tar", layer_of_files(layer))
    packed = BUILD / f".layer-{hashlib.sha256(str(layer).encode()).hexdigest()[:10]}.tar"
    packed.parent.mkdir(parents=True, exist_ok=True)
    command = ["tar", "--sort=name", "--numeric-owner", "--xattrs", "--xattrs-include=*"]
    subprocess.run([*command, "-C", str(layer), "-cf", str(packed), "."], check=True)
    try:
        with packed.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        tar.add(packed, f"blobs/sha256/{digest}")
        return _descriptor("layer.v1.tar", digest, packed.stat().st_size)
    finally:
        packed.unlink()


def _add_json(tar: tarfile.TarFile, kind: str, value: object) -> dict[str, Any]:
    return _add_blob(tar, f"{kind}+json", json.dumps(value).encode())


def _add_blob(tar: tarfile.TarFile, kind: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    _add(tar, f"blobs/sha256/{digest}", content)
    return _descriptor(kind, digest, len(content))


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    media_type = f"application/vnd.oci.image.{kind}"
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = _entry(name, tarfile.REGTYPE, 0o644)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def pause_image() -> Path:
    """Returns the sandbox image, for the processes that keep a pod's namespaces: busybox,
    asleep.
    """
    path = BUILD / "images" / "pause.tar"
    with locked(BUILD / "pause.lock"):
        if not path.exists():
            busybox = (node_root("trixie") / "usr/bin/busybox").read_bytes()
            files = [File("/bin/sleep", busybox, 0o755)]
            config = ImageConfig(entrypoint=["/bin/sleep", "infinity"])
            write_image(PAUSE, [files], config, path)
    return path


def import_image(node: Enclosure, archive: Path) -> None:
    """Import an image layout's tar into the node's containerd, where CRI sees the image."""
    with archive.open("rb") as file:
        command = ["ctr", "--namespace", "k8s.io", "images", "import", "-"]
        node.run(command, stdin=file, timeout_s=300)
