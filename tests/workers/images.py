"""The workers' images: `quickthaw.test/probe` and `quickthaw.test/inference`.

Layers, from the bottom: Debian with Python (of tests/node/base.py), for `inference` the wheels
of wheels.lock, and on top the workers. Every layer is kept under build/images by the hash of what
it is made from, so that a changed worker makes one small layer again.

    build/venv/bin/python -m tests.workers.images            both images; prints their paths
    build/venv/bin/python -m tests.workers.images lock       resolve WHEELS, write wheels.lock
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from tests.node import base
from tests.workers import inputs, ocitar

HERE: Final = Path(__file__).parent
BUILD: Final = HERE.parents[1] / "build" / "images"
LOCK: Final = HERE / "wheels.lock"
# What the inference worker imports. The lock adds what these need.
WHEELS: Final = (
    "magika==1.0.3",
    "onnxruntime==1.32.0",
    "pillow==13.0.0",
    "rapidocr==3.10.0",
    "starlette==1.10.0",
    "uvicorn==0.54.0",
)
PYTHON: Final = "3.13"  # of Debian trixie
_PLATFORMS: Final = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
_NOT_NEEDED: Final = (
    "dev/",
    "proc/",
    "sys/",
    "tmp/",
    "run/",
    "var/cache/",
    "var/lib/apt/",
    "var/log/",
    "usr/share/doc/",
    "usr/share/locale/",
    "usr/share/man/",
)
_COMPILE: Final = "python3 -m compileall -q --invalidation-mode unchecked-hash"


def build(name: str) -> Path:
    """The image `probe` or `inference` as an OCI archive; made when it is not there yet.

    Raises KeyError for another name, subprocess.CalledProcessError when a tool fails.
    """
    layers = {"probe": _probe_layers, "inference": _inference_layers}[name]()
    config = {
        "Env": [
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH=/opt:/opt/site",
            "PYTHONUNBUFFERED=1",
        ],
        "Cmd": ["python3", "-m", f"workers.{name}"],
        "WorkingDir": "/",
    }
    made_from = [layer.digest for layer in layers] + [str(config), ocitar.digest_of(_own("ocitar"))]
    archive = BUILD / f"{name}-{_key(*made_from)}.tar"
    with base.locked(BUILD / "lock"):
        if not archive.exists():
            for older in BUILD.glob(f"{name}-*.tar"):
                older.unlink()
            ocitar.write_image(archive, reference(name), layers, config)
    return archive


def reference(name: str) -> str:
    """The name under which containerd knows the image."""
    return f"quickthaw.test/{name}:latest"


def real_inputs() -> list[inputs.Input]:
    """The inputs of the inference worker with their answers; made with the image's Pillow."""
    return inputs.read(_site() / "inputs")


def _own(module: str) -> Path:
    return HERE / f"{module}.py"


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _probe_layers() -> list[ocitar.Layer]:
    return [_debian(), _workers()]


def _inference_layers() -> list[ocitar.Layer]:
    site = _site()
    return [_debian(), _layer("site", site.name, site / "site", "opt/site"), _workers()]


def _layer(kind: str, key: str, tree: Path, prefix: str = "") -> ocitar.Layer:
    """A cached layer; its digest is kept beside it."""
    path = BUILD / "layers" / f"{kind}-{_key(key, ocitar.digest_of(_own('ocitar')))}.tar"
    digest = path.with_suffix(".digest")
    with base.locked(BUILD / "layers" / f"{kind}.lock"):
        if not digest.exists():
            for older in path.parent.glob(f"{kind}-*"):
                older.unlink()
            digest.write_text(ocitar.make_layer(tree, path, prefix=prefix, keep=_kept).digest)
    return ocitar.Layer(path, digest.read_text())


def _kept(path: str) -> bool:
    return not path.startswith(_NOT_NEEDED)


def _debian() -> ocitar.Layer:
    root = base.worker_root()
    return _layer("debian", root.name, root)


def _workers() -> ocitar.Layer:
    """The scripts, without times: only a changed script changes the layer."""
    scripts = sorted(path for path in HERE.glob("*.py") if path.stem not in ("images", "ocitar"))
    with tempfile.TemporaryDirectory() as scratch:
        for script in scripts:
            copy = Path(scratch, script.name)
            copy.write_bytes(script.read_bytes())
            copy.chmod(0o644)
            _age(copy)
        key = _key(*(f"{path.name} {ocitar.digest_of(path)}" for path in scripts))
        return _layer("workers", key, Path(scratch), "opt/workers")


def _age(path: Path) -> None:
    """Give a file a time that says nothing."""
    os.utime(path, (1, 1))


def _site() -> Path:
    """A directory with `site`, the wheels unpacked and compiled, and `inputs`."""
    root = base.worker_root()
    made_from = [LOCK.read_text(), root.name, ocitar.digest_of(_own("inputs")), _COMPILE]
    path = BUILD / f"site-{_key(*made_from)}"
    with base.locked(BUILD / "site.lock"):
        if not path.is_dir():
            for older in [*BUILD.glob("site-*"), *BUILD.glob(".site-*")]:
                shutil.rmtree(older)
            scratch = BUILD / f".{path.name}"
            for directory in ("wheels", "site", "inputs"):
                (scratch / directory).mkdir(parents=True)
            _pip_download(scratch / "wheels", "--no-deps", "--require-hashes", "-r", str(LOCK))
            for wheel in sorted((scratch / "wheels").glob("*.whl")):
                _unpack(wheel, scratch / "site")
            shutil.rmtree(scratch / "wheels")
            _run_in(root, scratch)
            scratch.rename(path)
    return path


def _unpack(wheel: Path, to: Path) -> None:
    """What is imported from a wheel; not its console scripts."""
    data = f"{'-'.join(wheel.name.split('-')[:2])}.data/"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to, [name for name in archive.namelist() if not name.startswith(data)])


def _run_in(root: Path, scratch: Path) -> None:
    """Compile the wheels and draw the pictures with the image's own Python.

    In a mount namespace of its own, so that nothing stays mounted; `root` is not written to.
    """
    script = f"""set -e
        mount --bind "$2" "$1/mnt"
        mount --bind -o ro "$3" "$1/srv"
        chroot "$1" {_COMPILE} -s /mnt/site -p /opt/site /mnt/site
        PYTHONPATH=/mnt/site chroot "$1" python3 -B /srv/inputs.py / /mnt/inputs"""
    unshare = ["unshare", "--mount", "--net", "--propagation", "private"]
    command = [*unshare, "sh", "-c", script, "sh", str(root), str(scratch), str(HERE)]
    # A wheel's own warnings are of no use to who builds an image of it.
    subprocess.run(command, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def _pip_download(to: Path, *what: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--only-binary", ":all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(to)]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *what], check=True)


def lock() -> None:
    """Resolve WHEELS again and pin every file by its digest."""
    with tempfile.TemporaryDirectory() as scratch:
        _pip_download(Path(scratch), *WHEELS)
        lines = []
        for wheel in sorted(Path(scratch).glob("*.whl")):
            name, version = wheel.name.split("-")[:2]
            digest = ocitar.digest_of(wheel)
            lines.append(f"{name.replace('_', '-').lower()}=={version} --hash={digest}\n")
    LOCK.write_text(
        "# Made by `python -m tests.workers.images lock`. Do not edit.\n" + "".join(lines)
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["lock"]:
        lock()
    else:
        for image in ("probe", "inference"):
            print(build(image))
