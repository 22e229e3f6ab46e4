"""Files that are open or mapped although their name is gone, while other names of them are left.

CRIU gives such a file a new name (`link_remap.N`) for the time of the dump and removes it at the
end of it. The restore looks for that name, so the copies that we take get it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.contract.errors import NotCapturable
from shim.kernel.beneath import O_WALK, files_beneath, link_beneath, open_beneath, open_dir

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shim.criu.images import LinkRemap


@dataclass(frozen=True, slots=True)
class Copied:
    """A tree that was copied. prefix: where the container has it, `dev/shm/`, or empty for /."""

    prefix: str
    original: str
    copy: str


def give_links(
    remaps: Iterable[LinkRemap], inodes: Mapping[str, int], copied: Sequence[Copied], container: str
) -> None:
    """Link the copy of each remapped file to the name that the restore looks for.

    inodes: as of `shim.capture.opened.lost_names`. copied: the deepest mount first. Call it while
    the originals cannot change. Raises NotCapturable when a file cannot be found again.
    """
    for remap in remaps:
        tree = next(tree for tree in copied if remap.original.startswith(tree.prefix))
        name = _name_of(inodes.get(remap.original), tree.original)
        if not name:
            raise NotCapturable(
                "cannot capture a deleted file", container=container,
                why=f"/{remap.original} has other names, and none of them is in the snapshot",
                do="Close the file before the container is ready.",
            )  # fmt: skip
        _link(tree.copy, name, remap.link.removeprefix(tree.prefix))


def _link(copy: str, name: str, link: str) -> None:
    """Both are names that a container gave: nothing of them leads out of the copy."""
    parent, _, last = link.rpartition("/")
    with open_dir(copy) as top, open_beneath(top.fileno(), parent or ".", O_WALK) as directory:
        link_beneath(top.fileno(), name, directory.fileno(), last)


def _name_of(inode: int | None, directory: str) -> str:
    """A name beneath `directory` of the file with this inode number, or empty."""
    if inode is None:
        return ""
    with open_dir(directory) as top:
        for path, status in files_beneath(top.fileno()):
            if status.st_ino == inode:
                return path
    return ""
