"""Reads the overlay of a container's root file system, and mounts it again with another layer.

Owns the mount at BUNDLE/rootfs between containerd's mount(2) and the container's start, when no
process is inside. An upperdir is never part of two mounts at once: first unmount, then mount.
containerd still takes the mount for its own, and unmounts it when the container is gone. Lean: the
swap path imports it. Source: Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os

from shim.kernel import mounts
from shim.kernel.beneath import empty_dir, open_beneath, open_dir, remove_tree
from shim.rootfs import topdir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TypedDict

    from shim.rootfs.topdir import TopAttributes

    class Described(TypedDict):
        """A mounted overlay as JSON, enough to mount it again byte for byte."""

        schema: int
        rootfs: str
        source: str
        options: list[str]
        shared: bool
        upperdir: str
        workdir: str
        base: str
        lowerdirs: list[str]
        appended: bool
        carried: list[list[str | None]]
        root: TopAttributes


_SCHEMA = 1
_PAGE = 4096
_FSCONFIG_VALUE = 255
_LOWERDIR_APPEND_SINCE = (6, 5)
_SPECIAL = "\\,"
_LAYERS = ("lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir")
_NOT_OPTIONS = ("rw", "ro", "seclabel", "nouserxattr")
"""Options that the kernel prints but nobody sets. `ro` and `rw` are in the mount's own options."""


class Overlay:
    """An overlay as mounted.

    lowerdirs: as mounted, the topmost first; relative lowerdirs are relative to `base`, which is
    empty if all are absolute. appended: the lowerdirs were given separately (`lowerdir+`), not as a
    list. carried: the other options, in order, as (name, value or None).
    """

    __slots__ = ("appended", "base", "carried", "lowerdirs", "mount", "upperdir", "workdir")

    def __init__(self, mount: mounts.Mount) -> None:
        self.mount = mount
        self.upperdir = self.workdir = self.base = ""
        self.lowerdirs: list[str] = []
        self.appended = False
        self.carried: list[tuple[str, str | None]] = []
        for name, value in mount.pairs():
            self._take(name, value)
        if not (self.upperdir and self.workdir and self.lowerdirs):
            raise ValueError(f"the overlay at {mount.target} has no upperdir: it is read-only")
        if any(not lower.startswith("/") for lower in self.lowerdirs):
            self.base = _base_of(self.upperdir, self.lowerdirs)

    def _take(self, name: str, value: str | None) -> None:
        if name in _LAYERS and value is None:
            raise ValueError(f"{name} without a value")
        if name == "lowerdir":
            self.lowerdirs = split_lowerdirs(value or "")
        elif name == "lowerdir+":
            self.appended = True
            self.lowerdirs.append(value or "")
        elif name == "datadir+":
            raise ValueError("the overlay has data-only layers")
        elif name == "upperdir":
            self.upperdir = _unescape(value or "")  # printed as it was given
        elif name == "workdir":
            self.workdir = _unescape(value or "")
        elif name not in _NOT_OPTIONS:
            self.carried.append((name, value))

    def absolute_lowerdirs(self) -> list[str]:
        """Returns the lowerdirs as absolute paths, the topmost first."""
        return [os.path.join(self.base, lower) for lower in self.lowerdirs]

    def option(self, name: str) -> str | None:
        """Returns the value of a carried option; None if the option is a flag or not set."""
        return dict(self.carried).get(name)

    def has_userxattr(self) -> bool:
        """Returns whether overlayfs' marks begin with `user.overlay.`, not `trusted.overlay.`."""
        return ("userxattr", None) in self.carried


def split_lowerdirs(text: str) -> list[str]:
    r"""Returns the paths of a `lowerdir=` value: `:` separates, a backslash escapes a character.

    Raises ValueError on data-only layers (`::`), which nothing here mounts again.
    """
    paths, path, escaped = [], "", False
    for char in text:
        if not escaped and char == "\\":
            escaped = True
            continue
        if not escaped and char == ":":
            paths.append(path)
            path = ""
        else:
            path += char
        escaped = False
    paths.append(path)
    if "" in paths:
        raise ValueError("the overlay has data-only layers or an empty lowerdir")
    return paths


def join_lowerdirs(paths: Iterable[str]) -> str:
    """Returns the `lowerdir=` value for paths: the reverse of `split_lowerdirs`."""
    return ":".join(_escape(path, "\\:") for path in paths)


def _escape(text: str, special: str) -> str:
    return "".join(f"\\{char}" if char in special else char for char in text)


def _unescape(text: str) -> str:
    """Returns the text without escapes: the reverse of `_escape`."""
    plain, escaped = "", False
    for char in text:
        escaped = not escaped and char == "\\"
        plain += "" if escaped else char
    return plain + ("\\" if escaped else "")


def _base_of(upperdir: str, lowerdirs: list[str]) -> str:
    """Returns containerd's working directory during its mount with relative lowerdirs.

    containerd uses relative lowerdirs when the absolute paths do not fit a page: SNAPSHOTS/9/fs
    becomes 9/fs. The upperdir stays absolute and has the same shape.
    """
    base = os.path.dirname(os.path.dirname(upperdir))
    for lower in lowerdirs:
        # A wrong base would give the container other files: every lowerdir must be a plain child.
        if not lower.startswith("/") and ".." in lower.split("/"):
            raise ValueError(f"the lowerdir {lower} leads upwards")
        if not os.path.isdir(os.path.join(base, lower)):
            raise ValueError(f"the relative lowerdir {lower} is not in {base}")
    return base


def read_overlay(rootfs: str) -> Overlay:
    """Returns the overlay that is mounted at `rootfs`.

    Raises ValueError if there are no mounts or several, or if the description does not suffice to
    mount the overlay again; OSError if the mount table cannot be read.
    """
    found = mounts.mounts_at(os.path.realpath(rootfs))
    if len(found) != 1:
        raise ValueError(f"{len(found)} mounts at {rootfs}, expected one overlay")
    return _overlay(found[0])


def _overlay(mount: mounts.Mount) -> Overlay:
    if mount.fstype != "overlay":
        raise ValueError(f"{mount.target} is {mount.fstype}, not overlay")
    if mount.root != "/":
        raise ValueError(f"{mount.target} is the directory {mount.root} of an overlay")
    return Overlay(mount)


def describe(rootfs: str) -> Described:
    """Returns the overlay at `rootfs` as JSON. Journal it before `with_extra_lower`.

    Raises ValueError if a snapshot's diff cannot go into the mount: it is no overlay, or somebody
    has already written to its upperdir. OSError if it cannot be read.
    """
    overlay = read_overlay(rootfs)
    if os.listdir(overlay.upperdir):
        raise ValueError(f"{overlay.upperdir} is not empty: the container was written to")
    mounts.mount_flags(overlay.mount.options)  # a ValueError now, not after the unmount
    return {
        "schema": _SCHEMA,
        "rootfs": overlay.mount.target,
        "source": overlay.mount.source,
        "options": list(overlay.mount.options),
        "shared": any(field.startswith("shared:") for field in overlay.mount.propagation),
        "upperdir": overlay.upperdir,
        "workdir": overlay.workdir,
        "base": overlay.base,
        "lowerdirs": overlay.lowerdirs,
        "appended": overlay.appended,
        "carried": [list(pair) for pair in overlay.carried],
        "root": topdir.attributes(overlay.upperdir),
    }


def with_extra_lower(rootfs: str, diff_dir: str) -> None:
    """Mount the overlay at `rootfs` again with `diff_dir` as its topmost lower layer.

    The root directory gets the mode, owner, times and xattrs of `diff_dir`. Refuses an impossible
    mount before any change, as far as it can know. Raises OSError or ValueError, before the change
    or in it; in both cases `remount` with the earlier description restores the mount.
    """
    described = describe(rootfs)
    open_dir(diff_dir).close()  # an OSError now, not after the unmount
    wanted: Described = {**described, "base": ""}
    absolute = [os.path.join(described["base"], lower) for lower in described["lowerdirs"]]
    wanted["lowerdirs"] = [os.path.abspath(diff_dir), *absolute]
    # With an index, which may be the kernel's default, overlayfs refuses an upperdir that had
    # other layers below it before.
    carried = [pair for pair in described["carried"] if pair[0] not in ("index", "nfs_export")]
    wanted["carried"] = [*carried, ["index", "off"]]
    wanted["appended"] = described["appended"] or not _fits(wanted)
    _check_appendable(wanted)
    root = topdir.seen_through(described["root"], topdir.attributes(wanted["lowerdirs"][0]))
    mounts.unmount(described["rootfs"])
    topdir.set_attributes(wanted["upperdir"], root)
    _mount(wanted)


def remount(described: Described) -> None:
    """Put the overlay back as `describe` found it: the same stack, an empty upperdir.

    Undoes `with_extra_lower` exactly, however far that came, also in another process after kill -9.
    Idempotent: if the described overlay is mounted already, this touches nothing, so a late call
    cannot empty the upperdir of a container that started cold. Do not call this once a restored
    container runs on the longer stack. Raises OSError, ValueError.
    """
    if described["schema"] != _SCHEMA:
        raise ValueError(f"a description of schema {described['schema']}")
    for mount in reversed(mounts.mounts_at(described["rootfs"])):
        overlay = _overlay(mount)
        if overlay.upperdir != described["upperdir"]:
            raise ValueError(f"{mount.target} is the overlay of {overlay.upperdir}")
        if overlay.lowerdirs == described["lowerdirs"]:
            return
        _unmount_for_good(mount.target)
    with open_dir(described["upperdir"]) as upper:
        empty_dir(upper.fileno())
    topdir.set_attributes(described["upperdir"], described["root"])
    _mount(described)


def _unmount_for_good(target: str) -> None:
    try:
        mounts.unmount(target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        # A process outside has a file in the mount open. The pod has to start: the last resort.
        mounts.unmount(target, detach=True)


def _mount(described: Described) -> None:
    if _is_volatile(described):
        _forget_volatile(described["workdir"])
    if described["appended"]:
        _mount_appended(described)
    else:
        _mount_listed(described)
    here = mounts.mounts_at(described["rootfs"])[-1]
    shared = any(field.startswith("shared:") for field in here.propagation)
    if shared != described["shared"]:
        kind = mounts.MS_SHARED if described["shared"] else mounts.MS_PRIVATE
        mounts.set_propagation(described["rootfs"], kind)


def _mount_listed(described: Described) -> None:
    """Mount with mount(2), as containerd does, on every kernel."""
    flags = mounts.mount_flags(described["options"])
    with _standing_in(described["base"]):
        mounts.mount(
            described["source"], described["rootfs"], "overlay", flags, _option_text(described)
        )


def _mount_appended(described: Described) -> None:
    """Mount with a `lowerdir+` for each layer: no limit to their common length."""
    with _standing_in(described["base"]), mounts.FsContext("overlay") as context:
        context.set("source", described["source"])
        for name, value in described["carried"]:
            # In a mount option string, quotes keep the commas of an SELinux context together.
            context.set(str(name), value.strip('"') if value else value)
        for lower in described["lowerdirs"]:
            context.set("lowerdir+", lower)
        # The kernel removes backslashes from these two values, and not from `lowerdir+`.
        context.set("upperdir", _escape(described["upperdir"], _SPECIAL))
        context.set("workdir", _escape(described["workdir"], _SPECIAL))
        context.mount_at(described["rootfs"], mounts.mount_attributes(described["options"]))


def _option_text(described: Described) -> str:
    options = [f"{name}={value}" if value is not None else f"{name}"
               for name, value in described["carried"]]  # fmt: skip
    # The kernel splits at commas first, and removes a level of backslashes with the colons.
    lowerdirs = _escape(join_lowerdirs(described["lowerdirs"]), ",")
    options.append(f"lowerdir={lowerdirs}")
    options.append(f"upperdir={_escape(described['upperdir'], _SPECIAL)}")
    options.append(f"workdir={_escape(described['workdir'], _SPECIAL)}")
    return ",".join(options)


def _fits(described: Described) -> bool:
    return len(os.fsencode(_option_text(described))) < _PAGE


def _check_appendable(described: Described) -> None:
    if not described["appended"]:
        return
    release = os.uname().release
    numbers = release.replace("-", ".").split(".")[:2]
    if tuple(map(int, numbers)) < _LOWERDIR_APPEND_SINCE:
        raise ValueError(
            f"{len(described['lowerdirs'])} layers do not fit one page of mount options, and "
            f"Linux {release} is too old to take them one by one (6.5)"
        )
    for path in (*described["lowerdirs"], described["upperdir"], described["workdir"]):
        if len(os.fsencode(path)) > _FSCONFIG_VALUE:
            raise ValueError(f"the path {path} is longer than fsconfig takes")


@contextlib.contextmanager
def _standing_in(directory: str) -> Iterator[None]:
    """Change to `directory`: relative lowerdirs are relative to the caller's working directory."""
    if not directory:
        yield
        return
    with open_dir(".") as before:
        os.chdir(directory)
        try:
            yield
        finally:
            os.fchdir(before.fileno())


def _is_volatile(described: Described) -> bool:
    return ["volatile", None] in described["carried"] or ["fsync", "volatile"] in described[
        "carried"
    ]


def _forget_volatile(workdir: str) -> None:
    """Remove the mark by which overlayfs refuses a volatile upperdir a second time.

    The mark stands for a crash that may have lost writes. Our overlay was unmounted, and its
    upperdir is empty.
    """
    with (
        contextlib.suppress(FileNotFoundError),
        open_dir(workdir) as workdir_fd,
        open_beneath(workdir_fd.fileno(), "work/incompat", os.O_RDONLY) as incompat,
    ):
        remove_tree(incompat.fileno(), "volatile")
