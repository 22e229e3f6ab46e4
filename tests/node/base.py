"""Base root file systems of the test nodes: Debian packages, unpacked once and then only read.

Kept under build/node and named for the list of packages: another list makes another directory.
"""

import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

BUILD: Final = Path(__file__).parents[2] / "build" / "node"

NODE_PACKAGES: Final = (
    "busybox-static",  # the source of the pause image
    "ca-certificates",
    "containerd",
    "containernetworking-plugins",
    "criu",
    "iproute2",
    "iptables",  # CRIU locks a network with nft
    "nftables",
    "procps",
    "python3",
    "runc",
)
WORKER_PACKAGES: Final = ("python3", "ca-certificates")


def node_root(suite: str, more: tuple[str, ...] = ()) -> Path:
    """Returns the root file system of a node of Debian `suite`, made if it is missing.

    more: packages beside the packages of every node.
    """
    return root_filesystem(suite, (*NODE_PACKAGES, *more))


def worker_root(suite: str = "trixie") -> Path:
    """Returns the root file system from which the workers' images are made: Debian with Python."""
    return root_filesystem(suite, WORKER_PACKAGES)


def root_filesystem(suite: str, packages: tuple[str, ...]) -> Path:
    """Returns a minimal Debian `suite` with `packages`, under build/node. Takes half a minute when
    new.
    """
    named = hashlib.sha256("\n".join(("2", *packages)).encode()).hexdigest()[:10]
    path = BUILD / f"{suite}-{named}"
    with locked(BUILD / f"{suite}.lock"):
        if not path.is_dir():
            _make(suite, packages, path)
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`: several test runs share build/."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(suite: str, packages: tuple[str, ...], path: Path) -> None:
    for left_over in BUILD.glob(f".{path.name}-*"):
        shutil.rmtree(left_over)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=BUILD))
    root = scratch / "root"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}"]
    # A suite before or after its time of support may have a Release file past its date.
    command += [
        '--aptopt=Acquire::Check-Valid-Until "false"',
        "--dpkgopt=path-exclude=/usr/share/doc/*",
    ]
    command += [suite, str(root), mirror()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(scratch)
        raise RuntimeError(f"mmdebstrap could not make {suite}:\n{done.stderr}")
    shutil.rmtree(root / "dev")
    (root / "dev").mkdir()
    root.rename(path)
    shutil.rmtree(scratch)


def mirror() -> str:
    """Returns the Debian archive that this machine installs from. RuntimeError: it has none."""
    command = ["apt-get", "indextargets", "--format", "$(LABEL) $(SITE)", "Created-By: Packages"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        label, _, site = line.rpartition(" ")
        if label == "Debian":
            return site
    raise RuntimeError("apt knows no Debian archive: are its lists there? Run `apt-get update`.")
