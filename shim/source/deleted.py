"""Links the copies of open or mapped files that lost a name and have other names left.

CRIU gives such a file a new name (`link_remap.N`) during the dump and removes that name at the end.
The restore looks for the name, so our copies get it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.contract.errors import NotCapturable
from shim.kernel.beneath import O_WALK, files_beneath, link_beneath, open_beneath, open_dir

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shim.criu.images import LinkRemap
    from shim.kernel.stopping import Stop

SHM = "dev/shm/"
"""The container's path of /dev/shm, relative to its root."""


@dataclass(frozen=True, slots=True)
class Copied:
    """A copied tree. prefix: the container's path of the tree, `dev/shm/`, or empty for /.

    names: for the inode of each file that lost a name, a remaining name, relative to the tree.
    """

    prefix: str
    names: Mapping[int, str]
    copy: str


@dataclass(frozen=True, slots=True)
class Remapped:
    """The files to which CRIU gave new names, and their copied trees, the deepest mount first."""

    remaps: Sequence[LinkRemap]
    copied: Sequence[Copied]


def give_links(found: Remapped, inodes: Mapping[str, int], container: str, stop: Stop) -> None:
    """Link the copy of each remapped file to the name that the restore looks for.

    inodes: as of `shim.source.opened.lost_names`. Raises NotCapturable if a file cannot be found
    again; Stopped.
    """
    for remap in found.remaps:
        stop.check()
        tree = next(tree for tree in found.copied if remap.original.startswith(tree.prefix))
        name = tree.names.get(inodes.get(remap.original, 0))
        if not name:
            raise NotCapturable(
                "cannot capture a deleted file", about=container,
                why=f"/{remap.original} has other names, but the snapshot has none of them",
                do="Close the file before the container is ready.",
            )  # fmt: skip
        _link(tree.copy, name, remap.link.removeprefix(tree.prefix))


def _link(copy: str, name: str, link: str) -> None:
    """Link two names beneath the copy. A container gave both: neither leads out of the copy."""
    parent, _, last = link.rpartition("/")
    with open_dir(copy) as top, open_beneath(top.fileno(), parent or ".", O_WALK) as directory:
        link_beneath(top.fileno(), name, directory.fileno(), last)


def names_in(
    prefix: str, directory: str, remaps: Iterable[LinkRemap], inodes: Mapping[str, int], stop: Stop
) -> dict[int, str]:
    """Returns a name beneath `directory` for each remapped file with a name beneath `prefix`.

    Walks once for any number of files, and not at all for none. Call this while the originals
    cannot change. Raises Stopped, OSError.
    """
    wanted = {
        inodes[remap.original]
        for remap in remaps
        if remap.original.startswith(prefix) and remap.original in inodes
    }
    found: dict[int, str] = {}
    if not wanted:
        return found
    with open_dir(directory) as top:
        for path, status in files_beneath(top.fileno()):
            stop.check()
            if status.st_ino in wanted:
                found.setdefault(status.st_ino, path)
    return found
