"""The parsers of /proc/PID agree with the kernel, whatever names processes and files have."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.kernel import procfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SELF: Final = os.getpid()
BREAKS: Final = b"\r\x0b\x0c\x1c\x1d\x1e\xc2\x85\xe2\x80\xa8"
"""Line breaks of Python's and not of the kernel's."""
NAMES: Final = [b"a) R 1 2", b"\xff\xfe", b"two words", b"\n", b"x kB", b"a\\nb", BREAKS]

odd_bytes = st.binary(max_size=20).map(lambda name: name.replace(b"\n", b"\\012"))
"""A file's name as the kernel shows it: any bytes, with line feeds escaped."""
words = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ_", min_size=1, max_size=9)


# maps


@given(
    st.integers(0, 2**47), st.integers(1, 2**40), st.integers(0, 2**40), st.integers(1, 2**63),
    st.sampled_from(["r-xp", "rw-s", "---p"]), odd_bytes,
)  # fmt: skip
def test_areas_are_parsed_whatever_the_name_of_the_file(
    start: int, size: int, offset: int, inode: int, rights: str, name: bytes
) -> None:
    head = f"{start:08x}-{start + size:08x} {rights} {offset:08x} 00:1f {inode} ".encode()
    area = procfs.area(head.ljust(73) + b"/" + name + b"\n")
    assert (area.range, area.offset, area.inode) == ((start, start + size), offset, inode)
    assert (area.rights, area.device, area.name) == (rights.encode(), b"00:1f", b"/" + name)
    assert area.path == os.fsdecode(area.name)
    assert area.map_file == f"{start:x}-{start + size:x}"


def test_area_without_a_name() -> None:
    area = procfs.area(b"7f1041f83000-7f1041f84000 rw-p 00000000 00:00 0 \n")
    assert (area.name, area.path, area.inode) == (b"", "", 0)


@pytest.mark.parametrize("name", [b"a file (deleted)", *NAMES])
def test_areas_have_a_mapped_file(tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb+") as file:
        file.write(bytes(2 * mmap.PAGESIZE))
        file.flush()
        with mmap.mmap(file.fileno(), mmap.PAGESIZE, offset=mmap.PAGESIZE):
            shown = path.replace(b"\n", b"\\012")
            (area,) = (each for each in procfs.areas(SELF) if each.name == shown)
            assert area.map_file in procfs.map_files(SELF)
            assert procfs.has_mapped(SELF, shown)
    first, last = area.range
    assert (last - first, area.offset, area.rights) == (mmap.PAGESIZE, mmap.PAGESIZE, b"rw-s")
    status = os.stat(path)
    assert (area.inode, area.device) == (status.st_ino, procfs.device(status.st_dev))
    assert not procfs.has_mapped(SELF, shown)


LINE: Final = b"%08x-%08x rw-p 00000000 00:1f 7         /%s"
lines = st.lists(odd_bytes.map(lambda name: name * 300), max_size=9).map(
    lambda names: [LINE % (at, at + 4096, name) for at, name in enumerate(names)]
)
"""Up to 9 lines, which may be longer than a piece."""


@given(lines, odd_bytes.filter(bool))
def test_lines_are_whole_wherever_a_piece_ends(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], part: bytes
) -> None:
    proc = tmp_path_factory.getbasetemp()
    (proc / "7").mkdir(exist_ok=True)
    (proc / "7/maps").write_bytes(b"".join(line + b"\n" for line in lines))
    assert list(procfs.areas(7, proc=str(proc))) == [procfs.area(line) for line in lines]
    having = [line for line in lines if part in line]
    assert list(procfs.areas(7, part, str(proc))) == [procfs.area(line) for line in having]
    assert procfs.has_mapped(7, part, str(proc)) == bool(having)


@given(st.binary(max_size=60))
def test_line_with_too_few_fields_is_a_value_error(line: bytes) -> None:
    if len(line.split()) < 5:
        with pytest.raises(ValueError, match="no line of maps"):
            procfs.area(line)


def test_areas_are_as_many_as_the_kernel_has() -> None:
    with mmap.mmap(-1, 1000 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        held = ctypes.c_char.from_buffer(memory)
        for page in range(0, 1000, 2):
            address = ctypes.addressof(held) + page * mmap.PAGESIZE
            assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 1)
        with open(f"/proc/{SELF}/maps", "rb") as file:
            lines = file.read().count(b"\n")
        found = [each.range for each in procfs.areas(SELF)]
        del held
    assert abs(len(found) - lines) <= 3  # a buffer may have grown an area
    assert found == sorted(found)


# status, smaps_rollup, fdinfo: names and values


@given(st.dictionaries(words, odd_bytes))
def test_fields_are_the_rows_with_a_name(rows: dict[str, bytes]) -> None:
    text = b"".join(name.encode() + b":\t" + value + b"\n" for name, value in rows.items())
    found = procfs.fields(b"inotify wd:1 ino:2\n" + text + b"tfd: 5\n")
    assert found == {name: os.fsdecode(value) for name, value in rows.items()}


@given(st.dictionaries(words, st.integers(0, 2**40)), odd_bytes)
def test_sizes_are_the_rows_in_kib(rows: dict[str, int], name: bytes) -> None:
    text = b"".join(b"%s: %12d kB\n" % (key.encode(), kib) for key, kib in rows.items())
    head = b"55d0-7ffd ---p 00000000 00:00 0    [rollup]\nName+:\tx" + name + b"\nThreads+:\t7\n"
    assert procfs.sizes(head + text) == {key: kib * 1024 for key, kib in rows.items()}


@given(st.binary(max_size=80))
def test_any_text_is_parsed_or_a_value_error(text: bytes) -> None:
    for parse in (procfs.fields, procfs.sizes, procfs.cgroup_rows, procfs.stat_fields):
        with contextlib.suppress(ValueError):
            parse(text)


def test_status_of_this_process() -> None:
    assert procfs.status(SELF)["Pid"] == str(SELF)
    assert procfs.status(f"{SELF}/task/{SELF}")["Tgid"] == str(SELF)
    assert procfs.memory(SELF)["VmHWM"] >= procfs.memory(SELF)["VmRSS"] > 1 << 20
    assert procfs.rollup("self")["Pss"] > 1 << 20
    assert procfs.numbers(SELF)[0] == SELF


def test_process_without_numbers_has_ended(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/status").write_bytes(b"Name:\tx\n")
    with pytest.raises(ProcessLookupError, match="process 7 has no NSpid"):
        procfs.numbers(7, str(tmp_path))


def test_fdinfo_of_every_kind_of_descriptor() -> None:
    read, write = os.pipe()
    poll = os.eventfd(0)
    try:
        assert {str(read), str(write), str(poll)} <= set(procfs.descriptors(SELF))
        assert procfs.fdinfo(SELF, read)["pos"] == "0"
        assert int(procfs.fdinfo(SELF, str(write))["flags"], 8) & os.O_ACCMODE == os.O_WRONLY
        assert "mnt_id" in procfs.fdinfo("self", poll)
    finally:
        for fd in (read, write, poll):
            os.close(fd)


# stat


@given(odd_bytes, st.lists(st.integers(-1, 2**64), min_size=1))
def test_stat_fields_do_not_depend_on_the_name(name: bytes, numbers: list[int]) -> None:
    text = b"1 (" + name + b") S " + b" ".join(b"%d" % each for each in numbers) + b"\n"
    assert procfs.stat_fields(text) == ["S", *map(str, numbers)]


@contextlib.contextmanager
def named(name: bytes) -> Iterator[int]:
    """Yields a child whose process has this name."""
    code = f"import ctypes, sys; ctypes.CDLL(None).prctl(15, {name!r}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize("name", NAMES)
def test_name_of_a_process_misleads_no_parser(name: bytes) -> None:
    with named(name) as pid:
        assert procfs.state(pid) in ("R", "S")
        assert procfs.status(pid)["PPid"] == str(SELF) == str(procfs.parent(pid))
        assert procfs.memory(pid)["VmRSS"]
        assert "Name" not in procfs.memory(pid)
        assert procfs.numbers(pid)[0] == pid
        assert procfs.start_ticks(pid) >= procfs.start_ticks(SELF)
        assert procfs.comm(pid) == procfs.comm(f"{pid}/task/{pid}") == name[:15]
        assert pid in procfs.children(SELF)
        assert pid in procfs.pids()


def test_process_that_has_ended_is_an_os_error() -> None:
    with named(b"short") as pid:
        os.kill(pid, 9)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert procfs.state(pid) == "Z"
        with pytest.raises(ProcessLookupError):
            procfs.start_ticks(pid)
        with pytest.raises(ProcessLookupError):
            procfs.rollup(pid)
    for look in (procfs.status, procfs.stat, procfs.rollup, procfs.cgroups, procfs.comm,
                 procfs.threads, procfs.children, procfs.numbers):  # fmt: skip
        with pytest.raises((FileNotFoundError, ProcessLookupError)):
            look(pid)
    for listed in (procfs.areas, procfs.descriptors, procfs.map_files):
        with pytest.raises((FileNotFoundError, ProcessLookupError)):
            next(iter(listed(pid)))
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        procfs.has_mapped(pid, b"/")


# cgroup, task, children


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "cpu,cpuacct", "name=systemd"]),
            odd_bytes.map(lambda name: f"/{os.fsdecode(name)}"),
        )
    )
)
def test_cgroup_rows_keep_any_path(rows: list[tuple[str, str]]) -> None:
    lines = (f"{number}:{names}:{path}\n" for number, (names, path) in enumerate(rows))
    assert procfs.cgroup_rows(os.fsencode("".join(lines))) == rows


def test_threads_and_cgroups_of_this_process() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert thread.native_id in procfs.threads(SELF)
    done.set()
    thread.join()
    assert all(path.startswith("/") for _, path in procfs.cgroups(SELF))


@given(st.lists(st.integers(1, 2**22)), st.lists(st.integers(1, 2**22)))
def test_children_of_all_threads(
    tmp_path_factory: pytest.TempPathFactory, one: list[int], other: list[int]
) -> None:
    proc = tmp_path_factory.mktemp("proc")
    for thread, children in ((7, one), (8, other)):
        task = proc / f"7/task/{thread}"
        task.mkdir(parents=True)
        (task / "children").write_text("".join(f"{child} " for child in children))
    assert sorted(procfs.children(7, str(proc))) == sorted(one + other)
    assert procfs.of_thread(7, 8, str(proc)) == other


def test_import_needs_nothing_else() -> None:
    code = "import sys; had = set(sys.modules); from shim.kernel import procfs; " \
           "print(*sorted(set(sys.modules) - had))"  # fmt: skip
    loaded = subprocess.check_output(
        [sys.executable, "-SEc", f"import sys; sys.path.insert(0, '.'); import os; {code}"],
        text=True,
    )
    assert set(loaded.split()) <= {"shim", "shim.kernel", "shim.kernel.procfs", "__future__"}
