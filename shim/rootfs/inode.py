"""Copies an inode between two directories: data, holes, owner, mode, xattrs, times. Lean.

The rootfs diff and /dev/shm use this module, in both directions. A running container may be able to
write to the source and the target: every name is a single path component below a descriptor, and
nothing follows a link. Attributes are read and set only through descriptors of a checked type:
between two calls with a name, the name can become a link to a file of the node.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from shim.kernel.beneath import by_descriptor, open_made
from shim.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_FICLONE = 0x40049409
_CHUNK = 1 << 20
_PIECE_BYTES = 4 << 20
_STEP_BYTES = 64 << 20
"""The most bytes in a request to the kernel: between two requests the copier checks for a stop."""
_SMALL = 128 << 10
_O_TARGET = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CANNOT_IN_KERNEL = (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOTTY)

O_SOURCE = os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC
O_SOURCE_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME | os.O_CLOEXEC
"""Flags for reading a container's directory without changing its access time."""


class Changed(Exception):
    """The name is no longer of the file type that the walk found."""


def never() -> None:
    """The `tick` of a Copier that nobody stops."""


def all_xattrs(name: str) -> bool:
    """Lets every xattr through: a filter for `Copier`."""
    return True


class Copier:
    """Copies inodes and counts them.

    travels: returns whether to copy the xattr of this name; may raise to refuse the file. tick:
    called now and then; an exception from `tick` ends the work. files: inodes made. bytes: data
    written or shared with the source.
    """

    __slots__ = ("_in_kernel", "_reflink", "bytes", "files", "tick", "travels")

    def __init__(
        self, travels: Callable[[str], bool] = all_xattrs, tick: Callable[[], None] = never
    ) -> None:
        self.travels, self.tick = travels, tick
        self.files = self.bytes = 0
        self._reflink = self._in_kernel = True

    def copy(
        self, source_dirfd: int, name: str, target_dirfd: int, made: str = ""
    ) -> os.stat_result:
        """Copy a file, not a directory, to the same name or to `made`, which must not exist yet.

        Returns the status of the source just before the read. Sockets and fifos become new sockets
        and fifos without a peer or content. Raises OSError; Changed if the name is a directory now,
        NotMade if the copy is another file now.
        """
        with OwnedFd(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=source_dirfd)) as fd:
            status = os.fstat(fd.fileno())
            if stat.S_ISREG(status.st_mode):
                self._copy_file(fd.fileno(), status, made or name, target_dirfd)
            elif stat.S_ISDIR(status.st_mode):
                raise Changed(name)
            else:
                self._copy_special(fd.fileno(), status, made or name, target_dirfd)
        self.files += 1
        return status

    def copy_attributes(self, source_fd: int, target_fd: int) -> None:
        """Copy owner, xattrs and mode of an open file or directory, but not its times."""
        self._copy_all(source_fd, target_fd, os.fstat(source_fd))

    def _copy_all(self, source: int | str, target: int | str, status: os.stat_result) -> None:
        """source, target: descriptors, or the paths of descriptors that were opened with O_PATH."""
        # chown clears setuid and capabilities, so it comes first; an ACL changes the mode.
        os.chown(target, status.st_uid, status.st_gid)
        self._copy_xattrs(source, target)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(target, stat.S_IMODE(status.st_mode))

    def _copy_file(
        self, path_fd: int, status: os.stat_result, name: str, target_dirfd: int
    ) -> None:
        """path_fd: opened with O_PATH, so that a device put in the file's place is never opened."""
        with (
            OwnedFd(os.open(by_descriptor(path_fd), O_SOURCE)) as source,
            OwnedFd(self.new_file(status, name, target_dirfd)) as target,
        ):
            self.copy_data(source.fileno(), target.fileno(), status)
            self.copy_attributes(source.fileno(), target.fileno())
            set_times(target.fileno(), status)

    def new_file(self, status: os.stat_result, name: str, target_dirfd: int) -> int:
        """Returns a new file, for `copy_data`. status: of the source."""
        return os.open(name, _O_TARGET, 0o600, dir_fd=target_dirfd)

    def _copy_special(
        self, source_fd: int, status: os.stat_result, name: str, target_dirfd: int
    ) -> None:
        """Copy a symlink, device, fifo or socket. source_fd: opened with O_PATH."""
        kind = stat.S_IFMT(status.st_mode)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink("", dir_fd=source_fd), name, dir_fd=target_dirfd)
        else:
            os.mknod(name, kind | 0o600, status.st_rdev, dir_fd=target_dirfd)
        with open_made(name, kind, target_dirfd) as made:
            # These calls refuse an O_PATH descriptor, but take its path in /proc.
            target = by_descriptor(made.fileno())
            self._copy_all(by_descriptor(source_fd), target, status)
            set_times(target, status)

    def _copy_xattrs(self, source: int | str, target: int | str) -> None:
        wanted = [name for name in os.listxattr(source) if self.travels(name)]
        for name in os.listxattr(target):  # a default ACL of the directory, a label of the policy
            if name not in wanted:
                os.removexattr(target, name)
        for name in wanted:
            os.setxattr(target, name, os.getxattr(source, name))

    def copy_data(self, source_fd: int, target_fd: int, status: os.stat_result) -> None:
        """Copy the content of a regular file into an empty file; holes stay holes."""
        size = status.st_size
        self.bytes += size
        if size <= _SMALL and status.st_blocks * 512 >= size:
            left = size  # not to the end: somebody may go on appending
            while left and (chunk := os.read(source_fd, left)):
                _write(target_fd, chunk)
                left -= len(chunk)
        elif not self._shared(source_fd, target_fd):
            os.truncate(target_fd, size)
            for start, end in data_ranges(source_fd, size):
                self._copy_range(source_fd, target_fd, start, end)

    def _shared(self, source_fd: int, target_fd: int) -> bool:
        """Returns whether the target shares the source's blocks now (XFS, btrfs)."""
        if not self._reflink:
            return False
        try:
            fcntl.ioctl(target_fd, _FICLONE, source_fd)
        except OSError as error:
            if error.errno not in _CANNOT_IN_KERNEL:
                raise
            self._reflink = False
        return self._reflink

    def _copy_range(self, source_fd: int, target_fd: int, start: int, end: int) -> None:
        while self._in_kernel and start < end:
            self.tick()
            step = min(end - start, _STEP_BYTES)
            try:
                done = os.copy_file_range(source_fd, target_fd, step, start, start)
            except OSError as error:
                if error.errno not in _CANNOT_IN_KERNEL:
                    raise
                self._in_kernel = False
            else:
                if not done:
                    return  # the source became shorter
                start += done
        while start < end and (chunk := os.pread(source_fd, min(_CHUNK, end - start), start)):
            self.tick()
            start += os.pwrite(target_fd, chunk, start)


def set_times(target: int | str, status: os.stat_result) -> None:
    """Give a file the access and modification times of `status`.

    target: a descriptor, or the path of a descriptor (`by_descriptor`).
    """
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields the ranges with data, as (start, end), up to `size`. There may be very many.

    Source: lseek(2), SEEK_DATA.
    """
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: only a hole follows
                raise
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < end:
            yield start, end


def pieces(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields the same ranges, in pieces for a thread."""
    for start, end in ranges:
        for at in range(start, end, _PIECE_BYTES):
            yield at, min(at + _PIECE_BYTES, end)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
