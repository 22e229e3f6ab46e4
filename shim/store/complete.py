"""Completes a staged snapshot: digests, then manifest and signature. Reads a complete directory.

`Store.place` makes a complete directory exist as a snapshot, wherever the directory was made.
Blocking.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from shim.contract import faults
from shim.contract import manifest as manifests
from shim.contract.errors import BadManifest, KeyRefused, NotPublished, too_big
from shim.contract.limits import TooMuch
from shim.contract.paths import SNAPSHOT_MANIFEST, SNAPSHOT_SIGNATURE
from shim.integrity import record
from shim.integrity.tree import Mismatch
from shim.kernel.beneath import open_dir, read_beneath
from shim.trust import signature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shim.contract.manifest import Manifest
    from shim.integrity.record import Recorded
    from shim.kernel.stopping import Stop


class Incomplete(Exception):
    """A directory lacks something of a complete snapshot. str: the place, expected and found."""


def digest(staged: Path, stop: Stop) -> Recorded:
    """Write the listings with the digests of all content. Raises as `shim.integrity.record`."""
    with open_dir(str(staged)) as directory:
        return record.record(directory.fileno(), stop)


def sign(staged: Path, found: Manifest, signing: Callable[[Manifest], bytes] | None) -> None:
    """Write the manifest and, with `signing`, its signature. Raises KeyRefused, OSError.

    signing: returns the content of the signature file.
    """
    signed = signing(found) if signing else b""
    _write(staged / SNAPSHOT_MANIFEST, found.encode())
    faults.point("store.manifest.written")
    if signed:
        _write(staged / SNAPSHOT_SIGNATURE, signed)


def read(staged: Path, *, is_signed: bool) -> tuple[Manifest, bytes]:
    """Returns the manifest and the signature of a complete directory.

    is_signed: refuse a directory without a signature. Judges neither the signature
    (`shim.trust.verdict` does) nor the content (`shim.integrity.check` does). Raises Incomplete,
    BadManifest, OSError.
    """
    with open_dir(str(staged)) as directory:
        dirfd = directory.fileno()
        data = read_beneath(dirfd, SNAPSHOT_MANIFEST, limit_bytes=manifests.MAX_BYTES)
        found, signed = manifests.decode(data, where=staged.name), _signature(dirfd)
        for file in found.files:
            size = os.stat(file.path, dir_fd=dirfd, follow_symlinks=False).st_size
            if size != file.size:
                raise Incomplete(f"{file.path}: expected {file.size} bytes, found {size}")
    if is_signed and not signed:
        raise Incomplete(f"{SNAPSHOT_SIGNATURE}: expected a signature, found none")
    return found, signed


def signature_in(directory: int) -> bytes:
    """Returns the unverified signature file of a snapshot's directory; empty if there is none."""
    try:
        return _signature(directory)
    except OSError as error:
        # Too long, a link, a device: report it as a signature that cannot be decoded.
        return f"unreadable: {error.strerror}".encode()


@contextlib.contextmanager
def border(staged: Path, root: Path) -> Iterator[None]:
    """Raises NotPublished or SnapshotTooBig in place of an error of the steps above."""
    try:
        yield
    except KeyRefused as error:
        raise NotPublished(
            "cannot sign the snapshot", about=staged.name, why=f"{error.about}: "
            f"{error.why}", do=error.do,
        ) from error  # fmt: skip
    except TooMuch as error:
        raise too_big(staged.name, error) from error
    except (BadManifest, Incomplete) as error:
        why = f"its manifest: {error.why}" if isinstance(error, BadManifest) else str(error)
        raise NotPublished(
            "cannot publish the snapshot", about=staged.name, why=why,
            do="Make the snapshot again: capture the workload, or copy all of the directory.",
        ) from error  # fmt: skip
    except (OSError, ValueError, Mismatch) as error:
        raise NotPublished(
            "cannot publish the snapshot", about=staged.name, why=str(error),
            do=f"Is there room in {root}?",
        ) from error  # fmt: skip


def _signature(directory: int) -> bytes:
    try:
        return read_beneath(directory, SNAPSHOT_SIGNATURE, limit_bytes=signature.MAX_BYTES)
    except FileNotFoundError:
        return b""


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
